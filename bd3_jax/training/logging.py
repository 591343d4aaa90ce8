"""Metrics of a run: `metrics.jsonl`, one object a record, and TensorBoard."""

import json
import math
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter

from bd3_jax.evaluation.report import read_records

FILE_NAME = "metrics.jsonl"


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
            _drop_after(workdir / FILE_NAME, keep)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=keep + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a record; `values` has flat names such as train/loss. TensorBoard takes the numbers among them."""
        append_record(self._workdir, {"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def append_record(workdir: epath.Path, record: dict[str, Any]) -> None:
    """Appends a line to the run's metrics; a number that is not finite becomes null, since JSON has none."""
    if jax.process_index() == 0:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with (workdir / FILE_NAME).open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _drop_after(path: epath.Path, step: int) -> None:
    kept = [record for record in read_records(path) if record["step"] <= step]
    if path.exists():
        temporary = path.parent / f"{FILE_NAME}.tmp"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
