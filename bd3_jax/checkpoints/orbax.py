"""Checkpoints of a run in `WORKDIR/checkpoints/STEP/`: the whole state and the position in the data, saved together.

A checkpoint appears under its final name when it is complete, so an interrupted save leaves nothing that could be read.
`WORKDIR/config.json` beside them says what they are checkpoints of.
"""

from typing import Any, Literal, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN

from bd3_jax.checkpoints import run_folder
from bd3_jax.config import Config
from bd3_jax.errors import UserError

State = TypeVar("State")
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, written while training goes on."""

    def __init__(self, workdir: epath.Path, keep: int):
        """`keep`: the last so many are kept."""
        options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(workdir.resolve() / FOLDER, options=options)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Copies `state`, a pytree of arrays, to the host and writes it in the background with the JSON `position`."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """State and position; `abstract` has the shape, dtype and sharding of every array."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.position

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def latest_step(workdir: epath.Path) -> int | None:
    """Step of the newest complete checkpoint of a run; nothing is created."""
    folder = workdir.resolve() / FOLDER
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None


def restore_params(
    config: Config, workdir: epath.Path, weights: Literal["ema", "raw"], shardings: Any = None
) -> tuple[dict[str, Any], int]:
    """The averaged or the raw parameters of a run's newest checkpoint, and its step; nothing else is read.

    Args:
      config: what the parameters are wanted for.
      workdir: the run.
      weights: which.
      shardings: of every parameter, or one for all; None is the first device.

    Raises:
      UserError: if there is no checkpoint, or it is one of another architecture.
    """
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} has no checkpoint; train one: bd3 train --config=... --workdir={workdir}")
    run_folder.check_architecture(config, workdir)

    field = "ema" if weights == "ema" else "params"
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(workdir.resolve() / FOLDER, item_handlers=handlers) as manager:
        saved = manager.item_metadata(step)["state"].tree[field]
        if shardings is None:
            shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda _: shardings, saved)
        wanted = {
            field: jax.tree.map(
                lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
                saved,
                shardings,
            )
        }
        args = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return manager.restore(step, args=ocp.args.Composite(state=args)).state[field], step
