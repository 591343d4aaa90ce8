"""Block after block: BD3-LM, and MDLM as the case of one block of L (Block Diffusion, algorithm 2).

A canvas `[b, S]` holds the given tokens and the mask id wherever one is to be drawn, so the prompt's length is data
and not shape. Block n covers positions [n * stride, n * stride + size).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.models.transformer import Network, Params
from bd3_jax.sampling import categorical
from bd3_jax.sampling.updates import Denoiser, LogProbs, Update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Finished canvases.

    `nfe` counts the network calls that drew tokens of a sequence, `cache_calls` those that only stored keys and values.
    """

    tokens: Int[Array, "b S"]
    nfe: Int[Array, "b"]
    cache_calls: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a canvas is cut into blocks."""

    size: int
    stride: int
    num_blocks: int

    @classmethod
    def of(cls, block_size: int, context: int, max_length: int) -> "Layout":
        """The blocks that `max_length` tokens need; the last may reach beyond.

        Where one block is the whole context (MDLM), what comes after it is drawn in windows: L/2 new tokens given
        the L/2 before them.
        """
        stride = block_size if block_size < context else max(1, context // 2)
        return cls(block_size, stride, 1 + -(-max(0, max_length - block_size) // stride))

    @property
    def length(self) -> int:
        return self.size + (self.num_blocks - 1) * self.stride


class Context(NamedTuple):
    """The network as seen from the current block.

    state: what is kept of finished blocks, a pytree.
    hidden: (state, canvas `[b, S]`, start, tokens `[b, size]`) -> hidden states `[b, size, d]` of the block at `start`
      when it holds `tokens`; the canvas holds what comes before it.
    store: (state, tokens) -> the state with a finished block added, by one more network call; None: nothing is kept.
    """

    state: Any
    hidden: Callable[[Any, Array, Array, Array], Float[Array, "b B d"]]
    store: Callable[[Any, Array], Any] | None


def cached(network: Network, params: Params, batch: int, capacity: int) -> Context:
    """Only the current block is fed; the last `capacity` tokens before it are kept as keys and values.

    Beyond the training context these still carry what has left the window, which a recomputed window does not.
    """
    return Context(
        network.init_cache(batch, capacity),
        lambda cache, canvas, start, tokens: network.decode(params, tokens, cache)[0],
        lambda cache, tokens: cache.append(network.decode(params, tokens, cache)[1]),
    )


def windowed(network: Network, params: Params, window: int, block_size: int) -> Context:
    """The last `window` tokens, the current block included, go through the network at every call."""

    def hidden(_: None, canvas: Array, start: Array, tokens: Array) -> Array:
        canvas = jax.lax.dynamic_update_slice_in_dim(canvas, tokens, start, axis=1)
        first = jnp.maximum(0, start + tokens.shape[1] - window)
        seen = jax.lax.dynamic_slice_in_dim(canvas, first, window, axis=1)
        states = network.apply(params, seen, block_size)
        return jax.lax.dynamic_slice_in_dim(states, start - first, tokens.shape[1], axis=1)

    return Context(None, hidden, None)


def sample(
    context: Context,
    log_probs: LogProbs,
    update: Update,
    layout: Layout,
    mask: int,
    keys: PRNGKeyArray,
    canvas: Int[Array, "b S"],
) -> Samples:
    """Fills the masked positions of the canvas; the others never change.

    Args:
      context: the network.
      log_probs: see `Denoiser`.
      update: what happens within a block.
      layout: S = layout.length.
      mask: the mask's id.
      keys: one for each sequence, `[b]`; a sequence depends on its own and on nothing else of the batch.
      canvas: given tokens, and the mask's id elsewhere.
    """
    zeros = jnp.zeros(canvas.shape[:1], jnp.int32)

    def one_block(index: Array, carry: tuple[Samples, Any]) -> tuple[Samples, Any]:
        samples, state = carry
        start = index * layout.stride
        tokens = jax.lax.dynamic_slice_in_dim(samples.tokens, start, layout.size, axis=1)
        denoiser = Denoiser(lambda tokens: context.hidden(state, samples.tokens, start, tokens), log_probs, mask)
        tokens, nfe = fill_block(denoiser, update, categorical.fold_in(keys, index), tokens)
        cache_calls = samples.cache_calls
        if context.store is not None:
            last = index == layout.num_blocks - 1
            state = jax.lax.cond(last, lambda state, _: state, context.store, state, tokens)
            cache_calls = cache_calls + ~last
        canvas = jax.lax.dynamic_update_slice_in_dim(samples.tokens, tokens, start, axis=1)
        return Samples(canvas, samples.nfe + nfe, cache_calls), state

    samples, _ = jax.lax.fori_loop(0, layout.num_blocks, one_block, (Samples(canvas, zeros, zeros), context.state))
    return samples


def fill_block(
    denoiser: Denoiser, update: Update, keys: PRNGKeyArray, tokens: Int[Array, "b B"]
) -> tuple[Int[Array, "b B"], Int[Array, "b"]]:
    """Steps of `update` until nothing is masked, and the number of network calls that each sequence needed."""
    key_init, key_step = categorical.split(keys)

    def unfinished(tokens: Array) -> Array:
        return (tokens == denoiser.mask).any(axis=1)

    def step(state: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        index, tokens, nfe, carry = state
        stepped, carry = update.step(denoiser, categorical.fold_in(key_step, index), tokens, carry)
        return index + 1, stepped, nfe + unfinished(tokens), carry

    start = (jnp.zeros((), jnp.int32), tokens, jnp.zeros(tokens.shape[:1], jnp.int32), update.init(key_init, tokens))
    _, tokens, nfe, _ = jax.lax.while_loop(lambda state: unfinished(state[1]).any(), step, start)
    return tokens, nfe
