"""One token a call (AR)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.models.transformer import Network, Params
from bd3_jax.sampling import categorical
from bd3_jax.sampling.block import Samples
from bd3_jax.sampling.updates import LogProbs


class Context(NamedTuple):
    """The network as seen from the newest token.

    state: what is kept of earlier tokens, a pytree; None: nothing is.
    read: (state, canvas `[b, S]`, position) -> hidden states `[b, d]` there, which predict the next token, and the
      state with that position's token added.
    """

    state: Any
    read: Callable[[Any, Array, Array], tuple[Float[Array, "b d"], Any]]


def cached(network: Network, params: Params, batch: int, capacity: int) -> Context:
    """Only the newest token is fed; the last `capacity` tokens before it are kept as keys and values."""

    def read(cache: Any, canvas: Array, position: Array) -> tuple[Array, Any]:
        newest = jax.lax.dynamic_slice_in_dim(canvas, position, 1, axis=1)
        hidden, block = network.decode(params, newest, cache)
        return hidden[:, 0], cache.append(block)

    return Context(network.init_cache(batch, capacity), read)


def windowed(network: Network, params: Params, window: int) -> Context:
    """The last `window` tokens go through the network at every call."""

    def read(_: None, canvas: Array, position: Array) -> tuple[Array, None]:
        first = jnp.maximum(0, position + 1 - window)
        seen = jax.lax.dynamic_slice_in_dim(canvas, first, window, axis=1)
        hidden = network.apply(params, seen, 1)
        return jax.lax.dynamic_index_in_dim(hidden, position - first, axis=1, keepdims=False), None

    return Context(None, read)


def sample(context: Context, log_probs: LogProbs, mask: int, keys: PRNGKeyArray, canvas: Int[Array, "b S"]) -> Samples:
    """Draws what follows the given prefix. Position 0 must be given; see `block.sample` for the arguments.

    A call that reads a given token before another given token draws nothing; with a cache it is a `cache_call`.
    """
    zeros = jnp.zeros(canvas.shape[:1], jnp.int32)

    def one_token(position: Array, carry: tuple[Samples, Any]) -> tuple[Samples, Any]:
        samples, state = carry
        hidden, state = context.read(state, samples.tokens, position)
        given = jax.lax.dynamic_index_in_dim(samples.tokens, position + 1, axis=1, keepdims=False)
        drawing = given == mask
        token = jax.lax.cond(
            drawing.any(),
            lambda hidden: categorical.draw(categorical.fold_in(keys, position + 1), log_probs(hidden)),
            lambda hidden: given,
            hidden,
        )
        token = jnp.where(drawing, token, given)
        tokens = jax.lax.dynamic_update_slice_in_dim(samples.tokens, token[:, None], position + 1, axis=1)
        stored = ~drawing if state is not None else jnp.zeros_like(drawing)
        return Samples(tokens, samples.nfe + drawing, samples.cache_calls + stored), state

    # Without a cache, calls before the last given token would come to nothing.
    first = 0 if context.state is not None else jnp.maximum(0, (canvas == mask).argmax(axis=1).min() - 1)
    start = Samples(canvas, zeros, zeros), context.state
    return jax.lax.fori_loop(first, canvas.shape[1] - 1, one_token, start)[0]
