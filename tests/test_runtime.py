"""How processes are told of each other: flags, environment, clusters; what is refused."""

import jax
import pytest

from bd3_jax import runtime
from bd3_jax.errors import UserError
from bd3_jax.runtime import Processes, has_tpu

ENVIRONMENT = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        ((None, None, None), {}, None),
        (("h:1", 2, 0), {}, ("h:1", 2, 0)),
        ((None, None, None), ENVIRONMENT, ("h:1", 4, 2)),
        ((None, None, 3), ENVIRONMENT, ("h:1", 4, 3)),  # a flag goes before the environment
        ((None, None, None), {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "8"}, (None, None, None)),
        ((None, None, None), {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ((None, None, None), {"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, (None, None, None)),
        ((None, None, None), {"OMPI_MCA_orte_hnp_uri": "1;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2"}, (None, None, None)),
        ((None, None, None), {"OMPI_MCA_orte_hnp_uri": "1;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ((None, None, None), {"MEGASCALE_COORDINATOR_ADDRESS": "a"}, (None, None, None)),
    ],
)
def test_where_they_are_found(flags, environment, wanted):
    found = Processes.of(*flags, 60, environment)
    assert found == (None if wanted is None else Processes(*wanted, 60))


@pytest.mark.parametrize("name", ["accel0", "vfio/0", "vfio/vfio", "null"])
def test_chips_of_every_generation_are_seen(name, tmp_path, monkeypatch):
    """Those of v5e and later are groups of VFIO, as other devices may be where TPU's library is not installed."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    for libtpu in (None, "found"):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, libtpu=libtpu: libtpu)
        assert has_tpu(tmp_path) == (name == "accel0" or (name == "vfio/0" and libtpu is not None))


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("h:1", 2, None), {}, "--process_id is missing"),
        ((None, 2, 1), {}, "--coordinator is missing"),
        (("h:1", 2, 2), {}, "--process_id is 2 of 2 processes; allowed: 0 to"),
        (("h", 2, 1), {}, "--coordinator is 'h'; allowed: HOST:PORT"),
        ((None, None, None), ENVIRONMENT | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID in the environment is 'x'"),
    ],
)
def test_what_does_not_fit(flags, environment, message):
    with pytest.raises(UserError, match=message):
        Processes.of(*flags, 60, environment)


@pytest.fixture
def processes(monkeypatch):
    """What sets the number of processes; one of them that leaves at once raises SystemExit."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(runtime.os, "_exit", leave)
    return lambda count: monkeypatch.setattr(runtime.jax, "process_count", lambda: count)


def test_whatever_fails_one_process_ends_it_at_once(processes, capsys):
    """And not at the farewell, where it would wait for others that wait for it."""
    for count, expected in ((1, ValueError), (2, SystemExit)):
        processes(count)
        with pytest.raises(expected) as ended, runtime.alongside_others():
            int("x")
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert "ValueError" in error
    assert error.endswith("error: process 0 of 2 stops\n")


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_what_another_one_has_caused(kind, processes, capsys):
    """Both kinds are seen of a collective whose other process was killed."""
    processes(2)
    with pytest.raises(SystemExit) as ended, runtime.alongside_others():
        raise kind("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert ended.value.code == runtime.LOST
    assert "another one died or cannot be reached (UNKNOWN: Gloo" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended, runtime.alongside_others():
        raise kind("RESOURCE_EXHAUSTED: Out of memory")
    assert ended.value.code == 1
