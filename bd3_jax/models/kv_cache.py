"""Keys and values of finished, clean tokens, kept while sampling.

Those of all layers are one array with the layers on axis 0, or a tuple of one array a layer, as the network wants it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

    All sequences of a batch store a block at once, in the same slots, so that no ring is copied for it. `end` is the
    slot after the newest token's. `length` counts the tokens of each sequence since its beginning, so that its next
    token's position is `length` even after the oldest have been overwritten; of what lies in the ring it sees its own
    last `length` tokens. It may be negative: what is appended at negative positions is never seen. A new sequence can
    thus begin with a block that stands for nothing, and be treated like one that goes on.
    """

    keys: Layers
    values: Layers
    length: Int[Array, "b"]
    end: Int[Array, ""]

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[TOKENS]

    @property
    def valid(self) -> Bool[Array, "b S"]:
        """Which slots hold a token of the sequence."""
        return self._age < self.length[:, None]

    @property
    def _age(self) -> Int[Array, "S"]:
        """How many tokens after a slot's own were stored."""
        return (self.end - 1 - jnp.arange(self.capacity)) % max(self.capacity, 1)

    def visible(self, ahead: Int[np.ndarray, "n"]) -> Bool[Array, "b n S"]:
        """Which slots queries see whose blocks begin so many tokens after the newest in the ring.

        None sees more than S tokens before its block: just as if those between had been stored in place of the oldest.
        """
        return self.valid[:, None] & (self._age < self.capacity - ahead[:, None])

    def append(self, block: KVBlock) -> "KVCache":
        """Stores a finished block of every sequence, in place of the oldest once the ring is full.

        The block size must divide the capacity S. S = 0 (one block is the whole context) keeps nothing.
        """
        capacity, size = self.capacity, jax.tree.leaves(block.keys)[0].shape[TOKENS]
        length = self.length + size
        if capacity == 0:
            return dataclasses.replace(self, length=length)
        if capacity % size:
            raise ValueError(f"the block size {size} must divide the cache's capacity {capacity}")
        store = lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, self.end, axis=ring.ndim + TOKENS)
        return self._map(store, block, length, (self.end + size) % capacity)

    def select(self, rows: Bool[Array, "b"], other: "KVCache") -> "KVCache":
        """Takes the sequences `rows` from `other`, whose batch is as large or 1 and whose ring is turned to ours."""

        def choose(ours: Array, theirs: Array) -> Array:
            turned = jnp.roll(theirs, self.end - other.end, axis=theirs.ndim + TOKENS)
            return jnp.where(rows[:, None, None, None], turned, ours)

        return self._map(choose, other, jnp.where(rows, other.length, self.length), self.end)

    def tile(self, batch: int) -> "KVCache":
        """Of batch 1 -> `batch` times the same."""
        repeat = lambda leaf, _: jnp.repeat(leaf, batch, axis=BATCH)
        return self._map(repeat, self, jnp.repeat(self.length, batch), self.end)

    def begin(self, block: KVBlock, length: Int[Array, "1"]) -> "KVCache":
        """An empty ring with the first `length` tokens of a longer block; so many must fit in."""
        write = lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new, 0, axis=ring.ndim + TOKENS)
        return self._map(write, block, length, length[0] % self.capacity)

    def _map(
        self, function: Callable[[Array, Array], Array], other: "KVCache | KVBlock", length: Array, end: Array
    ) -> "KVCache":
        over = lambda ours, theirs: jax.tree.map(function, ours, theirs)
        return KVCache(over(self.keys, other.keys), over(self.values, other.values), length, end)
