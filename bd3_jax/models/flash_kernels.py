"""The kernels of flash.py: a tile of queries over its keys, and a tile of keys under its queries.

A program works on 128 columns, of one head or more; where there are more, a product over all columns with those of the
other heads set to 0 costs what one over 64 does. Scores are transposed, `[keys, queries]`: what belongs to a query lies
along the lanes, and its maximum and sum are taken over the rows, without exchange between lanes. They are to the base
of 2, the factor of which is in the queries.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from bd3_jax.models.tiles import LANES, divide
from bd3_jax.precision import precision_of

HIDDEN = -1e30  # the score of a key that is not visible
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys are visible, and how heads lie.

    Attributes:
      length: L, of each stream.
      block_size: B.
      copies: noised streams, before the clean one; 0: the clean one is all there is.
      head_dim: columns of a head.
      tile: queries and keys at a time, a divisor of L; on TPU a multiple of 128.
      interpret: without the device, for tests.
    """

    length: int
    block_size: int
    copies: int
    head_dim: int
    tile: int
    interpret: bool = False

    @property
    def heads(self) -> int:
        """In 128 columns."""
        return LANES // self.head_dim

    @property
    def tiles(self) -> int:
        """In a stream."""
        return self.length // self.tile

    def scores(self, streams: int) -> int:
        """That are computed for the queries of so many streams, of one head."""
        prefixes = [
            ((end - 1) // self.block_size + (stream >= self.copies)) * self.block_size
            for stream in range(streams)
            for end in range(self.tile, self.length + 1, self.tile)
        ]
        band = min(streams, self.copies) * self.length * LANES
        return sum(-(-prefix // self.tile) * self.tile**2 for prefix in prefixes) + band

    def of(self, index: Array) -> tuple[Array, Array]:
        """Stream of the tile with that index, and where in the stream it begins."""
        stream = jax.lax.div(index, jnp.int32(self.tiles))
        return stream, (index - stream * self.tiles) * self.tile

    def block(self, position: Array) -> Array:
        """Number of the block that holds a position of a stream."""
        return divide(position, self.block_size)

    def prefix(self, position: Array, noised: Array | bool) -> Array:
        """How many clean keys, from the first, a query at that position sees."""
        return (self.block(position) + jnp.where(noised, 0, 1)) * self.block_size


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision_of(a), preferred_element_type=jnp.float32)


def _partner(x: Array, head_dim: int) -> Array:
    """Swaps columns i and i + head_dim / 2 of every head: a product with a permutation, exact and faster than moves."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in range(2))
    return _product(x, (row == (column ^ (head_dim // 2))).astype(x.dtype), (1, 0))


def _rotate(x: Array, cos: Array, sin: Array, head_dim: int) -> Float[Array, "T 128"]:
    return x.astype(jnp.float32) * cos + _partner(x, head_dim) * sin


def _rotate_back(x: Float[Array, "T 128"], cos: Array, sin: Array, head_dim: int) -> Float[Array, "T 128"]:
    return x * cos + _partner(x * sin, head_dim)


def _only(x: Array, head: int, pattern: Pattern) -> Array:
    """The columns of one head, 0 in the others."""
    if pattern.heads == 1:
        return x
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(jax.lax.div(column, jnp.int32(pattern.head_dim)) == head, x, jnp.zeros_like(x))


def _band(pattern: Pattern) -> Array:
    """Which of 128 keys each of as many queries of the same noised stream sees: those of its own block."""
    key, query = (pattern.block(jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis)) for axis in range(2))
    return key == query


def _seen(pattern: Pattern, keys_at: Array, queries_at: Array, noised: Array | bool) -> Array:
    """Which clean keys of a tile each query of another tile sees, from where they begin in their streams."""
    size = pattern.tile
    key = keys_at + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    query = queries_at + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    return key < pattern.prefix(query, noised)


def forward(
    q_ref: Any, k_ref: Any, v_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any, log_sum_ref: Any,
    k_rotated: Any, v_turned: Any, top: Any, total: Any, sums: Any, *, pattern: Pattern,
) -> None:  # fmt: skip
    """A tile of queries over all that it sees, with the softmax's running maximum and sum."""
    index, tile, dim = pl.program_id(2), pattern.tile, pattern.head_dim
    stream, at = pattern.of(index)
    noised = stream < pattern.copies if pattern.copies else False

    @pl.when(index == 0)
    def _() -> None:
        @pl.loop(0, k_ref.shape[1] * pattern.tiles)
        def _(t: Array) -> None:
            stream, at = pattern.of(t)
            own = pl.ds(at, tile)
            rotated = _rotate(k_ref[0, stream, own], cos_ref[own], sin_ref[own], dim)
            k_rotated[pl.ds(t * tile, tile)] = rotated.astype(k_ref.dtype)
            v_turned[t] = v_ref[0, stream, own].T

    own = pl.ds(at, tile)
    queries = _rotate(q_ref[0, 0], cos_ref[own], sin_ref[own], dim) * (LOG2_E * dim**-0.5)
    by_head = [_only(queries, head, pattern).astype(q_ref.dtype) for head in range(pattern.heads)]
    top[...] = jnp.full_like(top, HIDDEN)
    total[...] = jnp.zeros_like(total)
    sums[...] = jnp.zeros_like(sums)

    def visit(keys: Array, values: Array, mask: Array, columns: slice) -> None:
        for head, own_queries in enumerate(by_head):
            rows = slice(head * dim, (head + 1) * dim)
            scores = jnp.where(mask, _product(keys, own_queries[columns], (1, 1)), HIDDEN)
            before = top[head, :, columns]
            now = jnp.maximum(before, scores.max(0, keepdims=True))
            weights, shrink = jnp.exp2(scores - now), jnp.exp2(before - now)
            top[head, :, columns] = now
            total[head, :, columns] = total[head, :, columns] * shrink + weights.sum(0, keepdims=True)
            new = _product(values[rows], weights.astype(values.dtype), (1, 0))
            sums[rows, columns] = sums[rows, columns] * shrink + new

    @pl.when(noised)
    def _() -> None:
        for start in range(0, tile, LANES):
            columns = slice(start, start + LANES)
            keys = k_rotated[pl.ds(index * tile + start, LANES)]
            visit(keys, v_turned[index, :, columns], _band(pattern), columns)

    # One body for all tiles, those that are seen whole included: to mask costs less than to compile two.
    @pl.loop(0, jax.lax.div(pattern.prefix(at + tile - 1, noised) + tile - 1, jnp.int32(tile)))
    def _(t: Array) -> None:
        clean = pattern.copies * pattern.tiles + t
        mask = _seen(pattern, t * tile, at, noised)
        visit(k_rotated[pl.ds(clean * tile, tile)], v_turned[clean], mask, slice(None))

    for head in range(pattern.heads):
        rows = slice(head * dim, (head + 1) * dim)
        sums[rows] = sums[rows] / total[head]
        log_sum_ref[0, 0, 0, head] = (top[head] + jnp.log2(total[head]))[0]
    out_ref[0, 0] = sums[...].T.astype(out_ref.dtype)


def backward(
    q_ref: Any, k_ref: Any, v_ref: Any, cos_ref: Any, sin_ref: Any, out_ref: Any, dout_ref: Any, log_sum_ref: Any,
    dq_ref: Any, dk_ref: Any, dv_ref: Any,
    q_rotated: Any, mean: Any, k_turned: Any, dq_turned: Any, dk: Any, dv: Any, *, pattern: Pattern,
) -> None:  # fmt: skip
    """A tile of keys under all queries that see it; the gradient of the queries grows from tile to tile."""
    index, tile, dim = pl.program_id(2), pattern.tile, pattern.head_dim
    scale, tiles = dim**-0.5, q_ref.shape[1] * pattern.tiles
    stream, at = pattern.of(index)

    @pl.when(index == 0)
    def _() -> None:
        @pl.loop(0, tiles)
        def _(t: Array) -> None:
            stream, at = pattern.of(t)
            own = pl.ds(at, tile)
            queries = _rotate(q_ref[0, stream, own], cos_ref[own], sin_ref[own], dim) * (LOG2_E * scale)
            q_rotated[pl.ds(t * tile, tile)] = queries.astype(q_ref.dtype)
            both = out_ref[0, stream, own].astype(jnp.float32) * dout_ref[0, stream, own].astype(jnp.float32)
            of_head = jnp.concatenate([_only(jnp.ones((1, LANES)), head, pattern) for head in range(pattern.heads)])
            mean[t] = _product(of_head, both, (1, 1))
            dq_turned[t] = jnp.zeros_like(dq_turned[t])

    own = pl.ds(at, tile)
    keys = _rotate(k_ref[0, 0], cos_ref[own], sin_ref[own], dim).astype(k_ref.dtype)
    values = v_ref[0, 0]
    k_turned[...] = keys.T  # in memory: of a value, only parts of which are used in a branch, the compiler complains
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

    def visit(t: Array, mask: Array, place: slice, size: int) -> None:
        (stream, at), start = pattern.of(t), place.start or 0
        queries, grads = q_rotated[pl.ds(t * tile + start, size)], dout_ref[0, stream, pl.ds(at + start, size)]
        for head in range(pattern.heads):
            own_queries, own_grads = _only(queries, head, pattern), _only(grads, head, pattern)
            of_head = slice(head * dim, (head + 1) * dim)
            scores = jnp.where(mask, _product(keys[place], own_queries, (1, 1)), HIDDEN)
            weights = jnp.exp2(scores - log_sum_ref[0, 0, t, head : head + 1, place])
            dv[place] += _product(weights.astype(grads.dtype), own_grads, (1, 0))
            dweights = _product(values[place], own_grads, (1, 1))
            dscores = (weights * (dweights - mean[t, head : head + 1, place])).astype(queries.dtype)
            dk[place] += _product(dscores, own_queries, (1, 0))
            dq_turned[t, of_head, place] += _product(k_turned[of_head, place], dscores, (1, 0))

    @pl.when(stream < pattern.copies if pattern.copies else False)
    def _() -> None:
        for start in range(0, tile, LANES):
            visit(index, _band(pattern), slice(start, start + LANES), LANES)

    @pl.when(stream == pattern.copies)
    def _() -> None:
        @pl.loop(0, q_ref.shape[1])
        def _(reading: Array) -> None:
            noised = reading < pattern.copies
            # From the first query whose prefix reaches beyond the tile's first key to the stream's end.
            seen_from = (pattern.block(at) + jnp.where(noised, 1, 0)) * pattern.block_size

            @pl.loop(jax.lax.div(seen_from, jnp.int32(tile)), pattern.tiles)
            def _(t: Array) -> None:
                visit(reading * pattern.tiles + t, _seen(pattern, at, t * tile, noised), slice(None), tile)

    dk_ref[0, 0] = _rotate_back(dk[...] / LOG2_E, cos_ref[own], sin_ref[own], dim).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)

    @pl.when(index == pl.num_programs(2) - 1)
    def _() -> None:
        @pl.loop(0, tiles)
        def _(t: Array) -> None:
            stream, at = pattern.of(t)
            own = pl.ds(at, tile)
            grads = _rotate_back(dq_turned[t].T * scale, cos_ref[own], sin_ref[own], dim)
            dq_ref[0, stream, own] = grads.astype(dq_ref.dtype)
