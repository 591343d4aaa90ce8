"""`WORKDIR/config.json`: the settings of a run, and what may change when the run is taken up again."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from bd3_jax.config import Config
from bd3_jax.errors import UserError

FILE_NAME = "config.json"

# Settings under which a run may be continued: none changes the model or the data.
_FREE = (
    "training.num_steps", "training.log_every", "training.eval_every", "training.checkpoint_every",
    "training.keep_checkpoints", "eval", "sampling", "mesh", "data.source", "data.directory",
    "model.attention", "model.attention_chunk", "model.scan_unroll",
)  # fmt: skip
# Settings that have to fit the parameters.
_ARCHITECTURE = (
    "objective", "block_size", "model.length", "model.width", "model.num_layers", "model.num_heads", "model.cond_dim",
)  # fmt: skip


def write_config(config: Config, workdir: epath.Path) -> None:
    temporary = workdir / f"{FILE_NAME}.tmp"
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    temporary.replace(workdir / FILE_NAME)


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
    try:
        found = dict(_flatten(json.loads(path.read_text())))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}, the settings of the run, cannot be read: {error}") from error
    wanted = dict(_flatten(config.to_dict()))
    for name in names:
        if found.get(name) != wanted[name]:
            raise UserError(f"config.{name} is {wanted[name]!r}, but {path} has {found.get(name)!r}; {advice}")


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
