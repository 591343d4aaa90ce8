"""The kernels of triton.py: a tile of queries over its keys, and a tile of keys under its queries.

What a position sees of a stream, or is seen by, is a range of it; over the tiles of those ranges all kernels loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from bd3_jax.models.chunked import product
from bd3_jax.models.flash_kernels import HIDDEN, LOG2_E, Pattern
from bd3_jax.models.tiles import divide

Span = tuple[Any, Any]


def _keys(pattern: Pattern, query: Any, stream: Any, other: Any) -> Span:
    """[low, high) of the keys in stream `other`, its own or the clean one, that a query at that position sees."""
    own, clean = pattern.block(query) * pattern.block_size, other == pattern.copies
    return own * (1 - clean), own + pattern.block_size * (1 - clean * (stream < pattern.copies))


def _queries(pattern: Pattern, key: Any, stream: Any, other: Any) -> Span:
    """[low, high) of the queries in stream `other` that see a key at that position, if any there see its stream."""
    own, clean = pattern.block(key) * pattern.block_size, stream == pattern.copies
    after = own + pattern.block_size
    return own + pattern.block_size * (clean * (other < pattern.copies)), after + clean * (pattern.length - after)


def _tiles(pattern: Pattern, span: Callable[..., Span], at: Any, stream: Any, other: Any) -> Span:
    """The tiles of stream `other`, [first, last), that hold what is seen from or by the tile at that position."""
    low, _ = span(pattern, at, stream, other)
    _, high = span(pattern, at + pattern.tile - 1, stream, other)
    return divide(low, pattern.tile), divide(high + pattern.tile - 1, pattern.tile)


def visited(pattern: Pattern, streams: int) -> int:
    """Scores that are computed for the queries of so many streams, of one head."""
    at = np.arange(0, pattern.length, pattern.tile)
    pairs = [(stream, other) for stream in range(streams) for other in {stream, pattern.copies}]
    bounds = [_tiles(pattern, _keys, at, *pair) for pair in pairs]
    return sum(int((last - first).sum()) for first, last in bounds) * pattern.tile**2


def _visit(
    pattern: Pattern, span: Callable[..., Span], others: Callable[[Any], tuple[Any, Any, Any]],
    body: Callable[..., Any], carry: Any,
) -> Any:  # fmt: skip
    """Runs `body(stream, place, visible, carry)` for every tile that this program's tile sees, or is seen by.

    `others`: from the tile's stream, how many streams there are to look at, as a range, and the n-th of them.
    """
    stream, at = pattern.of(pl.program_id(0))
    ours = at + jnp.arange(pattern.tile)
    begin, end, choose = others(stream)

    def over_stream(n: Array, carry: Any) -> Any:
        other = choose(n)
        low, high = span(pattern, ours, stream, other)

        def over_tile(t: Array, carry: Any) -> Any:
            theirs = t * pattern.tile + jnp.arange(pattern.tile)
            visible = (low[:, None] <= theirs) & (theirs < high[:, None])
            return body(other, pl.ds(t * pattern.tile, pattern.tile), visible, carry)

        return jax.lax.fori_loop(*_tiles(pattern, span, at, stream, other), over_tile, carry)

    return jax.lax.fori_loop(begin, end, over_stream, carry)


def _over_keys(pattern: Pattern, body: Callable[..., Any], carry: Any) -> Any:
    """Over what the queries of a tile see: of their own stream, and of the clean one."""
    others = lambda own: (0, 1 + (own < pattern.copies), lambda n: jnp.where(n == 0, own, pattern.copies))
    return _visit(pattern, _keys, others, body, carry)


def _over_queries(pattern: Pattern, streams: int, body: Callable[..., Any], carry: Any) -> Any:
    """Over what sees the keys of a tile: noised ones queries of their own stream, clean ones those of all."""

    def others(own: Array) -> tuple[Array, Array, Callable[[Array], Array]]:
        clean = own == pattern.copies
        return jnp.where(clean, 0, own), jnp.where(clean, streams, own + 1), lambda n: n

    return _visit(pattern, _queries, others, body, carry)


def _scores(pattern: Pattern, ours: Array, theirs: Array, visible: Array) -> Float[Array, "T T"]:
    raw = product("id,jd->ij", ours, theirs)
    return jnp.where(visible, raw * (LOG2_E * pattern.head_dim**-0.5), HIDDEN)


def forward(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, *, pattern: Pattern) -> None:
    """A tile of queries over all that it sees, with the softmax's running maximum and sum."""
    q, size = q_ref[...], pattern.tile

    def body(stream: Array, keys: Any, visible: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        scores = _scores(pattern, q, k_ref[stream, keys], visible)
        now = jnp.maximum(top, scores.max(1))
        # A query that sees nothing of the first tiles gives them weights of 1, which shrink to 0 when it sees a key.
        weights, shrink = jnp.exp2(scores - now[:, None]), jnp.exp2(top - now)
        new = product("qk,kd->qd", weights.astype(q.dtype), v_ref[stream, keys])
        return now, total * shrink + weights.sum(1), out * shrink[:, None] + new

    begin = jnp.full(size, HIDDEN), jnp.zeros(size), jnp.zeros((size, pattern.head_dim))
    top, total, out = _over_keys(pattern, body, begin)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_sum_ref[...] = top + jnp.log2(total)


def backward_queries(
    q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, log_sum_ref: Any, delta_ref: Any, dq_ref: Any,
    *, pattern: Pattern,
) -> None:  # fmt: skip
    """The gradient of a tile of queries."""
    q, dout, log_sum, delta = q_ref[...], dout_ref[...], log_sum_ref[...][:, None], delta_ref[...][:, None]

    def body(stream: Array, keys: Any, visible: Array, dq: Array) -> Array:
        k = k_ref[stream, keys]
        weights = jnp.exp2(_scores(pattern, q, k, visible) - log_sum)
        dscores = weights * (product("qd,kd->qk", dout, v_ref[stream, keys]) - delta)
        return dq + product("qk,kd->qd", dscores.astype(k.dtype), k)

    dq = _over_keys(pattern, body, jnp.zeros((pattern.tile, pattern.head_dim)))
    dq_ref[...] = (dq * pattern.head_dim**-0.5).astype(dq_ref.dtype)


def backward_keys(
    q_ref: Any, k_ref: Any, v_ref: Any, dout_ref: Any, log_sum_ref: Any, delta_ref: Any, dk_ref: Any, dv_ref: Any,
    *, pattern: Pattern,
) -> None:  # fmt: skip
    """The gradients of a tile of keys and values; scores are transposed, `[keys, queries]`."""
    k, v = k_ref[...], v_ref[...]

    def body(stream: Array, queries: Any, visible: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = carry
        q, dout = q_ref[stream, queries], dout_ref[stream, queries]
        weights = jnp.exp2(_scores(pattern, k, q, visible) - log_sum_ref[stream, queries])
        dscores = weights * (product("kd,qd->kq", v, dout) - delta_ref[stream, queries])
        dk += product("kq,qd->kd", dscores.astype(q.dtype), q)
        return dk, dv + product("kq,qd->kd", weights.astype(dout.dtype), dout)

    zeros = jnp.zeros((pattern.tile, pattern.head_dim))
    dk, dv = _over_queries(pattern, q_ref.shape[0], body, (zeros, zeros))
    dk_ref[...] = (dk * pattern.head_dim**-0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)
