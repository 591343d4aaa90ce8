"""Block after block: BD3-LM, MDLM as the case of one block of L, AR as blocks of one (Block Diffusion, algorithm 2).

Tokens that are given stand in the blocks from the beginning, the mask id stands wherever one is to be drawn: so the
prompt's length is data and not shape, and gaps may be anywhere.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.models.network import AnyParams
from bd3_jax.sampling import categorical
from bd3_jax.sampling.contexts import Context, Memory
from bd3_jax.sampling.updates import Call, Denoiser, Filling, Update


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a row of tokens is cut into blocks: block n covers [n * stride, n * stride + size)."""

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
        layout = cls(block_size, stride, 0)
        return dataclasses.replace(layout, num_blocks=layout.blocks_of(max_length))

    @property
    def length(self) -> int:
        return self.tokens_of(self.num_blocks)

    def tokens_of(self, blocks: int) -> int:
        """How many tokens so many blocks cover, one after the other."""
        return self.size + (blocks - 1) * self.stride if blocks else 0

    def blocks_of(self, length: int) -> int:
        """How many blocks hold that many tokens, the last of them whole or in part."""
        return 1 + -(-max(0, length - self.size) // self.stride)

    def end(self, length: int) -> int:
        """Up to where a sample of that many tokens is drawn: to the end of a block, but where that is the context.

        There what nobody asked for stays masked, and costs no calls.
        """
        return length if self.stride < self.size else self.blocks_of(length) * self.size

    def block_of(self, place: int) -> int:
        """Number of the block that draws the token at a place: how many whole blocks the tokens before it make."""
        return 0 if place < self.size else 1 + (place - self.size) // self.stride


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filled:
    """Finished blocks of a batch, n = K blocks of B tokens.

    tokens: as given, and as drawn.
    confidence: the probability, before truncation, with which a token was drawn; 0 where it was given.
    drawn_at: at which network call of its block, counted from 1; 0 where it was given.
    nfe: network calls of each block that drew tokens of the sequence.
    cache_calls: network calls of each block that only stored keys and values.
    """

    tokens: Int[Array, "b n"]
    confidence: Float[Array, "b n"]
    drawn_at: Int[Array, "b n"]
    nfe: Int[Array, "b K"]
    cache_calls: Int[Array, "b K"]


class _State(NamedTuple):
    """Of a block on its way. `step` counts the network calls."""

    step: Int[Array, ""]
    filling: Filling
    drawn_at: Int[Array, "b B"]
    nfe: Int[Array, "b"]
    carry: Any


def fill_blocks(
    context: Context,
    denoiser: Denoiser,
    update: Update,
    params: AnyParams,
    keys: PRNGKeyArray,
    memory: Memory,
    first: Int[Array, "b"],
    given: Int[Array, "b n"],
    end: Int[Array, "b"],
) -> tuple[Memory, Filled]:
    """Fills the masked positions of the next blocks; the others never change.

    Args:
      context: the network.
      denoiser: what it says.
      update: what happens within a block.
      params: of the network, frozen by the context.
      keys: one for each sequence, `[b]`; a sequence depends on its own and on nothing else of the batch.
      memory: of what comes before.
      first: number of the first block, for each sequence.
      given: tokens, and the mask's id elsewhere.
      end: only so many of them are drawn, for each sequence; what is masked beyond stays so.
    """
    batch, size = given.shape[0], context.size

    def one_block(memory: Memory, block: tuple[Array, Array]) -> tuple[Memory, Filled]:
        number, tokens = block
        index = first + number
        key_init, key_step = categorical.split(categorical.fold_in(keys, index))
        drawable = number * size + np.arange(size) < end[:, None]

        def masked(state: _State) -> Array:
            return (state.filling.tokens == denoiser.mask) & drawable

        def unfinished(state: _State) -> Array:
            return update.unfinished(masked(state), state.carry)

        def positions(state: _State) -> Array | None:
            return update.positions(masked(state), state.carry)

        def advance(state: _State, hidden: Array) -> _State:
            step_keys = categorical.fold_in(key_step, state.step)
            call = Call(denoiser, step_keys, state.filling, masked(state), hidden)
            filling, carry = update.step(call, state.carry)
            nfe = state.nfe + unfinished(state)
            drawn_at = jnp.where(filling.tokens != state.filling.tokens, nfe[:, None], state.drawn_at)
            return _State(state.step + 1, filling, drawn_at, nfe, carry)

        zeros = jnp.zeros(batch, jnp.int32)
        filling = Filling(tokens, jnp.zeros(tokens.shape, jnp.float32))
        carry = update.init(key_init, (tokens == denoiser.mask) & drawable)
        state = _State(jnp.zeros((), jnp.int32), filling, jnp.zeros_like(tokens), zeros, carry)
        cache_calls = zeros
        if context.stores:
            cache_calls += ~unfinished(state)
            hidden, memory = context.first(params, memory, index, tokens, positions(state))
            state = advance(state, hidden)

        def look(state: _State) -> _State:
            hidden = context.look(params, memory, index, state.filling.tokens, positions(state))
            return advance(state, hidden)

        state = jax.lax.while_loop(lambda state: unfinished(state).any(), look, state)
        tokens = state.filling.tokens
        filled = Filled(tokens, state.filling.confidence, state.drawn_at, state.nfe, cache_calls)
        return context.finish(memory, index, tokens), filled

    blocks = given.reshape(batch, -1, size).swapaxes(0, 1)
    memory, filled = jax.lax.scan(one_block, memory, (jnp.arange(len(blocks)), blocks))
    flat = lambda x: x.swapaxes(0, 1).reshape(batch, -1)
    return memory, jax.tree.map(flat, filled)
