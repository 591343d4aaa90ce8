"""`WORKDIR/config.json`: the settings of a run, and what may change when the run is taken up again."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from bd3_jax.config import Config
from bd3_jax.errors import UserError
from bd3_jax.folders import writing
from bd3_jax.metrics import FILE_NAME as METRICS
from bd3_jax.metrics import read_metrics

FILE_NAME = "config.json"

# Settings under which a run may be continued: none changes the model or the data.
_FREE = (
    "training.num_steps", "training.log_every", "training.eval_every", "training.checkpoint_every",
    "training.keep_checkpoints", "eval", "sampling", "mesh", "data.source", "data.directory",
    "model.attention", "model.attention_chunk", "model.scan_unroll", "model.remat", "model.max_logits",
)  # fmt: skip
# Settings that have to fit the parameters.
_ARCHITECTURE = (
    "objective", "block_size", "model.length", "model.width", "model.num_layers", "model.num_heads", "model.cond_dim",
)  # fmt: skip


def write_config(config: Config, workdir: epath.Path) -> None:
    temporary = workdir / f"{FILE_NAME}.tmp"
    with writing(workdir / FILE_NAME):
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        temporary.replace(workdir / FILE_NAME)


def check_begins(config: Config, workdir: epath.Path) -> None:
    """Raises UserError where beginning a run in `workdir`, which has no checkpoint, would write over something.

    It may begin where no file of a run is. It may begin again where the same run (see `check_continues`) was stopped
    before its first checkpoint was complete, since it writes the same records once more. That is so if the metrics end
    by the time that the second checkpoint was due, for each is written while training goes on, and the next waits for
    it. Metrics of later steps had a checkpoint, which somebody has taken away.
    """
    path = workdir / FILE_NAME
    if path.exists():
        check_continues(config, workdir)
        every = _settings(path)["training.checkpoint_every"]
        last = max((record["step"] for record in read_metrics(workdir)), default=0)
        if last > 2 * every:
            raise UserError(
                f"{workdir} has metrics up to step {last} but no checkpoint to continue from; allowed: put its "
                "checkpoints/ back, or choose another --workdir"
            )
    elif found := [name for name in (METRICS, "manifest.json", "tokenizer") if (workdir / name).exists()]:
        raise UserError(
            f"{workdir} has {found[0]} but no {FILE_NAME}, so it is not the folder of a run; choose another --workdir"
        )


def check_continues(config: Config, workdir: epath.Path) -> None:
    """Raises UserError that names the first setting in which a run cannot be continued with `config`."""
    names = [name for name, _ in _flatten(config.to_dict())]
    bound = [name for name in names if not any(name == free or name.startswith(f"{free}.") for free in _FREE)]
    _compare(config, workdir, bound, "continue it as it began, or choose another --workdir")


def check_architecture(config: Config, workdir: epath.Path) -> None:
    """Raises UserError that names the first setting that does not fit the parameters of a run."""
    _compare(config, workdir, _ARCHITECTURE, "leave out --config to take all settings from there")


def _compare(config: Config, workdir: epath.Path, names: Iterable[str], advice: str) -> None:
    path = workdir / FILE_NAME
    found = _settings(path)
    wanted = dict(_flatten(config.to_dict()))
    for name in names:
        if found.get(name) != wanted[name]:
            raise UserError(f"config.{name} is {wanted[name]!r}, but {path} has {found.get(name)!r}; {advice}")


def _settings(path: epath.Path) -> dict[str, Any]:
    """Dotted name -> value."""
    try:
        settings = dict(_flatten(json.loads(path.read_text())))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}, the settings of the run, cannot be read: {error}") from error
    if "objective" not in settings:
        raise UserError(f"{path} does not hold the settings of a run, so its folder is none; choose another --workdir")
    return settings


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
