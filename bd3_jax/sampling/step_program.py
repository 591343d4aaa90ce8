"""The program of one step of `drawing.Slots`: some blocks of every sequence of a batch, compiled ahead of time."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from bd3_jax.models.kv_cache import BATCH, KVCache
from bd3_jax.models.network import AnyParams, Params
from bd3_jax.sampling.block import Filled
from bd3_jax.sampling.contexts import Memory
from bd3_jax.sampling.sampler import Sampler, sequence_keys
from bd3_jax.sharding import abstract_arrays, by_rows, spec


def abstract_weights(sampler: Sampler, params: Params) -> AnyParams:
    """Shapes and shardings of `Sampler.freeze`, given those of the parameters; the devices need not be there."""
    lowered = jax.jit(sampler.freeze).lower(params)
    return abstract_arrays(lowered.out_info, lowered.compile().output_shardings)


def trace_step(
    sampler: Sampler, weights: AnyParams, batch: int, blocks: int, sharding: NamedSharding | None = None
) -> jax.stages.Traced:
    """The program of one step of `Slots`: (weights, memory, and its other inputs) -> (memory, `Filled`).

    Nothing is allocated: `weights` may be shapes with their shardings, and the devices need not be there.

    Args:
      sampler: what draws.
      weights: the parameters of its model, frozen.
      batch: sequences.
      blocks: that are drawn of each.
      sharding: of a batch of rows, where `weights` are spread over a mesh.
    """
    memory = abstract_memory(sampler, weights, batch, sharding)
    shardings: Any = None
    if sharding is not None:
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        shardings = jax.tree.map(lambda leaf: leaf.sharding, memory), everywhere
    number = jax.ShapeDtypeStruct((batch,), np.int32, sharding=sharding)
    given = jax.ShapeDtypeStruct((batch, sampler.layout.tokens_of(blocks)), np.int32, sharding=sharding)
    seed = jax.ShapeDtypeStruct((), np.uint32)

    def draw_blocks(
        weights: AnyParams,
        memory: Memory,
        seed: Array,
        indices: Int[Array, "b"],
        attempts: Int[Array, "b"],
        first: Int[Array, "b"],
        given: Int[Array, "b n"],
        end: Int[Array, "b"],
    ) -> tuple[Memory, Filled]:
        with by_rows(sharding):
            return sampler.advance(weights, sequence_keys(seed, indices, attempts), memory, first, given, end)

    program = jax.jit(draw_blocks, donate_argnums=1, out_shardings=shardings)
    return program.trace(weights, memory, seed, number, number, number, given, number)


def abstract_memory(sampler: Sampler, weights: AnyParams, batch: int, sharding: NamedSharding | None = None) -> Memory:
    """Shapes of what is kept of `batch` sequences, with shardings where a mesh splits them; see `trace_step`."""
    row = np.zeros(sampler.canvas_length, np.int32)
    fresh = jax.eval_shape(lambda weights: sampler.start(weights, row, 0), weights)
    memory = jax.tree.map(abstract, jax.eval_shape(lambda fresh: fresh.tile(batch), fresh))
    if sharding is None:
        return memory
    return abstract_arrays(memory, memory_sharding(fresh, batch, sharding))


@functools.lru_cache(maxsize=16)
def compiled_step(
    sampler: Sampler,
    batch: int,
    blocks: int,
    sharding: NamedSharding | None,
    structure: Any,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
) -> Any:
    """`trace_step`, compiled ahead of time: so no sample's seconds hold the compilation. `leaves` are the weights'."""
    return trace_step(sampler, jax.tree.unflatten(structure, leaves), batch, blocks, sharding).lower().compile()


def memory_sharding(fresh: Memory, batch: int, sharding: NamedSharding | None) -> Any:
    """Sequences are split like the batch, heads like those of the network; None: one device."""
    if sharding is None:
        return None
    mesh, cache = sharding.mesh, fresh.cache
    assert isinstance(mesh, Mesh)  # of devices, there or not
    if cache is not None:
        logical = ("layers", "batch", "heads", None, None)

        def split(leaf: Array) -> NamedSharding:
            shape = (*leaf.shape[:BATCH], batch, *leaf.shape[BATCH + 1 :])
            return spec(mesh, logical[-leaf.ndim :], shape)

        whole: Any = NamedSharding(mesh, PartitionSpec())
        rows: Any = sharding
        cache = KVCache(jax.tree.map(split, cache.keys), jax.tree.map(split, cache.values), rows, whole)
    return Memory(cache, sharding)  # type: ignore[arg-type]


def abstract(array: Any) -> jax.ShapeDtypeStruct:
    """Its shape, with its sharding where it has one."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))
