"""Keys and values of finished, clean tokens, kept while sampling."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVBlock:
    """Keys (rotated to their positions) and values of some tokens, for all layers."""

    keys: Float[Array, "layers b h B k"]
    values: Float[Array, "layers b h B k"]

    def first(self, size: int) -> "KVBlock":
        """Those of the first `size` tokens."""
        return KVBlock(self.keys[:, :, :, :size], self.values[:, :, :, :size])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A ring of S tokens of context for each sequence: shapes never change, and a slide overwrites the oldest block.

    Position p of the sequence lies in slot p mod S. `length` counts the tokens stored since the beginning, so that the
    next token's position is `length` even after the oldest have been overwritten. It may be negative: what is appended
    at negative positions is never seen. A new sequence can thus begin with a block that stands for nothing, and be
    treated like one that goes on.
    """

    keys: Float[Array, "layers b h S k"]
    values: Float[Array, "layers b h S k"]
    length: Int[Array, "b"]

    @property
    def valid(self) -> Bool[Array, "b S"]:
        """Which slots hold a token."""
        return jnp.arange(self.keys.shape[3])[None, :] < self.length[:, None]

    def append(self, block: KVBlock) -> "KVCache":
        """Stores a finished block of every sequence, in place of its oldest block once the ring is full.

        The block size must divide the capacity S. S = 0 (one block is the whole context) keeps nothing.
        """
        capacity, size = self.keys.shape[3], block.keys.shape[3]
        length = self.length + size
        if capacity == 0:
            return KVCache(self.keys, self.values, length)
        if capacity % size:
            raise ValueError(f"the block size {size} must divide the cache's capacity {capacity}")
        start = self.length % capacity  # of negative lengths too

        def store(ring: Float[Array, "layers h S k"], new: Float[Array, "layers h B k"], at: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(ring, new, at, axis=2)

        over_batch = jax.vmap(store, in_axes=(1, 1, 0), out_axes=1)
        return KVCache(over_batch(self.keys, block.keys, start), over_batch(self.values, block.values, start), length)

    def select(self, rows: Bool[Array, "b"], other: "KVCache") -> "KVCache":
        """Takes the sequences `rows` from `other`, whose batch is as large or 1."""

        def choose(ours: Array, theirs: Array, axis: int) -> Array:
            return jnp.where(rows.reshape(*[1] * axis, -1, *[1] * (ours.ndim - axis - 1)), theirs, ours)

        return KVCache(
            choose(self.keys, other.keys, 1), choose(self.values, other.values, 1), choose(self.length, other.length, 0)
        )
