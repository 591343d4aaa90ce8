"""Attention patterns, each drawn, and the backends that compute them.

| who | pattern | function |
| --- | --- | --- |
| MDLM, SEDD | all to all | `block_causal`, B = L |
| AR | causal | `block_causal`, B = 1 |
| BD3-LM while sampling without a cache | block-causal | `block_causal` |
| BD3-LM in training and likelihood | noised and clean stream | `block_diffusion` |
| BD3-LM and AR while sampling with a cache | newest blocks over everything cached | `cached` |

On TPU flash.py computes those of the network's passes where it can, rotation included, on operands of its own.
platform.py decides which backend computes them.

Operands here are `[b, h, L, head_dim]`, in which products on CPU are faster than in `[b, L, h, head_dim]`. Softmax is
in float32.
"""

import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bd3_jax.models import chunked, splash, triton
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.tiles import LANES
from bd3_jax.precision import precision_of

Heads = Float[Array, "b h L k"]
Streams = Float[Array, "b h s L k"]


def block_causal_mask(length: int, block_size: int) -> Bool[np.ndarray, "L L"]:
    """Queries see their own block and earlier ones. L = 4, B = 2 (rows are queries):

    1 1 0 0
    1 1 0 0
    1 1 1 1
    1 1 1 1
    """
    block = np.arange(length) // block_size
    return block[:, None] >= block[None, :]


def block_diffusion_mask(length: int, block_size: int, copies: int = 1) -> Bool[np.ndarray, "S S"]:
    """The mask over [xt ; x0] (Block Diffusion, section 3.1 and appendix B.6), S = 2L. L = 4, B = 2:

       xt        x0
    1 1 0 0 | 0 0 0 0
    1 1 0 0 | 0 0 0 0      a noised query sees the noised tokens of its own block
    0 0 1 1 | 1 1 0 0      and the clean tokens of earlier blocks;
    0 0 1 1 | 1 1 0 0
    --------+--------
    0 0 0 0 | 1 1 0 0
    0 0 0 0 | 1 1 0 0      a clean query sees the clean tokens of its own
    0 0 0 0 | 1 1 1 1      and of earlier blocks.
    0 0 0 0 | 1 1 1 1

    Several noised copies, [xt_1 ; xt_2 ; ... ; x0], do not see each other.
    """
    block = np.arange(length) // block_size
    query, key = block[:, None], block[None, :]
    nothing = np.zeros((length, length), bool)
    noised = [
        [*(query == key if other == copy else nothing for other in range(copies)), query > key]
        for copy in range(copies)
    ]
    return np.block([*noised, [*[nothing] * copies, query >= key]])


class Backend(Protocol):
    """One way to compute the patterns. All backends agree in values and gradients up to rounding."""

    def block_causal(self, q: Heads, k: Heads, v: Heads, block_size: int) -> Heads:
        """Softmax attention under `block_causal_mask`."""

    def block_diffusion(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        """Softmax attention under `block_diffusion_mask`; the last stream of k and v is clean, those before are noised.

        q holds all streams, or the noised ones alone, and the result has the streams of q.
        """


def softmax_attention(q: Heads, k: Heads, v: Heads, mask: Bool[Array | np.ndarray, "..."] | None = None) -> Heads:
    """softmax(q k^T / sqrt(head_dim)) v, with -inf where the mask (broadcast over `[b, h, Lq, Lk]`) is false."""
    scores = chunked.product("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v, precision=precision_of(v))


def cached(
    q: Heads,
    k: Heads,
    v: Heads,
    cache_k: Float[Array, "b h S k"],
    cache_v: Float[Array, "b h S k"],
    old: Bool[Array, "b #Lq S"],
    own: Bool[Array, "b Lq Lk"] | None = None,
) -> Heads:
    """Queries attend to the entries of the cache that `old` allows, and to those of `k` that `own` does; None: to all.

    One softmax over both, which are not laid side by side.
    """
    parts = [(cache_k, cache_v, old[:, None]), (k, v, None if own is None else own[:, None])]
    scores = []
    for keys, _, seen in parts:
        score = chunked.product("bhqd,bhkd->bhqk", q, keys) * q.shape[-1] ** -0.5
        scores.append(score if seen is None else jnp.where(seen, score, -jnp.inf))
    # A query sees itself, so its largest score is finite.
    top = functools.reduce(jnp.maximum, [score.max(-1, keepdims=True, initial=-jnp.inf) for score in scores])
    total, out = jnp.zeros(()), jnp.zeros(())
    for (_, values, _), score in zip(parts, scores, strict=True):
        weights = jnp.exp(score - top)
        total += weights.sum(-1, keepdims=True)
        out += chunked.product("bhqk,bhkd->bhqd", weights.astype(v.dtype), values)
    return (out / total).astype(v.dtype)


class Dense:
    """The plain masked softmax, over `[L, L]` or `[2L, 2L]`: the yardstick of the other backends."""

    def block_causal(self, q: Heads, k: Heads, v: Heads, block_size: int) -> Heads:
        return softmax_attention(q, k, v, block_causal_mask(q.shape[2], block_size))

    def block_diffusion(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        mask = block_diffusion_mask(q.shape[3], block_size, k.shape[2] - 1)[: q.shape[2] * q.shape[3]]
        return softmax_attention(_joined(q), _joined(k), _joined(v), mask).reshape(q.shape)


def _joined(streams: Streams) -> Heads:
    """One sequence, the streams one after the other."""
    return streams.reshape(*streams.shape[:2], -1, streams.shape[-1])


class Decomposed:
    """Chunks of queries, each over the keys that its blocks can see: `chunked.attend`."""

    def __init__(self, chunk: int):
        self.chunk = chunk

    def block_causal(self, q: Heads, k: Heads, v: Heads, block_size: int) -> Heads:
        return chunked.attend(q, chunked.KV(k, v), None, block_size, self.chunk)

    def block_diffusion(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        *noised, clean = (chunked.KV(k[:, :, stream], v[:, :, stream]) for stream in range(k.shape[2]))
        own = [*noised, None][: q.shape[2]]
        streams = [chunked.attend(q[:, :, n], clean, kv, block_size, self.chunk) for n, kv in enumerate(own)]
        return jnp.stack(streams, axis=2)


class Splash:
    """On TPU, for lengths that are multiples of 128; `interpret` runs it elsewhere, slowly."""

    def __init__(self, tile: int, interpret: bool = False):
        self.tile, self.interpret = tile, interpret

    def block_causal(self, q: Heads, k: Heads, v: Heads, block_size: int) -> Heads:
        return splash.attend(q, k, v, splash.block_causal(block_size), self.tile, self.interpret)

    def block_diffusion(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        visible = splash.block_diffusion(q.shape[3], block_size, k.shape[2] - 1)
        return splash.attend(_joined(q), _joined(k), _joined(v), visible, self.tile, self.interpret).reshape(q.shape)


class Triton:
    """On GPUs, where `triton.supports` it; `interpret` runs it elsewhere, slowly."""

    def __init__(self, tile: int, interpret: bool = False):
        self.tile, self.interpret = tile, interpret

    def _attend(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        length, head_dim = q.shape[3:]
        tile = triton.tile_size(length, self.tile)
        pattern = Pattern(length, block_size, k.shape[2] - 1, head_dim, tile, self.interpret)
        return triton.attend(q, k, v, pattern)

    def block_causal(self, q: Heads, k: Heads, v: Heads, block_size: int) -> Heads:
        return self._attend(q[:, :, None], k[:, :, None], v[:, :, None], block_size)[:, :, 0]

    def block_diffusion(self, q: Streams, k: Streams, v: Streams, block_size: int) -> Streams:
        return self._attend(q, k, v, block_size)


@functools.cache
def get_backend(name: Literal["dense", "decomposed", "splash", "flash", "triton"], chunk: int, length: int) -> Backend:
    """`chunk`: queries at a time. What `flash` does not take is splash, and what no kernel takes is decomposed."""
    if name in ("flash", "splash") and length % LANES == 0:
        return Splash(chunk)
    if name == "triton" and triton.tile_size(length, chunk) >= triton.LEAST:
        return Triton(chunk)
    return Dense() if name == "dense" else Decomposed(chunk)
