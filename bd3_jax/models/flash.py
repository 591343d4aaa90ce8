"""The patterns on TPU by kernels of our own, which also rotate queries and keys.

Splash attention takes any mask, and heads one after the other. Here the streams are known: the clean one is
block-causal over L, a noised one sees a prefix of it and its own block. So what a tile of queries sees is a range of
clean tiles and, for noised queries, a band of 128 along the diagonal; nothing is looked up, and fewer tiles are visited
than in one sequence of all streams. The backward pass is one kernel in place of two: scores are computed once for all
gradients.

Operands lie as the projections leave them, `[b, s, L, d]` with the heads side by side. By themselves heads of 64 would
fill half of every register and twice their size of memory, and arrays of heads first would be copies.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from bd3_jax.models.chunked import RESIDUALS
from bd3_jax.models.flash_kernels import Pattern, backward, forward
from bd3_jax.models.mesh import BATCH_AXES, is_meshed, parts, tensor_axis
from bd3_jax.models.tiles import LANES

VMEM = 48 * 2**20
"""Bytes that a kernel may take of the memory beside the cores, of which v5p has least, 64 MiB."""

Streams = Float[Array, "b s L d"]
Rotary = tuple[Float[Array, "L k/2"], Float[Array, "L k/2"]]


def supports(length: int, heads: int, head_dim: int, block_size: int, copies: int, dtype: jnp.dtype) -> bool:
    """Whether registers are full, a band of noised queries has whole blocks, and the rows of 128 columns fit.

    On a mesh it is asked for the heads that each device has. `dtype`: of the operands.
    """
    width = heads // parts(heads) * head_dim
    full = length % LANES == 0 and width % LANES == 0 and LANES % head_dim == 0
    # Of the backward kernel: queries, results and their gradients, twice, to load the next while computing; rotated
    # queries, and their gradient in float32 and, twice, as it leaves; the rotation's tables.
    needed = (copies + 1) * length * LANES * (dtype.itemsize * (3 * 2 + 1 + 2) + 4) + 2 * 2 * length * LANES * 4
    return full and (copies == 0 or LANES % block_size == 0) and needed < 0.9 * VMEM


def attend(q: Streams, k: Streams, v: Streams, rotary: Rotary, pattern: Pattern) -> Streams:
    """Softmax attention of rotated queries and keys.

    On a mesh (see mesh.py) each device computes its own rows and heads.

    Args:
      q: all streams, noised ones before the clean one, or the noised ones alone; not rotated.
      k: of all streams; not rotated.
      v: values.
      rotary: cosines and sines of every position of a stream.
      pattern: which keys are visible, and how heads lie.
    """
    run: Callable[..., Streams] = lambda q, k, v, rotary: _attend(q, k, v, rotary, pattern)
    if is_meshed():
        own = PartitionSpec(BATCH_AXES, None, None, tensor_axis(q.shape[-1] // pattern.head_dim))
        run = jax.shard_map(run, in_specs=(own, own, own, PartitionSpec()), out_specs=own, check_vma=False)
    return run(q, k, v, rotary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Streams, k: Streams, v: Streams, rotary: Rotary, pattern: Pattern) -> Streams:
    return _forward(q, k, v, rotary, pattern)[0]


def _tables(rotary: Rotary, heads: int) -> tuple[Float[Array, "L 128"], Float[Array, "L 128"]]:
    """Cosines and signed sines of every column: x rotated is x cos + partner(x) sin, see `flash_kernels`."""
    cos, sin = rotary
    cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
    return jnp.tile(cos, heads), jnp.tile(sin, heads)


def _call(
    kernel: Any, products: int, grid: tuple[int, ...], ins: list[Any], outs: list[Any], scratch: list[Any],
    pattern: Pattern,
) -> Any:  # fmt: skip
    """`ins`: (array, block spec); `outs`: (shape, dtype, block spec). Each score is in so many `products`."""
    arrays = [array for array, _ in ins]
    made = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outs]
    scores = grid[0] * grid[1] * pattern.heads * pattern.scores(arrays[0].shape[1])
    cost = pl.CostEstimate(
        flops=2 * products * pattern.head_dim * scores,
        transcendentals=scores,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in [*arrays, *made]),
    )
    return pl.pallas_call(
        functools.partial(kernel, pattern=pattern),
        grid=grid,
        in_specs=[spec for _, spec in ins],
        out_specs=[spec for *_, spec in outs],
        out_shape=made,
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost,
        interpret=pattern.interpret,
        name=f"flash_{kernel.__name__}",
    )(*arrays)


def _specs(streams: int, pattern: Pattern) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of 128 columns: a tile of a stream, and all streams; and a table of the rotation."""
    # Not // and %, whose treatment of signs has no lowering for absent devices.
    tile_of = lambda i: (jax.lax.div(i, pattern.tiles), jax.lax.rem(i, pattern.tiles))
    one = pl.BlockSpec((1, 1, pattern.tile, LANES), lambda b, h, i: (b, *tile_of(i), h))
    every = pl.BlockSpec((1, streams, pattern.length, LANES), lambda b, h, i: (b, 0, 0, h))
    return one, every, pl.BlockSpec((pattern.length, LANES), lambda b, h, i: (0, 0))


def _forward(
    q: Streams, k: Streams, v: Streams, rotary: Rotary, pattern: Pattern
) -> tuple[Streams, tuple[Streams, Streams, Streams, Rotary, Streams, Array]]:
    heads, tile, f32 = pattern.heads, pattern.tile, jnp.float32
    batch, groups = q.shape[0], q.shape[-1] // LANES
    tiles, of_keys = q.shape[1] * pattern.tiles, k.shape[1] * pattern.tiles
    one, every, table = _specs(k.shape[1], pattern)
    log_sum = ((batch, groups, tiles, heads, tile), f32)
    out, log_sum = _call(
        forward, 2,
        (batch, groups, tiles),
        [(q, one), (k, every), (v, every), *((x, table) for x in _tables(rotary, heads))],
        [(q.shape, q.dtype, one), (*log_sum, pl.BlockSpec((1, 1, 1, heads, tile), lambda b, h, i: (b, h, i, 0, 0)))],
        [
            ((of_keys * tile, LANES), k.dtype), ((of_keys, LANES, tile), v.dtype),
            ((heads, 1, tile), f32), ((heads, 1, tile), f32), ((LANES, tile), f32),
        ],
        pattern,
    )  # fmt: skip
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (q, k, v, rotary, out, log_sum)


def _backward(pattern: Pattern, residuals: Any, dout: Streams) -> tuple[Streams, Streams, Streams, None]:
    q, k, v, rotary, out, log_sum = residuals
    heads, tile, f32 = pattern.heads, pattern.tile, jnp.float32
    batch, groups = q.shape[0], q.shape[-1] // LANES
    tiles, of_keys = q.shape[1] * pattern.tiles, k.shape[1] * pattern.tiles
    one, every, table = _specs(q.shape[1], pattern)
    dq, dk, dv = _call(
        backward, 5,
        (batch, groups, of_keys),
        [
            (q, every), (k, one), (v, one), *((x, table) for x in _tables(rotary, heads)),
            (out, every), (dout, every),
            (log_sum, pl.BlockSpec((1, 1, tiles, heads, tile), lambda b, h, i: (b, h, 0, 0, 0))),
        ],
        [(q.shape, q.dtype, every), (k.shape, k.dtype, one), (v.shape, v.dtype, one)],
        [
            ((tiles * tile, LANES), q.dtype), ((tiles, heads, tile), f32), ((LANES, tile), k.dtype),
            ((tiles, LANES, tile), f32), ((tile, LANES), f32), ((tile, LANES), f32),
        ],
        pattern,
    )  # fmt: skip
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)
