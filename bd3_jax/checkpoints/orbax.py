"""Checkpoints of a run in `WORKDIR/checkpoints/STEP/`: the whole state and the position in the data, saved together.

A checkpoint appears under its final name when it is complete, so an interrupted save leaves nothing that could be read.
One that cannot be read all the same, as after a bad disk or half a copy, is passed over with a warning, in favour of
the one before. Where the system will not read now what it may read later, the program ends and changes nothing.
`WORKDIR/config.json` beside them says what they are checkpoints of.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.damage import newest_readable, require_damage, system_number
from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.folders import free_path
from bd3_jax.metrics import Record, kind

State = TypeVar("State")
FOLDER = "checkpoints"

# Orbax logs the tracebacks of all threads in which a save failed, and raises the exception besides.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


def _quiet(unraisable: Any, tell: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Where reading one array fails, the reads of the others end later and find nobody who waits for them."""
    if str(unraisable.exc_value) != "Event loop is closed":
        tell(unraisable)


sys.unraisablehook = _quiet


class Checkpoints:
    """The checkpoints of one run, written while training goes on."""

    def __init__(
        self, workdir: epath.Path, keep: int, every: int = 0, best: int = 0, validations: Sequence[Record] = ()
    ):
        """Kept are the last `keep`, those of every so many steps, and the `best` with the lowest NLL; 0: none.

        `validations`: the records that say the NLL, as they stand there whenever a checkpoint is saved.
        """
        folder = workdir.resolve() / FOLDER
        policies: list[PreservationPolicy] = [LatestN(keep), _Best(best, validations)]
        if every:
            policies.append(EveryNSteps(every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(
        self, step: int, state: Any, position: dict[str, Any], stream: grain.DatasetIterator | None = None
    ) -> None:
        """Copies `state`, a pytree of arrays, to the host and writes it in the background with the JSON `position`.

        `stream`: what the run reads, if rows are streamed; every host's iterator is saved beside the state.

        Raises:
          UserError: the disk is full, or the like; it may be the one before that could not be written.
        """
        items = {"state": ocp.args.StandardSave(state)}
        if stream is not None:
            items["stream"] = grain.checkpoint.CheckpointSave(stream)
            position = position | {"hosts": jax.process_count()}
        items["position"] = ocp.args.JsonSave(position)
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, newest: int, abstract: State, stream: grain.DatasetIterator | None = None
    ) -> tuple[int, State, dict[str, Any]]:
        """Step, state and position of the last checkpoint up to step `newest` that can be read.

        Later ones are set aside as `STEP.damaged`, for training will come to their steps again.

        Args:
          newest: see `summarize`, which passes over damaged ones too.
          abstract: shape, dtype and sharding of every array.
          stream: what the run reads, if rows are streamed; it moves to its place.

        Raises:
          UserError: no checkpoint can be read, or `stream` was saved by another number of hosts; or the system would
            not read, and nothing was changed.
        """
        folder, steps = self._manager.directory, sorted(self._manager.all_steps(), reverse=True)
        restore = functools.partial(self._restore, abstract, stream)
        step, (state, position) = newest_readable(folder, [step for step in steps if step <= newest], restore)
        if jax.process_index() == 0:
            for damaged in (folder / str(later) for later in steps if later > step):
                damaged.rename(free_path(damaged.with_name(f"{damaged.name}.damaged")))
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        return step, state, position

    def _restore(
        self, abstract: State, stream: grain.DatasetIterator | None, step: int
    ) -> tuple[State, dict[str, Any]]:
        items = ocp.args.Composite(position=ocp.args.JsonRestore())
        position = self._manager.restore(step, args=items).position
        restore = {"state": ocp.args.StandardRestore(abstract)}
        if stream is not None:
            if position["hosts"] != jax.process_count():
                raise UserError(
                    f"checkpoint {step} in {self._manager.directory} was saved by {position['hosts']} hosts, each with "
                    f"its own place in the stream, but there are {jax.process_count()}; allowed: as many as before "
                    "(or a run with data.mode = 'prepared', which any number of hosts can continue)"
                )
            restore["stream"] = grain.checkpoint.CheckpointRestore(stream)
        return self._manager.restore(step, args=ocp.args.Composite(**restore)).state, position

    def close(self) -> None:
        """Waits until everything is written. Raises UserError as `save` does."""
        with self._saving():
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            number = system_number(error)
            if isinstance(error, ValueError) and number is None:
                raise
            reason = error if number is None else os.strerror(number)
            raise UserError(
                f"cannot write a checkpoint in {self._manager.directory}: {reason}; the last complete one is "
                f"{self._manager.latest_step()}, from which the same command continues"
            ) from error


@dataclasses.dataclass
class _Best(PreservationPolicy):
    """Keeps so many with the lowest NLL, of each kind of validation: figures of two kinds are not compared."""

    count: int
    validations: Sequence[Record]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kinds: dict[tuple[Any, ...], dict[int, float]] = {}  # of each, step -> NLL
        for record in self.validations:
            nll = record.get("eval/nll")  # in a file null, where it was not finite
            if record["step"] in steps and isinstance(nll, float) and math.isfinite(nll):
                kinds.setdefault(kind(record), {})[record["step"]] = nll
        best = {step for found in kinds.values() for step in sorted(found, key=found.__getitem__)[: self.count]}
        return [step in best for step in steps]


def read_position(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The JSON that `Checkpoints.save` got with the state of that step; None where there is none, or it is damaged.

    Raises:
      UserError: the system would not read it.
    """
    folder = workdir.resolve() / FOLDER
    try:
        found = json.loads((folder / str(step) / "position" / "metadata").read_text())
    except Exception as error:
        require_damage(error, folder, step)
        return None
    return found if isinstance(found, dict) else None


def latest_step(workdir: epath.Path) -> int | None:
    """Step of the newest complete checkpoint of a run, readable or not; nothing is created."""
    return next(iter(_newest_first(workdir)), None)


def steps(workdir: epath.Path) -> list[int]:
    """Steps of all complete checkpoints of a run, ascending; nothing is created."""
    return _newest_first(workdir)[::-1]


def restore_params(
    config: Config,
    workdir: epath.Path,
    weights: Literal["ema", "raw"],
    shardings: Any = None,
    step: int | None = None,
) -> tuple[dict[str, Any], int]:
    """The averaged or the raw parameters of a checkpoint of a run, and its step; nothing else is read.

    Args:
      config: what the parameters are wanted for.
      workdir: the run.
      weights: which.
      shardings: of every parameter, or one for all; None is the first device.
      step: that checkpoint and no other; None: the newest that can be read.

    Raises:
      UserError: if there is no checkpoint, or none that can be read, or it is one of another architecture.
    """
    require_checkpoint(workdir, step)
    run_folder.check_architecture(config, workdir)
    field = "ema" if weights == "ema" else "params"
    steps = _newest_first(workdir) if step is None else [step]
    found, state = newest_readable(workdir / FOLDER, steps, lambda step: _read(workdir, step, {field: shardings}))
    return state[field], found


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a checkpoint says beside the run's `config.json`.

    Attributes:
      step: updates done.
      vocab_size: V.
      low: t ~ U[low, high] in the next update.
      high: see `low`.
    """

    step: int
    vocab_size: int
    low: float
    high: float


def summarize(workdir: epath.Path, step: int | None = None) -> Summary:
    """Of the checkpoint of that step, the newest that can be read by default; reads no parameter.

    Raises:
      UserError: there is no such checkpoint, or none that can be read.
    """
    require_checkpoint(workdir, step)
    steps = _newest_first(workdir) if step is None else [step]
    _, summary = newest_readable(workdir / FOLDER, steps, lambda step: _summarize(workdir, step))
    return summary


def _summarize(workdir: epath.Path, step: int) -> Summary:
    with _open(workdir) as manager:
        vocab_size = manager.item_metadata(step)["state"].tree["ema"]["embedding"].shape[0]
    interval = _read(workdir, step, {"low": None, "high": None})
    # Through str: the nearest float32 to 0.001 lies above it and would no longer count as the unclipped bound.
    low, high = (float(str(np.asarray(interval[name]))) for name in ("low", "high"))
    return Summary(step, vocab_size, low, high)


def save_params(workdir: epath.Path, step: int, params: dict[str, Any], low: float, high: float) -> None:
    """Writes a checkpoint from which one can evaluate and sample: averaged weights and interval, nothing else."""
    state = {"ema": params, "low": jnp.float32(low), "high": jnp.float32(high)}
    with ocp.CheckpointManager(workdir.resolve() / FOLDER) as manager:
        manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))


def require_checkpoint(workdir: epath.Path, step: int | None = None) -> None:
    """Raises UserError where there is no complete checkpoint, or none of that step."""
    found = steps(workdir)
    if not found:
        raise UserError(f"{workdir} has no checkpoint; train one: bd3 train --config=... --workdir={workdir}")
    if step is not None and step not in found:
        raise UserError(f"{workdir} has no checkpoint of step {step}; allowed: {', '.join(map(str, found))}")


def _newest_first(workdir: epath.Path) -> list[int]:
    folder = workdir.resolve() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder), reverse=True) if folder.exists() else []


def _open(workdir: epath.Path) -> ocp.CheckpointManager:
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(workdir.resolve() / FOLDER, item_handlers=handlers)


def _read(workdir: epath.Path, step: int, shardings: dict[str, Any]) -> dict[str, Any]:
    """Those fields of the state that `shardings` has; one for all arrays of a field will do, None: the first device."""

    def abstract(saved: Any, sharding: Any) -> Any:
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(sharding, jax.sharding.Sharding):
            sharding = jax.tree.map(lambda _: sharding, saved)
        return jax.tree.map(
            lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), saved, sharding
        )

    with _open(workdir) as manager:
        saved = manager.item_metadata(step)["state"].tree
        if missing := [name for name in shardings if name not in saved]:
            raise UserError(f"checkpoint {step} of {workdir} holds {', '.join(saved)} and no {missing[0]}")
        wanted = {name: abstract(saved[name], sharding) for name, sharding in shardings.items()}
        args = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return manager.restore(step, args=ocp.args.Composite(state=args)).state
