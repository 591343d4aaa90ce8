"""The device mesh, and the one table that says which array dimension is split over which of its axes."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from bd3_jax.config import MeshConfig
from bd3_jax.errors import UserError
from bd3_jax.models.mesh import BATCH_AXES
from bd3_jax.models.network import Network, Params

# Logical axis of an array -> mesh axes that split it. A dimension whose size they do not divide stays whole.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "cond": None,
}


def abstract_arrays(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of the arrays of a tree, each with its sharding; the devices need not be there."""
    abstract = lambda array, own: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=own)
    return jax.tree.map(abstract, tree, shardings)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as a mesh with axes data, fsdp and tensor; data = -1 takes what the other two leave.

    `devices` may be those of a machine that is not at hand; by default they are all that there are. Of several slices
    each has whole copies of everything: only `data` goes over the network between them.

    Raises:
      UserError: if the product is not the number of devices, or data no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    names, kinds, shape = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, mesh_shape(config, len(devices))
    if (slices := slices_of(devices)) > 1:
        return Mesh(arrange(devices, shape, slices), names, axis_types=kinds)
    return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def mesh_shape(config: MeshConfig, count: int) -> tuple[int, int, int]:
    """Of so many devices: data, fsdp, tensor.

    Raises:
      UserError: if the product is not their number.
    """
    others = config.fsdp * config.tensor
    data = count // others if config.data == -1 else config.data
    if data * others != count:
        raise UserError(
            f"config.mesh.data, fsdp, tensor are {config.data}, {config.fsdp}, {config.tensor}; allowed: a product of "
            f"{count}, the number of devices (data = -1: all that fsdp and tensor leave)"
        )
    return data, config.fsdp, config.tensor


def slices_of(devices: Sequence[jax.Device]) -> int:
    """Of how many slices of a TPU pod these are."""
    # A described machine of one slice has no number of it. Of GPUs the number says which host they are in.
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int], slices: int) -> np.ndarray:
    """The devices in that shape, neighbours side by side; slice after slice along the first axis.

    Raises:
      UserError: where the slices do not divide it.
    """
    if shape[0] % slices:
        raise UserError(f"config.mesh.data is {shape[0]}; allowed: a multiple of {slices}, the number of slices")
    within = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)


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
    return row_sharding(mesh)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The same where the number of rows is a multiple anyhow."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def param_shardings(mesh: Mesh, network: Network) -> Params:
    """A sharding for every parameter."""
    return jax.tree.map(
        lambda array, logical: spec(mesh, logical, array.shape), network.abstract_params(), network.logical_axes()
    )


def by_rows(rows: NamedSharding | None) -> contextlib.AbstractContextManager[Any]:
    """While a function of rows is traced: activations stay split as they are, see `models.network`."""
    return contextlib.nullcontext() if rows is None else jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh)


def host_share(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """(p, P): this host reads part p of the P equal parts into which hosts split a batch.

    Hosts whose devices hold the same rows, as where `tensor` spans them, read the same part.
    """
    parts: dict[int, set[int]] = {}
    indices: Mapping[Any, tuple[slice, ...]] = sharding.devices_indices_map((batch_size,))
    for device, (rows,) in indices.items():
        parts.setdefault(device.process_index, set()).add(rows.start or 0)
    own = sorted(parts[jax.process_index()])
    distinct = sorted({tuple(sorted(starts)) for starts in parts.values()})
    return distinct.index(tuple(own)), len(distinct)


def place(array: np.ndarray | np.generic, sharding: jax.sharding.Sharding) -> Array:
    """What every host has whole as one array over the mesh; hosts need not speak with each other."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def global_batch(rows: Int32[np.ndarray, "local_b L"], batch_size: int, sharding: NamedSharding) -> Int32[Array, "b L"]:
    """The batch of all hosts as one array, from the rows that this host has read."""
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, rows.shape[1]))
