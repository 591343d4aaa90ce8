"""Draws that are exact in distribution, for a vocabulary of 50,000 and thousands of steps."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Square:
    """The weights of a vocabulary, laid out as a square whose rows are filled one after the other, to be drawn from.

    The usual float32 Gumbel stops at 16, so that in effect tokens of small probability are cut off and the entropy
    of a sampler with thousands of steps falls (Zheng et al., 2024, arXiv 2409.02908); JAX's "high" mode reaches 32.
    Here a row is drawn by its total weight, then a token of that row. The distribution is the same, for 2 sqrt(V)
    random numbers in place of V.

    Attributes:
      weights: of the tokens, the largest 1; 0 after the last of them.
      rows: sums over each row.
    """

    weights: Float[Array, "b R C"]
    rows: Float[Array, "b R"]

    @classmethod
    def of(cls, log_probs: Float[Array, "b V"]) -> "Square":
        """`log_probs` need not be normalised."""
        batch, vocab_size = log_probs.shape
        columns = math.isqrt(vocab_size - 1) + 1
        rows = -(-vocab_size // columns)
        weights = jnp.exp(log_probs - log_probs.max(axis=1, keepdims=True))
        weights = jnp.pad(weights, ((0, 0), (0, rows * columns - vocab_size))).reshape(batch, rows, columns)
        return cls(weights, weights.sum(axis=2))

    def draw(self, keys: PRNGKeyArray) -> Int[Array, "b"]:
        """One token per sequence, each with its own key `[b]`."""
        return jax.vmap(_draw)(keys, self.weights, self.rows)


def _draw(key: PRNGKeyArray, weights: Float[Array, "R C"], rows: Float[Array, "R"]) -> Int[Array, ""]:
    key_row, key_column = jax.random.split(key)
    row = jax.random.categorical(key_row, jnp.log(rows), mode="high")
    return row * weights.shape[1] + jax.random.categorical(key_column, jnp.log(weights[row]), mode="high")


def draw(keys: PRNGKeyArray, log_probs: Float[Array, "b V"]) -> Int[Array, "b"]:
    """One token per sequence from its (unnormalised) log-probabilities, each with its own key `[b]`."""
    return Square.of(log_probs).draw(keys)


def fold_in(keys: PRNGKeyArray, data: Int[Array, "b"] | Int[Array, ""] | int) -> PRNGKeyArray:
    """`jax.random.fold_in` of every key `[b]`, with one number for all or one for each."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))


def split(keys: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Two keys `[b]` for every key `[b]`."""
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]
