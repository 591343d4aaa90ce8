"""Nucleus filtering without sorting the vocabulary (Holtzman et al., 2020)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ONE_BITS = 0x3F800000
"""1.0 as an integer: non-negative float32 numbers are ordered as their bit patterns are."""


def nucleus(log_probs: Float[Array, "*n V"], p: float) -> Float[Array, "*n V"]:
    """Log-probabilities restricted to the nucleus and renormalised; the others are -inf. P = 1 is the identity.

    Args:
      log_probs: normalised.
      p: P in (0, 1].
    """
    if p == 1:
        return log_probs
    return jax.nn.log_softmax(jnp.where(kept(jnp.exp(log_probs), p), log_probs, -jnp.inf), axis=-1)


def kept(probs: Float[Array, "*n V"], p: float) -> Bool[Array, "*n V"]:
    """Tokens that stay: in a stable descending sort, those whose inclusive cumulative probability is <= P.

    The first always stays.
    """
    return _first_in_order(probs, probs, p)


def kept_top_k(probs: Float[Array, "*n V"], k: int) -> Bool[Array, "*n V"]:
    """The k most probable tokens; of those that tie for the last places, the ones with the smallest ids."""
    return _first_in_order(probs, jnp.ones_like(probs), k)


def _first_in_order(probs: Float[Array, "*n V"], weights: Float[Array, "*n V"], limit: float) -> Bool[Array, "*n V"]:
    """Tokens that come first by probability, as long as their weights sum to at most `limit`.

    Nothing is sorted: the smallest v such that all tokens of probability v or more weigh at most `limit` is found by
    bisection over the 2^30 numbers in [0, 1]. Tokens that tie just below v, whose weights must be equal, are taken in
    the order of their ids, as long as they fit.
    """

    def sum_from(bits: Array) -> Array:
        return jnp.where(probs >= _float(bits), weights, 0).sum(axis=-1, keepdims=True)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the sum from `high` fits, that from `low` does not
        middle = (low + high) // 2
        fits = sum_from(middle) <= limit
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    shape = (*probs.shape[:-1], 1)
    bounds = jnp.zeros(shape, jnp.int32), jnp.full(shape, ONE_BITS + 1, jnp.int32)
    low, high = jax.lax.fori_loop(0, 30, halve, bounds)
    tied = probs == _float(low)
    weight = jnp.where(tied, weights, 0).max(axis=-1, keepdims=True)
    fitting = (limit - sum_from(high)) / weight
    first = jnp.arange(probs.shape[-1]) == probs.argmax(axis=-1, keepdims=True)
    return (probs >= _float(high)) | (tied & (jnp.cumsum(tied, axis=-1) <= fitting)) | first


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
