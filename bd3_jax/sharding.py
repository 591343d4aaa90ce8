"""The device mesh, and the one table that says which array dimension is split over which of its axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from bd3_jax.config import MeshConfig
from bd3_jax.errors import UserError
from bd3_jax.models.transformer import Network, Params

# Logical axis of an array -> mesh axes that split it. A dimension whose size they do not divide stays whole.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "cond": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as a mesh with axes data, fsdp and tensor; data = -1 takes what the other two leave.

    `devices` may be those of a machine that is not at hand; by default they are all that there are.

    Raises:
      UserError: if the product is not the number of devices.
    """
    count, others = jax.device_count() if devices is None else len(devices), config.fsdp * config.tensor
    data = count // others if config.data == -1 else config.data
    if data * others != count:
        raise UserError(
            f"config.mesh.data, fsdp, tensor are {config.data}, {config.fsdp}, {config.tensor}; allowed: a product of "
            f"{count}, the number of devices (data = -1: all that fsdp and tensor leave)"
        )
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(mesh: Mesh, logical: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of an array by the rules for its logical axes."""

    def axes(name: str | None, size: int) -> str | tuple[str, ...] | None:
        found = None if name is None else RULES[name]
        names = (found,) if isinstance(found, str) else found or ()
        return found if size % math.prod(mesh.shape[axis] for axis in names) == 0 else None

    return NamedSharding(mesh, PartitionSpec(*(axes(*pair) for pair in zip(logical, shape, strict=True))))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh, batch_size: int, setting: str) -> NamedSharding:
    """Sharding of token rows `[b, L]`, or of one number a row `[b]`: the rows over data and fsdp.

    Raises:
      UserError: naming `setting`, where its `batch_size` rows cannot be split evenly.
    """
    parts = batch_shards(mesh)
    if batch_size % parts:
        raise UserError(f"{setting} is {batch_size}; allowed: a multiple of {parts} (mesh.data * mesh.fsdp)")
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def param_shardings(mesh: Mesh, network: Network) -> Params:
    """A sharding for every parameter."""
    return jax.tree.map(
        lambda array, logical: spec(mesh, logical, array.shape), network.abstract_params(), network.logical_axes()
    )


def global_batch(rows: Int32[np.ndarray, "local_b L"], batch_size: int, sharding: NamedSharding) -> Int32[Array, "b L"]:
    """The batch of all hosts as one array, from the rows that this host has read."""
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, rows.shape[1]))
