"""The patterns on TPU by splash attention: tiles of the scores in which nothing is visible are never visited.

The streams lie one after the other in one sequence, whose mask the kernel computes from the positions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, QKVLayout, make_splash_mha
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from bd3_jax.models.chunked import RESIDUALS
from bd3_jax.models.mesh import BATCH_AXES, is_meshed, tensor_axis
from bd3_jax.models.tiles import divide, tile_size

Heads = Float[Array, "b h L k"]
Visible = Callable[[Array, Array], Array]


def block_causal(block_size: int) -> Visible:
    """Of (queries, keys), positions in one stream: which are visible."""
    return lambda q, k: divide(q, block_size) >= divide(k, block_size)


def block_diffusion(length: int, block_size: int, copies: int = 1) -> Visible:
    """The same in the noised copies and x0; see `attention.block_diffusion_mask`."""

    def visible(q: Array, k: Array) -> Array:
        own = divide(q, block_size) == divide(k, block_size)  # streams end where blocks do
        in_stream = q - sum((q >= n * length) * length for n in range(1, copies + 1))
        clean = k - copies * length  # negative for keys of the noised copies
        return own | ((clean >= 0) & (divide(in_stream, block_size) > divide(clean, block_size)))

    return visible


def attend(q: Heads, k: Heads, v: Heads, visible: Visible, tile: int, interpret: bool) -> Heads:
    """Softmax attention over the visible keys, of which every query has one.

    On a mesh (see mesh.py) each device computes its own rows and heads.

    Args:
      q: more, fewer or as many queries as keys, in numbers that are multiples of 128.
      k: keys.
      v: values.
      visible: see above.
      tile: queries and keys of a tile, at most; rounded down to a divisor of the length, a multiple of 128.
      interpret: without a TPU, for tests.
    """
    run = functools.partial(_attend, visible=visible, tile=tile, interpret=interpret)
    if not is_meshed():
        return run(q, k, v)
    split = PartitionSpec(BATCH_AXES, tensor_axis(q.shape[1]))
    return jax.shard_map(run, in_specs=(split, split, split), out_specs=split, check_vma=False)(q, k, v)


def _attend(q: Heads, k: Heads, v: Heads, visible: Visible, tile: int, interpret: bool) -> Heads:
    tile_q, tile_k = (tile_size(x.shape[2], tile) for x in (q, k))
    sizes = BlockSizes(
        block_q=tile_q, block_kv=tile_k, block_q_dkv=tile_q, block_kv_dkv=tile_k, block_q_dq=tile_q, block_kv_dq=tile_k,
        q_layout=QKVLayout.SEQ_MINOR, k_layout=QKVLayout.SEQ_MINOR, v_layout=QKVLayout.SEQ_MINOR,
    )  # fmt: skip
    mask = _Pattern((q.shape[2], k.shape[2]), visible)
    kernel = make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    # It does not scale the scores. In bfloat16 this rounds q once more, but for head widths that are a power of 4.
    return jax.vmap(kernel)(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v)


class _Pattern(masks._ComputableMask):
    """The same for all heads, which the kernel finds out by comparing. JAX 0.10 has no public class for it."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)
