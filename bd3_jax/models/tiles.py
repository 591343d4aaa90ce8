"""What the TPU kernels have in common: tiles of lengths, and the registers that they fill."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128
"""A length must be a multiple of this."""


def tile_size(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `length`."""
    return next(size for size in range(max(most, LANES) // LANES * LANES, 0, -LANES) if length % size == 0)


def divide(x: Any, by: int) -> Any:
    """x // by for x >= 0, anything for others. In a kernel a division costs as much as all else in the mask."""
    if by & (by - 1) == 0:
        return x >> (by.bit_length() - 1)
    # Without the sign's treatment, which has no lowering for absent devices.
    return x // by if isinstance(x, np.ndarray) else jax.lax.div(x, jnp.int32(by))
