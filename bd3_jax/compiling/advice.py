"""Settings that would need less memory than those of a program that does not fit."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bd3_jax.compiling.report import GROUPS
from bd3_jax.compiling.targets import Chip
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.errors import UserError
from bd3_jax.sharding import mesh_shape


class _Change(NamedTuple):
    group: str
    name: str
    value: Any
    why: str


def advice(config: Config, mode: str, held: dict[str, int], chip: Chip, chips: int, slices: int = 1) -> list[str]:
    """Flags, each of which by itself is one that these settings and this machine take; the cheapest in speed first.

    Args:
      config: what does not fit.
      mode: train, eval or sample.
      held: bytes of the arguments by kind on one chip.
      chip: of the machine.
      chips: how many there are.
      slices: of which the machine consists.
    """
    return [
        f"--config.{change.group}.{change.name}={change.value} ({change.why})"
        for change in _changes(config, mode, held, chip, chips)
        if _is_allowed(config, mode, change, chips, slices)
    ]


def _changes(config: Config, mode: str, held: dict[str, int], chip: Chip, chips: int) -> Iterator[_Change]:
    m, mesh, training = config.model, config.mesh, mode == "train"
    if m.dtype == "float32" and chip.platform != "cpu":
        yield _Change("model", "dtype", "bfloat16", "half the activations")
    if m.attention == "dense":
        yield _Change("model", "attention", "auto", "no [2L, 2L] scores")
    if training:
        parts = 2 * config.training.microbatches
        yield _Change("training", "microbatches", parts, "activations of fewer rows at a time, same gradient")
    if training and m.remat != "full":
        yield _Change("model", "remat", "block" if m.remat == "none" else "full", "more computed again")
    shards, group = chips // mesh.tensor, GROUPS[mode]
    if mesh.fsdp < shards and sum(held.values()) > chip.memory / 4:
        yield _Change("mesh", "fsdp", shards, "parameters and optimiser split over the chips")
    batch = config.to_dict()[group]["batch_size"]
    if batch > shards:
        fewer = max(shards, batch // 2 // shards * shards)
        rows = f"{fewer / chips:g} rows a chip instead of {batch / chips:g}"
        yield _Change(group, "batch_size", fewer, rows)
    else:
        yield _Change("mesh", "tensor", 2 * mesh.tensor, "heads and MLP columns split over more chips")


def changed(config: Config, changes: dict[tuple[str, str], Any]) -> Config:
    """These settings with other values by (group, name). Raises UserError where they cannot be."""
    values = copy.deepcopy(config.to_dict())
    for (group, name), value in changes.items():
        values[group][name] = value
    return from_config_dict(ConfigDict(values))


def _is_allowed(config: Config, mode: str, change: _Change, chips: int, slices: int) -> bool:
    try:
        checked = changed(config, {(change.group, change.name): change.value})
        data, fsdp, tensor = mesh_shape(checked.mesh, chips)
    except UserError:
        return False
    rows = checked.to_dict()[GROUPS[mode]]["batch_size"]
    together = rows // (checked.training.microbatches if mode == "train" else 1)
    return together % (data * fsdp) == 0 and data % slices == 0 and checked.model.num_heads % tensor == 0
