"""What every program that uses devices does first: compiled programs are kept, and processes find each other."""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from bd3_jax.errors import UserError

LOST = 4
"""Exit status of a process whose fellows died or cannot be reached."""
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""How errors of JAX's runtime begin that no other process can have caused."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other. None: found by JAX, on TPU, under Slurm and under Open MPI.

    Attributes:
      coordinator: host:port of process 0, where it is to listen.
      count: how many there are.
      index: which one this is, from 0.
      timeout: seconds after which a process that is not heard of counts as dead, and the others stop.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    timeout: int

    @classmethod
    def of(
        cls,
        coordinator: str | None,
        count: int | None,
        index: int | None,
        timeout: int,
        environment: Mapping[str, str] = os.environ,
    ) -> "Processes | None":
        """From flags, else from the environment; None for a program that is alone.

        The environment is JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; or that of a job of several
        tasks under Slurm or Open MPI, or of a TPU slice of several hosts.

        Raises:
          UserError: some of the three are given and others are not, or they do not fit each other.
        """
        given = {
            "--coordinator": coordinator or environment.get("JAX_COORDINATOR_ADDRESS"),
            "--num_processes": _number(count, "JAX_NUM_PROCESSES", environment),
            "--process_id": _number(index, "JAX_PROCESS_ID", environment),
        }
        address, number, own = given.values()
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == 3:
            return cls(None, None, None, timeout) if _is_one_of_several(environment) else None
        if missing:
            raise UserError(
                f"{missing[0]} is missing; allowed: --coordinator, --num_processes and --process_id together"
            )
        assert isinstance(address, str)
        assert isinstance(number, int)
        assert isinstance(own, int)
        if ":" not in address:
            raise UserError(f"--coordinator is {address!r}; allowed: HOST:PORT of process 0")
        if not 0 <= own < number:
            raise UserError(f"--process_id is {own} of {number} processes; allowed: 0 to --num_processes - 1")
        return cls(address, number, own, timeout)


def _number(value: int | None, name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name)
    if value is not None or text is None:
        return value
    if not text.isdigit():
        raise UserError(f"{name} in the environment is {text!r}; allowed: a number")
    return int(text)


def _is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether JAX will find other processes: tasks of a job of Slurm or Open MPI, or hosts of a TPU slice."""
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_JOB_ID" in environment:
        return int(environment["SLURM_STEP_NUM_TASKS"]) > 1
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return "," in environment[name]
    # Elsewhere on Cloud TPU the machine's metadata tell, which JAX asks. A slice of one host is no mistake.
    return "TPU_SKIP_MDS_QUERY" not in environment and has_tpu()


def has_tpu(devices: Path = Path("/dev")) -> bool:
    """Whether chips are attached: as accelerators up to v4, by VFIO, as other devices may be, from v5e on."""
    if (devices / "accel0").exists():
        return True
    return importlib.util.find_spec("libtpu") is not None and any(devices.glob("vfio/[0-9]*"))


def start(processes: Processes | None = None) -> None:
    """Compiled programs are kept in ~/.cache/bd3_jax/xla, or in the folder that JAX_COMPILATION_CACHE_DIR names.

    Where there are several processes, all of them must come here within five minutes.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/bd3_jax/xla"))
    if processes is not None:
        try:
            jax.distributed.initialize(
                processes.coordinator,
                processes.count,
                processes.index,
                heartbeat_timeout_seconds=processes.timeout,
                shutdown_timeout_seconds=processes.timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes of this run do not find each other: {error}") from error


@contextlib.contextmanager
def alongside_others() -> Iterator[None]:
    """Where several processes run, one that fails ends at once, so that the others notice; none waits for another.

    Whatever one of them cannot go on after, the others cannot either: a collective that waits for it fails or is ended
    after `Processes.timeout` by JAX, which says so.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, UserError):
            _leave(f"error: {who}: {error}", 2)
        if not _is_of_runtime(error) or str(error).startswith(_OWN_FAULTS):
            _leave(f"{traceback.format_exc()}\nerror: {who} stops", 1)
        first = str(error).strip().splitlines()[0][:300]
        _leave(
            f"error: {who} stops, for another one died or cannot be reached ({first}); start all of them again: the "
            "run continues from its last checkpoint",
            LOST,
        )


def _is_of_runtime(error: Exception) -> bool:
    """A status of JAX's runtime is an error of its own or, where its quick way of calling fails, a ValueError."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    status, colon, _ = str(error).partition(": ")
    return isinstance(error, ValueError) and bool(colon) and status.isupper()


def _leave(message: str, status: int) -> None:
    """Without the farewell at exit, which waits for all others."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)
