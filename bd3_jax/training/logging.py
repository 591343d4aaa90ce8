"""Metrics of a run: `metrics.jsonl`, one object a record, and TensorBoard."""

from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter

from bd3_jax.metrics import append_metrics, drop_after


class MetricLog:
    """Writes records on the first process; on the others it does nothing.

    A run that resumes from step n writes the records after n again. So those are dropped here first, as is a last line
    that an abrupt end left unfinished, and every step stands there once.
    """

    def __init__(self, workdir: epath.Path, keep: int):
        """`keep`: the last step whose records stay, that of the checkpoint; -1 for a fresh start."""
        self._workdir = workdir
        self._board = None
        if jax.process_index() == 0:
            drop_after(workdir, keep)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=keep + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a record; `values` has flat names such as train/loss. TensorBoard takes the numbers among them."""
        if self._board is not None:
            append_metrics(self._workdir, {"step": step, **values})
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
