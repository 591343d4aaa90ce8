"""Metrics of a run: `metrics.jsonl`, one object a record, and TensorBoard."""

import time
from typing import Any

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from bd3_jax.folders import writing
from bd3_jax.metrics import append_metrics, drop_after


class MetricLog:
    """Writes records on the first process; on the others it does nothing.

    A run that resumes from step n writes the records after n again. So those are dropped here first, as is a last line
    that an abrupt end left unfinished, and every step stands there once.

    Raises:
      UserError: a file cannot be written.
    """

    def __init__(self, workdir: epath.Path, keep: int):
        """`keep`: the last step whose records stay, that of the checkpoint; -1 for a fresh start."""
        self._workdir = workdir
        self._events = None
        if jax.process_index() == 0:
            drop_after(workdir, keep)
            with writing(workdir / "tensorboard"):
                (workdir / "tensorboard").mkdir(exist_ok=True)
                # Not SummaryWriter: its thread dies on a full disk, and closing it would wait forever.
                self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
                # TensorBoard then forgets what an earlier session wrote of these steps.
                self._events.write_event(Event(step=keep + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a record; `values` has flat names such as train/loss. TensorBoard takes the numbers among them."""
        if self._events is not None:
            append_metrics(self._workdir, {"step": step, **values})
            with writing(self._workdir / "tensorboard"):
                for name, value in values.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        scalar = summary.scalar(name, value)
                        self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
                self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with writing(self._workdir / "tensorboard"):
                self._events.close()
