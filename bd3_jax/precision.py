"""Products of float32 arrays in float32: TPUs and GPUs round the operands to bfloat16 or TF32 where nobody says so."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def precision_of(operand: Array) -> jax.lax.Precision | None:
    """The `precision` of a product: its operands' own. Of bfloat16 it is what every machine does anyhow."""
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None
