"""Metrics of a run: `metrics.jsonl`, one object a record, TensorBoard, and Weights & Biases where it is wanted."""

import hashlib
import importlib
import importlib.util
import math
import tempfile
import time
from typing import Any

import jax
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.folders import in_bucket, writing
from bd3_jax.metrics import FILE_NAME, append_metrics, drop_after

_UPLOAD_SECONDS = 60
"""At most so often a bucket gets the files again."""


class MetricLog:
    """Writes records on the first process; on the others it does nothing.

    A run that resumes from step n writes the records after n again. So those are dropped here first, as is a last line
    that an abrupt end left unfinished, and every step stands there once.

    Objects in a bucket cannot be appended to: there the files are written in a local folder, and copied.

    Raises:
      UserError: a file cannot be written.
    """

    def __init__(self, workdir: epath.Path, config: Config, keep: int, measured: int | None = None):
        """Opens the files.

        Args:
          workdir: of the run.
          config: settings of the run, and whether Weights & Biases is wanted.
          keep: the last step whose records stay, that of the checkpoint; -1 for a fresh start.
          measured: the last step whose validation and samples stay, if it is another one.
        """
        self._workdir, self._local = workdir, workdir
        self._events, self._wandb = None, None
        self._uploaded = time.monotonic()
        if jax.process_index() == 0:
            self._wandb = _start_wandb(workdir, config)
            if in_bucket(workdir):
                self._local = epath.Path(tempfile.mkdtemp(prefix="bd3-"))
                if (workdir / FILE_NAME).exists():
                    (self._local / FILE_NAME).write_bytes((workdir / FILE_NAME).read_bytes())
            drop_after(self._local, keep, measured)
            folder = self._local / "tensorboard"
            with writing(folder):
                folder.mkdir(exist_ok=True)
                # Not SummaryWriter: its thread dies on a full disk, and closing it would wait forever.
                self._events = EventsWriter(str(folder / "events"))
                # TensorBoard then forgets what an earlier session wrote of these steps.
                self._events.write_event(Event(step=keep + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a record; `values` has flat names such as train/loss. TensorBoard takes finite numbers and texts."""
        if self._events is None:
            return
        append_metrics(self._local, {"step": step, **values})
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        summaries = [summary.scalar(name, value) for name, value in numbers.items()]
        summaries += [
            summary.text(name, "\n\n---\n\n".join(_texts(value))) for name, value in values.items() if _texts(value)
        ]
        with writing(self._local / "tensorboard"):
            for item in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=item))
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        """Copies the files to where the run lies, if that is a bucket."""
        if self._events is None or self._local == self._workdir:
            return
        with writing(self._workdir / FILE_NAME):
            for path in (self._local / FILE_NAME, *(self._local / "tensorboard").iterdir()):
                target = self._workdir / path.relative_to(self._local)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.exists():
                    target.write_bytes(path.read_bytes())
        self._uploaded = time.monotonic()

    def close(self) -> None:
        if self._events is not None:
            with writing(self._local / "tensorboard"):
                self._events.close()
            self.upload()
            if self._local != self._workdir:
                self._local.rmtree()
        if self._wandb is not None:
            self._wandb.finish()


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) and value and isinstance(value[0], str) else []


def require_wandb(config: Config) -> None:
    """Raises UserError where Weights & Biases is wanted and not installed."""
    if config.training.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.training.wandb_project is {config.training.wandb_project!r}, but the package wandb is not "
            "installed; allowed: '', or after pip install wandb the name of a project"
        )


def _start_wandb(workdir: epath.Path, config: Config) -> Any:
    """A run of that name, which goes on where the workdir's does; None where it is not wanted."""
    require_wandb(config)
    if not config.training.wandb_project:
        return None
    name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]  # the same whenever the run is continued
    return importlib.import_module("wandb").init(
        project=config.training.wandb_project, name=workdir.name, id=name, resume="allow", config=config.to_dict()
    )
