"""How arrays of the network lie on the mesh that it is compiled for (`jax.sharding.use_abstract_mesh`), if on one.

Rows are split over data and fsdp, heads and columns over tensor; see `sharding.RULES` for the parameters.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")
"""Over which rows are split."""


def is_meshed() -> bool:
    """Whether there is a mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def tensor_axis(size: int) -> str | None:
    """The axis over which a dimension of `size` heads or columns is split; one that it does not divide stays whole."""
    return "tensor" if is_meshed() and size % jax.sharding.get_abstract_mesh().shape["tensor"] == 0 else None


def parts(size: int) -> int:
    """In how many parts that dimension is."""
    axis = tensor_axis(size)
    return jax.sharding.get_abstract_mesh().shape[axis] if axis else 1


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Has the compiler lay the first dimensions of x over these axes, and keep the others whole."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if is_meshed() else x
