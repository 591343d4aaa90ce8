"""From what part of a distribution tokens are drawn: nucleus and top-k, as functions and as draws."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.sampling import categorical
from bd3_jax.sampling.categorical import Square
from bd3_jax.sampling.nucleus import kept, kept_top_k

TRIES = 6
"""Draws from the whole distribution before the truncated one is worked out."""


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Keeps the tokens of the nucleus that are among the k most probable.

    Both are looked at in the whole distribution, so the order does not matter.

    Attributes:
      nucleus: P in (0, 1]; 1 keeps all.
      top_k: k; 0 keeps all.
    """

    nucleus: float = 1.0
    top_k: int = 0

    @property
    def keeps_all(self) -> bool:
        return self.nucleus == 1 and self.top_k == 0

    def __call__(self, log_probs: Float[Array, "*n V"]) -> Float[Array, "*n V"]:
        """Log-probabilities of what is kept, renormalised; the others are -inf."""
        if self.keeps_all:
            return log_probs
        probs, stays = jnp.exp(log_probs), jnp.ones(log_probs.shape, bool)
        if self.nucleus < 1:
            stays &= kept(probs, self.nucleus)
        if self.top_k:
            stays &= kept_top_k(probs, self.top_k)
        return jax.nn.log_softmax(jnp.where(stays, log_probs, -jnp.inf), axis=-1)

    def draw(self, keys: PRNGKeyArray, log_probs: Float[Array, "b V"]) -> Int[Array, "b"]:
        """Exact draws from `self(log_probs)`, each with its own key.

        By rejection: whether one token is kept takes one pass over the vocabulary, to find out which all are takes
        thirty. A sequence that is still without a token after a few tries draws from the truncated distribution.
        """
        square = Square.of(log_probs)
        if self.keeps_all:
            return square.draw(keys)

        def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tries, tokens, accepted = state
            drawn = square.draw(categorical.fold_in(keys, tries))
            return tries + 1, jnp.where(accepted, tokens, drawn), accepted | self._keeps(square, drawn)

        start = jnp.zeros((), jnp.int32), jnp.zeros(keys.shape, jnp.int32), jnp.zeros(keys.shape, bool)
        going_on = lambda state: (state[0] < TRIES) & ~state[2].all()
        _, tokens, accepted = jax.lax.while_loop(going_on, attempt, start)
        return jax.lax.cond(
            accepted.all(),
            lambda: tokens,
            lambda: jnp.where(accepted, tokens, categorical.draw(categorical.fold_in(keys, TRIES), self(log_probs))),
        )

    def _keeps(self, square: Square, tokens: Int[Array, "b"]) -> Bool[Array, "b"]:
        """Whether a token is kept: from what stands before it in a stable descending sort."""
        flat = square.weights.reshape(len(tokens), -1)
        token = tokens[:, None]
        own = jnp.take_along_axis(flat, token, axis=1)
        before = (flat > own) | ((flat == own) & (jnp.arange(flat.shape[1]) < token))
        above = jnp.where(before, flat, 0).sum(axis=1)
        stays = jnp.ones(tokens.shape, bool)
        if self.nucleus < 1:
            stays &= above + own[:, 0] <= self.nucleus * square.rows.sum(axis=1)
        if self.top_k:
            stays &= before.sum(axis=1) < self.top_k
        return stays | (above == 0)  # the first always stays
