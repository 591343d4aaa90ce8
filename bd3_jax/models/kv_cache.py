"""Keys and values of finished, clean tokens, kept while sampling.

Those of all layers are one array with the layers on axis 0, or a tuple of one array a layer, as the network wants it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Layers = Any  # Float[Array, "layers b h S k"], or a tuple of Float[Array, "b h S k"]
BATCH, TOKENS = -4, -2
"""Axes of each array."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVBlock:
    """Keys (rotated to their positions) and values of some tokens."""

    keys: Layers
    values: Layers

    def first(self, size: int) -> "KVBlock":
        """Those of the first `size` tokens."""
        return jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, 0, size, axis=leaf.ndim + TOKENS), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A ring of S tokens of context for each sequence: shapes never change, and a slide overwrites the oldest block.

    Position p of the sequence lies in slot p mod S. `length` counts the tokens stored since the beginning, so that the
    next token's position is `length` even after the oldest have been overwritten. It may be negative: what is appended
    at negative positions is never seen. A new sequence can thus begin with a block that stands for nothing, and be
    treated like one that goes on.
    """

    keys: Layers
    values: Layers
    length: Int[Array, "b"]

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[TOKENS]

    @property
    def valid(self) -> Bool[Array, "b S"]:
        """Which slots hold a token."""
        return jnp.arange(self.capacity)[None, :] < self.length[:, None]

    def append(self, block: KVBlock) -> "KVCache":
        """Stores a finished block of every sequence, in place of its oldest block once the ring is full.

        The block size must divide the capacity S. S = 0 (one block is the whole context) keeps nothing.
        """
        capacity, size = self.capacity, jax.tree.leaves(block.keys)[0].shape[TOKENS]
        length = self.length + size
        if capacity == 0:
            return KVCache(self.keys, self.values, length)
        if capacity % size:
            raise ValueError(f"the block size {size} must divide the cache's capacity {capacity}")
        start = self.length % capacity  # of negative lengths too

        def store(ring: Array, new: Array) -> Array:
            of_one = lambda ring, new, at: jax.lax.dynamic_update_slice_in_dim(ring, new, at, axis=ring.ndim + TOKENS)
            axis = ring.ndim + BATCH
            return jax.vmap(of_one, in_axes=(axis, axis, 0), out_axes=axis)(ring, new, start)

        store_all = lambda ring, new: jax.tree.map(store, ring, new)
        return KVCache(store_all(self.keys, block.keys), store_all(self.values, block.values), length)

    def select(self, rows: Bool[Array, "b"], other: "KVCache") -> "KVCache":
        """Takes the sequences `rows` from `other`, whose batch is as large or 1."""
        choose = lambda ours, theirs: jnp.where(rows[:, None, None, None], theirs, ours)
        length = jnp.where(rows, other.length, self.length)
        return self._map(choose, other, length)

    def tile(self, batch: int) -> "KVCache":
        """Of batch 1 -> `batch` times the same."""
        repeat = lambda leaf, _: jnp.repeat(leaf, batch, axis=BATCH)
        return self._map(repeat, self, jnp.repeat(self.length, batch))

    def write_prefix(self, block: KVBlock) -> "KVCache":
        """Puts tokens in the first places of the ring; the length stays as it is."""
        write = lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, 0, axis=ring.ndim + TOKENS)
        return self._map(write, block, self.length)

    def _map(self, function: Callable[[Array, Array], Array], other: "KVCache | KVBlock", length: Array) -> "KVCache":
        over = lambda ours, theirs: jax.tree.map(function, ours, theirs)
        return KVCache(over(self.keys, other.keys), over(self.values, other.values), length)
