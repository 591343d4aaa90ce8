"""The network as seen from the current block: what it keeps of earlier ones, and what one call gives.

| | kept of earlier tokens | a call reads |
| --- | --- | --- |
| `Cached` (BD3-LM) | keys and values | the current block; at its first call also the one before, to store it |
| `Windowed` (BD3-LM without a cache, MDLM) | tokens | the last W tokens, the current block included |
| `CachedNextToken` (AR) | keys and values | the newest token, which it stores |
| `WindowedNextToken` (AR without a cache) | tokens | the last W tokens |
"""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bd3_jax.models.kv_cache import KVCache
from bd3_jax.models.network import AnyParams, Network, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What is kept of the tokens before the current block, of every sequence; of fixed size, however long they get.

    cache: keys and values.
    recent: tokens: with a cache, the newest block, whose keys and values are not stored yet; else the window.
    """

    cache: KVCache | None
    recent: Int[Array, "b n"]

    def select(self, rows: Bool[Array, "b"], other: "Memory") -> "Memory":
        """Takes the sequences `rows` from `other`, whose batch is as large or 1."""
        cache = None
        if self.cache is not None:
            assert other.cache is not None  # both are of one context
            cache = self.cache.select(rows, other.cache)
        return Memory(cache, jnp.where(rows[:, None], other.recent, self.recent))

    def tile(self, batch: int) -> "Memory":
        """Of batch 1 -> `batch` times the same."""
        cache = None if self.cache is None else self.cache.tile(batch)
        return Memory(cache, jnp.repeat(self.recent, batch, axis=0))


class Context(Protocol):
    """Reads blocks of `size` tokens; `index [b]` says which block of each sequence is the current one.

    `stores`: the first call of a block does work for the block before it, so it is made even if nothing is drawn.
    `at` `[b, n]` are the places in the block whose hidden states `[b, n, d]` are wanted; None: all.
    """

    stores: ClassVar[bool]

    @property
    def size(self) -> int:
        """B."""

    def freeze(self, params: Params) -> AnyParams:
        """The parameters as the calls below want them."""

    def start(self, params: Any, row: Int[np.ndarray, "S"], index: int) -> Memory:
        """The memory of one sequence, batch 1, with the first `index` blocks of `row` finished."""

    def first(
        self, params: Any, memory: Memory, index: Int[Array, "b"], tokens: Int[Array, "b B"], at: Array | None
    ) -> tuple[Float[Array, "b n d"], Memory]:
        """The first call of a block."""

    def look(
        self, params: Any, memory: Memory, index: Int[Array, "b"], tokens: Int[Array, "b B"], at: Array | None
    ) -> Float[Array, "b n d"]:
        """A further call."""

    def finish(self, memory: Memory, index: Int[Array, "b"], tokens: Int[Array, "b B"]) -> Memory:
        """The block's tokens are final."""


@dataclasses.dataclass(frozen=True)
class Cached:
    """Keys and values of the last `capacity` tokens before the current block.

    A finished block waits in `Memory.recent`; the next block's first call feeds both and stores it. A sequence that
    begins has a block before its first that nobody sees, see `KVCache`. Beyond the training context the cache still
    carries what has left the window, which a recomputed window does not.
    """

    network: Network
    size: int
    capacity: int
    stores: ClassVar[bool] = True

    def freeze(self, params: Params) -> AnyParams:
        return _freeze(self.network, params)

    def start(self, params: Any, row: Int[np.ndarray, "S"], index: int) -> Memory:
        """Finished blocks but the newest go through the network at once, padded to a power of 2 of blocks."""
        stored = max(index - 1, 0) * self.size
        padded = self.size
        while padded < stored:
            padded *= 2
        padded = min(padded, self.capacity)
        prefix = np.zeros((1, padded if stored else 0), np.int32)
        prefix[0, :stored] = row[:stored]
        recent: Any = np.zeros((1, self.size), np.int32)
        if index:
            recent[0] = row[stored : stored + self.size]
        length = np.full((1,), (index - 1) * self.size, np.int32)
        return Memory(_read_prefix(self.network, self.size, self.capacity, params, prefix, length), recent)

    def first(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> tuple[Array, Memory]:
        assert memory.cache is not None  # it is of this context
        both = jnp.concatenate([memory.recent, tokens], axis=1)
        if at is None:
            at = jnp.broadcast_to(jnp.arange(self.size), tokens.shape)
        hidden, kv = self.network.decode(params, both, memory.cache, self.size, at + self.size)
        return hidden, dataclasses.replace(memory, cache=memory.cache.append(kv.first(self.size)))

    def look(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> Array:
        assert memory.cache is not None
        return self.network.decode(params, tokens, memory.cache, self.size, at)[0]

    def finish(self, memory: Memory, index: Array, tokens: Array) -> Memory:
        return dataclasses.replace(memory, recent=tokens)


_freeze = jax.jit(Network.freeze, static_argnums=0)


# Parameters that are not used count all the same: the cache is on their devices, which may be those of other processes.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def _read_prefix(
    network: Network, size: int, capacity: int, params: AnyParams, prefix: Int[Array, "1 P"], length: Int[Array, "1"]
) -> KVCache:
    """A cache of that length with the prefix, which may be empty, in its first places."""
    cache = network.init_cache(1, capacity)
    if not prefix.shape[1]:
        return dataclasses.replace(cache, length=length)
    _, kv = network.decode(params, prefix, network.init_cache(1, 0), size, jnp.zeros((1, 1), jnp.int32))
    return cache.begin(kv, length)


@dataclasses.dataclass(frozen=True)
class Windowed:
    """The last `window` tokens, the current block included, go through the network at every call."""

    network: Network
    size: int
    window: int
    stores: ClassVar[bool] = False

    def freeze(self, params: Params) -> Params:
        return params

    def start(self, params: Any, row: Int[np.ndarray, "S"], index: int) -> Memory:
        place = min(index * self.size, self.window - self.size)
        recent: Any = np.zeros((1, self.window), np.int32)
        recent[0, :place] = row[index * self.size - place : index * self.size]
        return Memory(None, recent)

    def look(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> Array:
        place = self._place(index)
        hidden = self.network.apply(params, _write(memory.recent, tokens, place), self.size)
        at = jnp.arange(self.size) if at is None else at
        return jnp.take_along_axis(hidden, (place[:, None] + at)[..., None], axis=1)

    def first(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> tuple[Array, Memory]:
        return self.look(params, memory, index, tokens, at), memory

    def finish(self, memory: Memory, index: Array, tokens: Array) -> Memory:
        recent = _write(memory.recent, tokens, self._place(index))
        full = self._place(index + 1) == self._place(index)
        return Memory(None, jnp.where(full[:, None], jnp.roll(recent, -self.size, axis=1), recent))

    def _place(self, index: Int[Array, "b"]) -> Int[Array, "b"]:
        """Where in the window the current block begins."""
        return jnp.minimum(index * self.size, self.window - self.size)


@dataclasses.dataclass(frozen=True)
class CachedNextToken(Cached):
    """Only the newest token is fed, and its hidden state predicts the next."""

    def first(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> tuple[Array, Memory]:
        assert memory.cache is not None
        hidden, kv = self.network.decode(params, memory.recent, memory.cache)
        return hidden, dataclasses.replace(memory, cache=memory.cache.append(kv))

    def look(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> Array:
        """Not a number: a block of one token is finished at its first call, and no further one is ever made."""
        return jnp.full((*tokens.shape, self.network.model.width), jnp.nan)


@dataclasses.dataclass(frozen=True)
class WindowedNextToken:
    """The last `window` tokens go through the network at every call."""

    network: Network
    window: int
    size: int = 1
    stores: ClassVar[bool] = False

    def freeze(self, params: Params) -> Params:
        return params

    def start(self, params: Any, row: Int[np.ndarray, "S"], index: int) -> Memory:
        kept = min(index, self.window)
        recent: Any = np.zeros((1, self.window), np.int32)
        recent[0, :kept] = row[index - kept : index]
        return Memory(None, recent)

    def look(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> Array:
        newest = jnp.minimum(index, self.window) - 1
        return jnp.take_along_axis(self.network.apply(params, memory.recent, 1), newest[:, None, None], axis=1)

    def first(self, params: Any, memory: Memory, index: Array, tokens: Array, at: Array | None) -> tuple[Array, Memory]:
        return self.look(params, memory, index, tokens, at), memory

    def finish(self, memory: Memory, index: Array, tokens: Array) -> Memory:
        full = (index >= self.window)[:, None]
        recent = jnp.where(full, jnp.roll(memory.recent, -1, axis=1), memory.recent)
        return Memory(None, _write(recent, tokens, jnp.minimum(index, self.window - 1)))


def _write(row: Int[Array, "b W"], tokens: Int[Array, "b n"], at: Int[Array, "b"]) -> Int[Array, "b W"]:
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(row, tokens, at, 0)
