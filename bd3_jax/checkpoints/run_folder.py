"""`WORKDIR/config.json`: the settings of a run, and what may change when the run is taken up again."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.errors import UserError
from bd3_jax.folders import write_text
from bd3_jax.metrics import FILE_NAME as METRICS
from bd3_jax.metrics import read_metrics

FILE_NAME = "config.json"

# Settings under which a run may be continued: none changes the model or the data.
_FREE = (
    "training.num_steps", "training.microbatches", "training.max_skipped", "training.log_every", "training.eval_every",
    "training.sample_every", "training.checkpoint_every", "training.keep_checkpoints", "training.keep_every",
    "training.keep_best", "training.sigterm_status", "training.wandb_project", "profile_steps", "search",
    "eval", "sampling", "mesh", "data.source", "data.directory",
    "model.attention", "model.attention_chunk", "model.scan_unroll", "model.remat", "model.max_logits",
)  # fmt: skip
# Settings that have to fit the parameters.
_ARCHITECTURE = (
    "objective", "block_size", "model.length", "model.width", "model.num_layers", "model.num_heads", "model.cond_dim",
)  # fmt: skip


def write_config(config: Config, workdir: epath.Path) -> None:
    write_text(workdir / FILE_NAME, json.dumps(config.to_dict(), indent=2) + "\n")


def read_settings(workdir: epath.Path) -> dict[str, Any]:
    """The groups of settings of a run; those that did not exist yet when it was made have their defaults.

    Raises:
      UserError: they are missing or damaged.
    """
    path = workdir / FILE_NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=_with_tuples)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}, the settings of the run, cannot be read: {error}") from None
    if not isinstance(settings, dict) or "objective" not in settings:
        advice = "choose another --workdir"
        if isinstance(settings, dict) and "model_type" in settings:
            advice = f"of a published model bd3 convert {workdir} NEW --format=bd3 makes one"
        raise UserError(f"{path} does not hold the settings of a run; {advice}")
    return _with_new_fields(settings)


def read_config(workdir: epath.Path) -> Config:
    """As `read_settings`, checked. Raises UserError as it does, and for settings that are not allowed."""
    path, settings = workdir / FILE_NAME, read_settings(workdir)
    try:
        return from_config_dict(ConfigDict(settings))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}, the settings of the run, cannot be read: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Settings that have several values are tuples, for which JSON has only lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}


def _with_new_fields(settings: dict[str, Any]) -> dict[str, Any]:
    objective, size = settings.get("objective"), settings.get("block_size")
    try:
        defaults = base.get_config(f"bd3lm,block_size={size}" if objective == "bd3lm" else str(objective)).to_dict()
    except UserError:
        return settings  # it is no objective, which is told where all settings are checked
    for name, group in settings.items():
        if isinstance(group, dict) and isinstance(defaults.get(name), dict):
            defaults[name] |= group
        else:
            defaults[name] = group
    return defaults


def check_begins(config: Config, workdir: epath.Path) -> None:
    """Raises UserError where beginning a run in `workdir`, which has no checkpoint, would write over something.

    It may begin where no file of a run is. It may begin again where the same run (see `check_continues`) was stopped
    before its first checkpoint was complete, since it writes the same records once more. That is so if the metrics end
    by the time that the second checkpoint was due, for each is written while training goes on, and the next waits for
    it. Metrics of later steps had a checkpoint, which somebody has taken away.
    """
    if (workdir / FILE_NAME).exists():
        check_continues(config, workdir)
        every = read_settings(workdir)["training"]["checkpoint_every"]
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
    found, wanted = (dict(_flatten(settings)) for settings in (read_settings(workdir), config.to_dict()))
    for name in names:
        if found.get(name) != wanted[name]:
            raise UserError(
                f"config.{name} is {wanted[name]!r}, but {workdir / FILE_NAME} has {found.get(name)!r}; {advice}"
            )


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
