"""A step whose loss or gradient was not finite: noticed, saved with all that it needs, and repeated by `bd3 replay`."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from bd3_jax import sharding
from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import FOLDER as CHECKPOINTS
from bd3_jax.checkpoints.orbax import Checkpoints, latest_step
from bd3_jax.config import Config
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.language_model import LanguageModel
from bd3_jax.training.state import TrainState
from bd3_jax.training.update import Metrics, loss_and_grads, make_program, step_key

STATUS = 3
"""Exit status of a run that stopped because of such steps."""
FOLDER = "failed_step"

_RECORDED = ("train/loss", "train/grad_norm")


class Step(NamedTuple):
    number: int
    batch: Int[Array, "b L"]
    metrics: Metrics


class InFlight:
    """Steps that the device has not finished, as far as the host knows; it is only that much ahead."""

    def __init__(self, limit: int, max_skipped: int, skipped: int):
        """`skipped`: how many steps before the first were skipped, in a row."""
        self._limit, self._max_skipped, self._skipped = limit, max_skipped, skipped
        self._steps: collections.deque[Step] = collections.deque()

    def add(self, step: Step) -> Step | None:
        """Waits where too many are on their way. Returns the last of `max_skipped` steps that were skipped in a row."""
        self._steps.append(step)
        return self._look(self._limit)

    def drain(self) -> Step | None:
        """Waits for all; returns as `add` does."""
        return self._look(0)

    def _look(self, limit: int) -> Step | None:
        while len(self._steps) > limit:
            step = self._steps.popleft()
            jax.block_until_ready(step.metrics)
            self._skipped = self._skipped + 1 if float(step.metrics["train/skipped"]) else 0
            if self._skipped >= self._max_skipped:
                return step
        return None


def save_failed(workdir: epath.Path, state: TrainState, step: Step, config: Config) -> None:
    """Writes WORKDIR/failed_step: the state before that step, its batch, its key and what came of it.

    It takes the place of one before it, as where the same command has come to the same step again.

    `state` may be some steps further, for they have changed nothing but the counts.
    """
    earlier = workdir / FOLDER / CHECKPOINTS
    if jax.process_index() == 0 and earlier.exists():
        earlier.rmtree()
    multihost_utils.sync_global_devices(FOLDER)  # before others look which steps are there
    before = dataclasses.replace(
        state,
        step=sharding.place(np.int32(step.number - 1), state.step.sharding),
        skipped=sharding.place(np.int32(config.training.max_skipped - 1), state.skipped.sharding),
    )
    values = {
        "rows": multihost_utils.process_allgather(step.batch, tiled=True).tolist(),
        "key": jax.random.key_data(step_key(config.seed, step.number - 1)).tolist(),
        **{name: float(step.metrics[name]) for name in _RECORDED},
    }
    checkpoints = Checkpoints(workdir / FOLDER, keep=1)
    checkpoints.save(step.number, before, values)
    checkpoints.close()


def replay(config: Config, workdir: epath.Path) -> bool:
    """Repeats the step in WORKDIR/failed_step, prints what came of it then and now, and which gradients are not finite.

    Returns:
      whether loss and gradient norm are those of then, to the last bit.

    Raises:
      UserError: there is none, or it does not fit the settings.
    """
    number = latest_step(workdir / FOLDER)
    if number is None:
        raise UserError(f"{workdir} has no {FOLDER}: no training that stopped there by itself, with status {STATUS}")
    run_folder.check_continues(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    ids = load_tokenizer(workdir / "tokenizer").ids
    model = LanguageModel.from_config(config, ids, sharding.batch_shards(mesh))
    program = make_program(model, config, mesh)
    number, state, then = Checkpoints(workdir / FOLDER, keep=1).restore(number, program.abstract)
    rows = np.asarray(then["rows"], np.int32)
    together = len(rows) // config.training.microbatches
    split = sharding.batch_sharding(mesh, together, "config.training.batch_size / microbatches")
    batch = sharding.place(rows, split)

    key = step_key(config.seed, number - 1)
    print(f"step {number} of {workdir}, key {jax.random.key_data(key).tolist()}, t ~ U[{state.low}, {state.high}]")
    if jax.random.key_data(key).tolist() != then["key"]:
        raise UserError(f"config.seed is {config.seed}, which gives another key than {then['key']}, that of the step")
    gradients = jax.jit(lambda state, x0: loss_and_grads(model, config, state, x0, split)[1])(state, batch)
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        print(_describe(jax.tree_util.keystr(path, simple=True, separator="."), leaf))
    _, metrics = program.update.lower().compile()(state, batch)
    same = True
    for name in _RECORDED:
        now, before = float(metrics[name]), then[name]
        equal = now == before or (np.isnan(now) and np.isnan(before))
        same &= equal
        print(f"{name:<16} now {now!r}, then {before!r}: {'the same' if equal else 'another'}")
    return same


def _describe(name: str, gradient: Any) -> str:
    broken, size = int((~jnp.isfinite(gradient)).sum()), gradient.size
    largest = float(jnp.max(jnp.where(jnp.isfinite(gradient), jnp.abs(gradient), 0)))
    return f"  gradient of {name:<34} {broken:>9,} of {size:>11,} not finite, the others up to {largest:.3g}"
