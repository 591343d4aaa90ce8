"""How processes are told of each other: flags, environment, clusters; what is refused."""

import pytest

from bd3_jax.errors import UserError
from bd3_jax.runtime import Processes

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
        ((None, None, None), {"MEGASCALE_COORDINATOR_ADDRESS": "a"}, (None, None, None)),
    ],
)
def test_where_they_are_found(flags, environment, wanted):
    found = Processes.of(*flags, 60, environment)
    assert found == (None if wanted is None else Processes(*wanted, 60))


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
