"""The settings of an earlier run, as it left them in WORKDIR/config.json. Used where --config is not given.

bd3 sample --workdir=runs/quickstart --config.sampling.nucleus=0.8
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bd3_jax.configs import base
from bd3_jax.errors import UserError


def get_config(workdir: str) -> ConfigDict:
    path = epath.Path(workdir) / "config.json"
    try:
        settings = json.loads(path.read_text(), object_hook=_with_tuples)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict) or "objective" not in settings:
        raise UserError(f"{path} does not hold the settings of a run; choose another --workdir, or give --config")
    return ConfigDict(with_new_fields(settings))


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Settings that have several values are tuples, for which JSON has only lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}


def with_new_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that did not exist yet when the run was made have their defaults."""
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
