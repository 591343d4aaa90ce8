"""Checkpoints of a run in `WORKDIR/checkpoints/STEP/`: the whole state and the position in the data, saved together.

A checkpoint appears under its final name when it is complete, so an interrupted save leaves nothing that could be read.
`WORKDIR/config.json` beside them says what they are checkpoints of.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from bd3_jax.checkpoints import run_folder
from bd3_jax.config import Config
from bd3_jax.errors import UserError

State = TypeVar("State")
FOLDER = "checkpoints"

# Orbax logs the tracebacks of all threads in which a save failed, and raises the exception besides.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


class Checkpoints:
    """The checkpoints of one run, written while training goes on."""

    def __init__(self, workdir: epath.Path, keep: int, every: int = 0, best: int = 0):
        """Kept are the last `keep`, those of every so many steps, and the `best` with the lowest score; 0: none."""
        folder = workdir.resolve() / FOLDER
        self._scores = _read_scores(folder)
        policies: list[PreservationPolicy] = [LatestN(keep), _Best(best, self._scores)]
        if every:
            policies.append(EveryNSteps(every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(
        self,
        step: int,
        state: Any,
        position: dict[str, Any],
        stream: grain.DatasetIterator | None = None,
        score: float | None = None,
    ) -> None:
        """Copies `state`, a pytree of arrays, to the host and writes it in the background with the JSON `position`.

        `stream`: what the run reads, if rows are streamed; every host's iterator is saved beside the state. `score`:
        the lower the better.

        Raises:
          UserError: the disk is full, or the like; it may be the one before that could not be written.
        """
        items = {"state": ocp.args.StandardSave(state)}
        if stream is not None:
            items["stream"] = grain.checkpoint.CheckpointSave(stream)
            position = position | {"hosts": jax.process_count()}
        items["position"] = ocp.args.JsonSave(position)
        if score is not None:
            items["score"] = ocp.args.JsonSave({"score": score})
            self._scores[step] = score
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(
        self, step: int, abstract: State, stream: grain.DatasetIterator | None = None
    ) -> tuple[State, dict[str, Any]]:
        """State and position; `abstract` has the shape, dtype and sharding of every array. `stream` moves to its place.

        Raises:
          UserError: if `stream` was saved by another number of hosts.
        """
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
            # TensorStore's errors are ValueErrors that end in the system's number.
            number = re.search(r"os_error_code='(\d+)'", str(error))
            if isinstance(error, ValueError) and not number:
                raise
            reason = os.strerror(int(number[1])) if number else error
            raise UserError(
                f"cannot write a checkpoint in {self._manager.directory}: {reason}; the last complete one is "
                f"{self._manager.latest_step()}, from which the same command continues"
            ) from error


@dataclasses.dataclass
class _Best(PreservationPolicy):
    """Keeps so many with the lowest score."""

    count: int
    scores: dict[int, float]  # step -> score, of those that have one

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        scored = [checkpoint.step for checkpoint in checkpoints if checkpoint.step in self.scores]
        best = sorted(scored, key=self.scores.__getitem__)[: self.count]
        return [checkpoint.step in best for checkpoint in checkpoints]


def _read_scores(folder: epath.Path) -> dict[int, float]:
    found = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    paths = {step: folder / str(step) / "score" / "metadata" for step in found}
    return {step: json.loads(path.read_text())["score"] for step, path in paths.items() if path.exists()}


def latest_step(workdir: epath.Path) -> int | None:
    """Step of the newest complete checkpoint of a run; nothing is created."""
    folder = workdir.resolve() / FOLDER
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def steps(workdir: epath.Path) -> list[int]:
    """Steps of all complete checkpoints of a run, ascending; nothing is created."""
    folder = workdir.resolve() / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def restore_params(
    config: Config,
    workdir: epath.Path,
    weights: Literal["ema", "raw"],
    shardings: Any = None,
    step: int | None = None,
) -> tuple[dict[str, Any], int]:
    """The averaged or the raw parameters of a run's checkpoint, and its step; nothing else is read.

    Args:
      config: what the parameters are wanted for.
      workdir: the run.
      weights: which.
      shardings: of every parameter, or one for all; None is the first device.
      step: of the checkpoint; the newest by default.

    Raises:
      UserError: if there is no checkpoint, or it is one of another architecture.
    """
    step = require_checkpoint(workdir) if step is None else step
    run_folder.check_architecture(config, workdir)
    field = "ema" if weights == "ema" else "params"
    return _read(workdir, step, {field: shardings})[field], step


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run's newest checkpoint says beside its `config.json`.

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


def summarize(workdir: epath.Path) -> Summary:
    """Reads no parameter. Raises UserError if there is no checkpoint."""
    step = require_checkpoint(workdir)
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


def require_checkpoint(workdir: epath.Path) -> int:
    """Step of the newest complete checkpoint. Raises UserError where there is none."""
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint; train one: bd3 train --config=... --workdir={workdir}")
    return step


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
