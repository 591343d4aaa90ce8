"""Draws that are exact in distribution, for a vocabulary of 50,000 and thousands of steps."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def draw(keys: PRNGKeyArray, log_probs: Float[Array, "b V"]) -> Int[Array, "b"]:
    """One token per sequence from its (unnormalised) log-probabilities, each with its own key `[b]`.

    The usual float32 Gumbel stops at 16, so that in effect tokens of small probability are cut off and the entropy
    of a sampler with thousands of steps falls (Zheng et al., 2024, arXiv 2409.02908); JAX's "high" mode reaches 32.
    The vocabulary is laid out as a square: a row is drawn by its total probability, then a token of that row. The
    distribution is the same, for 2 sqrt(V) random numbers in place of V.
    """
    return jax.vmap(_draw)(keys, log_probs)


def _draw(key: PRNGKeyArray, log_probs: Float[Array, "V"]) -> Int[Array, ""]:
    vocab_size = log_probs.shape[0]
    columns = math.isqrt(vocab_size - 1) + 1
    rows = -(-vocab_size // columns)
    weights = jnp.pad(jnp.exp(log_probs - log_probs.max()), (0, rows * columns - vocab_size)).reshape(rows, columns)
    key_row, key_column = jax.random.split(key)
    row = jax.random.categorical(key_row, jnp.log(weights.sum(axis=1)), mode="high")
    column = jax.random.categorical(key_column, jnp.log(weights[row]), mode="high")
    return row * columns + column


def fold_in(keys: PRNGKeyArray, data: Int[Array, "b"] | Int[Array, ""] | int) -> PRNGKeyArray:
    """`jax.random.fold_in` of every key `[b]`, with one number for all or one for each."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))


def split(keys: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Two keys `[b]` for every key `[b]`."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]
