"""The patterns on GPUs by Pallas kernels that Triton compiles: tiles of scores in which nothing is visible are skipped.

No GPU has run these kernels yet. In the interpreter they agree with the plain masked softmax, values and gradients, and
they compile for an H100; how fast they are there, nobody has seen. So they are an option, `model.attention=triton`, and
not what GPUs take by themselves.

A noised query sees its own block of its own stream and a prefix of the clean one, a clean query a prefix of the clean
one: a range of each stream, whose tiles are visited and no others. Noised copies may be several; the clean half's keys
are read by all of them. As in FlashAttention-2 (Dao, 2023) the forward pass keeps the log-sum-exp of every query, and
two kernels of the backward pass compute the probabilities again: one for the queries, one for keys and values.

What the compiler for an H100 says of one layer, forward and backward (L = 1,024, B = 4, 12 heads of 64, bfloat16; bytes
moved count what a kernel reads and writes once, though it may read it again):

| | temporaries, 4 rows | 16 rows | moved, 4 rows | 16 rows | scores |
| --- | --- | --- | --- | --- | --- |
| decomposed, chunks of 256 | 459 MiB | 1,657 MiB | 4.4 GB | 17.4 GB | 0.37 |
| cuDNN, the mask as a bias of [2L, 2L] | 8 MiB | 10 MiB | 0.18 GB | 0.63 GB | 1 |
| these kernels, tiles of 64 | 0.8 MiB | 3.0 MiB | 0.22 GB | 0.87 GB | 0.28 |

cuDNN computes all scores, also those that nobody sees, and JAX has it compute a gradient of the bias that nobody reads.
What memory it takes beside, and whether it takes the shapes at all, it says on a device alone. Of a training step of
`configs/owt.py:bd3lm,block_size=4` with 4 rows, temporaries are 3.16 GiB with these kernels and 3.58 GiB without, and
57 GB are moved in place of 116. In tiles of 64 no kernel spills registers; in tiles of 128 the backward ones do.

Operands are heads first, `[b, h, s, L, k]`, products in their dtype with float32 sums; the softmax is in float32, to
the base of 2.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from bd3_jax.models.chunked import RESIDUALS
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.mesh import BATCH_AXES, is_meshed, tensor_axis
from bd3_jax.models.tiles import divide
from bd3_jax.models.triton_kernels import backward_keys, backward_queries, forward, visited

LEAST = 16
"""Rows and columns of the smallest product that Triton has."""

Streams = Float[Array, "b h s L k"]


def tile_size(length: int, most: int) -> int:
    """The largest power of two up to `most` that divides L; all arrays in a kernel have sides of that kind."""
    return math.gcd(length, 1 << (most.bit_length() - 1))


def supports(length: int, head_dim: int, most: int) -> bool:
    """Whether tiles of L, of at most `most`, and heads are large enough for products, and heads a power of two."""
    return tile_size(length, most) >= LEAST and tile_size(head_dim, head_dim) == head_dim >= LEAST


def attend(q: Streams, k: Streams, v: Streams, pattern: Pattern) -> Streams:
    """Softmax attention over the visible keys.

    On a mesh (see mesh.py) each device computes its own rows and heads.

    Args:
      q: all streams, noised ones before the clean one, or the noised ones alone.
      k: of all streams.
      v: values.
      pattern: which keys are visible; its tile is a power of two that divides L.
    """
    run: Callable[..., Streams] = lambda q, k, v: _attend(q, k, v, pattern)
    if is_meshed():
        own = PartitionSpec(BATCH_AXES, tensor_axis(q.shape[1]))
        run = jax.shard_map(run, in_specs=(own, own, own), out_specs=own, check_vma=False)
    return run(q, k, v)


def _call(
    kernel: Any, products: int, tiled: list[int], ins: list[Array], outs: list[jax.ShapeDtypeStruct], pattern: Pattern
) -> list[Array]:
    """Runs a kernel for every tile of every head; each score is in so many `products`.

    Of its operands a program has all streams of a head, of those in the places `tiled` and of results a tile.
    """

    def tile(x: Any) -> pl.BlockSpec:
        rest = x.shape[4:]

        def place(i: Array, h: Array, b: Array) -> tuple[Any, ...]:
            stream, at = pattern.of(i)
            return b, h, stream, divide(at, pattern.tile), *[0] * len(rest)

        return pl.BlockSpec((None, None, None, pattern.tile, *rest), place)

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, h, b: (b, h, *[0] * (x.ndim - 2)))

    arrays: list[Any] = [*ins, *outs]
    batch, heads, streams, _, width = ins[0].shape
    scores = batch * heads * visited(pattern, streams)
    return pl.pallas_call(
        functools.partial(kernel, pattern=pattern),
        grid=(outs[0].shape[2] * pattern.tiles, heads, batch),
        in_specs=[tile(x) if place in tiled else whole(x) for place, x in enumerate(ins)],
        out_specs=[tile(x) for x in outs],
        out_shape=outs,
        compiler_params=pallas_triton.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * width * scores,
            transcendentals=scores,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        interpret=pattern.interpret,
        name=f"triton_{kernel.__name__}",
    )(*ins)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Streams, k: Streams, v: Streams, pattern: Pattern) -> Streams:
    return _forward(q, k, v, pattern)[0]


def _forward(q: Streams, k: Streams, v: Streams, pattern: Pattern) -> tuple[Streams, tuple[Array, ...]]:
    made = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)]
    out, log_sum = (checkpoint_name(x, RESIDUALS) for x in _call(forward, 2, [0], [q, k, v], made, pattern))
    return out, (q, k, v, out, log_sum)


def _backward(pattern: Pattern, residuals: tuple[Array, ...], dout: Streams) -> tuple[Streams, Streams, Streams]:
    q, k, v, out, log_sum = residuals
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    ins, like = [q, k, v, dout, log_sum, delta], lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    (dq,) = _call(backward_queries, 3, [0, 3, 4, 5], ins, [like(q)], pattern)
    dk, dv = _call(backward_keys, 4, [1, 2], ins, [like(k), like(v)], pattern)
    return dq, dk, dv


_attend.defvjp(_forward, _backward)
