"""The network of every objective: a DiT, with or without adaLN, its layers stacked and scanned.

Outside this package only `Network` is seen: parameters are a nested dict, `apply` and `decode` give hidden states and
`unembed` turns those into logits, so that nobody needs the logits of all positions at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import ModelConfig
from bd3_jax.models import attention, flash, mesh
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.kv_cache import KVBlock, KVCache
from bd3_jax.models.layer import REMAT_SAVED, Attend, finish
from bd3_jax.models.platform import flat_products, for_sampling, settle
from bd3_jax.models.tiles import tile_size
from bd3_jax.models.transformer import Transformer
from bd3_jax.precision import precision_of

Params = dict[str, Any]


def rotary_angles(positions: Int[Array, "*b L"], head_dim: int) -> tuple[Array, Array]:
    """Cosine and sine `[*b, L, k/2]` of position * 10000^(-2i / head_dim)."""
    frequencies = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


class Frozen(NamedTuple):
    """Parameters as `Network.decode` reads them: what is computed from them alone is there already.

    embedding: in the dtype of the activations.
    layers: `Layer`, stacked on axis 0, or a tuple with one of each layer.
    final: scale and shift after the last normalisation.
    output: kernel, in the dtype of the activations, and bias.
    """

    embedding: Float[Array, "V d"]
    layers: Any
    final: tuple[Array, Array | None]
    output: tuple[Float[Array, "d V"], Float[Array, "V"]]


AnyParams = Params | Frozen


@dataclasses.dataclass(frozen=True)
class Network:
    """Pure functions of the parameters; static, hashable, holds no array."""

    model: ModelConfig
    vocab_size: int
    adaln: bool
    time_conditioned: bool
    platform: str = ""  # that it is compiled for, where it is not this process' own

    @functools.cached_property
    def settled(self) -> ModelConfig:
        """The settings as they are on its platform."""
        return settle(self.model, self._on)

    @property
    def _on(self) -> str:
        return self.platform or jax.default_backend()

    @property
    def _flat(self) -> bool:
        return flat_products(self._on)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return jnp.dtype(self.settled.dtype)

    def _build(self, key: PRNGKeyArray) -> Transformer:
        return Transformer(self.model, self.vocab_size, self.adaln, rngs=nnx.Rngs(params=key))

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._build(jax.random.key(0))))

    def init(self, key: PRNGKeyArray) -> Params:
        """Fresh float32 parameters; those of the layers are stacked on axis 0 under 'blocks'."""
        return nnx.to_pure_dict(nnx.split(self._build(key))[1])

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, nothing allocated."""
        return nnx.to_pure_dict(self._abstract[1])

    def logical_axes(self) -> Params:
        """A tuple of logical axis names for every parameter: layers, vocab, embed, heads, mlp, cond or None."""

        def axes(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[str | None, ...]:
            own = variable.get_metadata("axes")
            return ("layers", *own) if path[0].key == "blocks" else own

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        named = jax.tree_util.tree_map_with_path(axes, self._abstract[1], is_leaf=is_variable)
        return nnx.to_pure_dict(named)

    def _merge(self, params: Params) -> Transformer:
        return nnx.merge(self._abstract[0], params)

    def _cond(self, transformer: Transformer, sigma: Array | None) -> Float[Array, "b c"] | None:
        """Float32; b = 1 where the network is not conditioned on time and is fed sigma = 0."""
        if transformer.time is None:
            return None
        if not self.time_conditioned:
            sigma = jnp.zeros((1,), jnp.float32)
        elif sigma is None:
            raise ValueError("a time-conditioned network needs sigma")
        return transformer.time(sigma)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "n L"],
        block_size: int,
        *,
        clean: Int[Array, "b L"] | None = None,
        sigma: Float[Array, "n"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "n L d"]:
        """Hidden states after the final norm.

        Args:
          params: see `init`.
          tokens: any length, divisible by the block size.
          block_size: attention is block-causal: 1 is causal (AR), L all to all (MDLM, SEDD).
          clean: with it, the two-stream pass over [tokens ; clean] of BD3-LM; both carry positions 0..L-1, and the
            hidden states of the noised half are returned (Block Diffusion, section 3.1). Where n = K b, each clean row
            serves K noised ones that follow each other, and is computed once.
          sigma: total noise, where the network is conditioned on time; elsewhere ignored and taken as 0.
          dropout_key: None turns dropout off.
        """
        length = tokens.shape[1]
        if length % block_size:
            raise ValueError(f"the block size {block_size} must divide the length {length}")
        transformer, dtype = self._merge(params), self.dtype
        ids = tokens[:, None]
        if clean is not None:
            ids = jnp.concatenate([tokens.reshape(clean.shape[0], -1, length), clean[:, None]], axis=1)
        streams = ids.shape[1]
        x = jnp.take(transformer.embedding[...], ids, axis=0).astype(dtype)
        cond = self._cond(transformer, sigma)
        attend, rotary = self._attention(length, block_size, streams - 1)
        graph, blocks = nnx.split(transformer.blocks)

        def apply_block(x: Array, index: Array | int, block: Any, streams: int) -> Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            layer = nnx.merge(graph, block).layer(cond, dtype, self._flat)
            # Else the compiler would split the width, as the parameters' is over fsdp, and have all rows everywhere.
            by_rows = lambda x: mesh.constrain(x, mesh.BATCH_AXES)
            return by_rows(layer(by_rows(x), rotary, attend, key, streams)[0])

        apply_block = self._rematerialised(apply_block)
        # The last layer stands outside the scan: of its clean half only keys and values are needed.
        last = self.model.num_layers - 1
        if self._is_unrolled:
            for index in range(last):
                x = apply_block(x, index, jax.tree.map(lambda leaf, index=index: leaf[index], blocks), streams)
        else:
            x, _ = jax.lax.scan(
                lambda x, xs: (apply_block(x, *xs, streams), None),
                x,
                (jnp.arange(last), jax.tree.map(lambda leaf: leaf[:last], blocks)),
                unroll=self.settled.scan_unroll,
            )
        noised = streams if clean is None else streams - 1
        x = apply_block(x, last, jax.tree.map(lambda leaf: leaf[last], blocks), noised)
        return finish(x.reshape(*tokens.shape, -1), *transformer.final(cond))

    def _attention(self, length: int, block_size: int, copies: int) -> tuple[Attend, tuple[Array, Array] | None]:
        """The pattern of `apply`, and the rotation that its operands need before; see `Layer.__call__`."""
        settled, head_dim = self.settled, self.model.width // self.model.num_heads
        rotary = rotary_angles(jnp.arange(length), head_dim)
        shape = (length, self.model.num_heads, head_dim, block_size, copies)
        if settled.attention == "flash" and flash.supports(*shape, self.dtype):
            pattern = Pattern(length, block_size, copies, head_dim, tile_size(length, settled.attention_chunk))
            return lambda q, k, v: flash.attend(q, k, v, rotary, pattern), None
        backend = attention.get_backend(settled.attention, settled.attention_chunk, length)

        def attend(q: Array, k: Array, v: Array) -> Array:
            if copies == 0:
                return backend.block_causal(q[:, :, 0], k[:, :, 0], v[:, :, 0], block_size)[:, :, None]
            return backend.block_diffusion(q, k, v, block_size)

        return attend, rotary

    def _rematerialised(self, block: Callable[..., Array]) -> Callable[..., Array]:
        """What the backward pass of a block computes again; see `ModelConfig.remat`."""
        if self.model.remat == "none":
            return block
        policies = jax.checkpoint_policies
        keep = (
            policies.save_only_these_names(*REMAT_SAVED) if self.model.remat == "block" else policies.nothing_saveable
        )
        return jax.checkpoint(block, policy=keep, static_argnums=3)

    def for_sampling(self) -> "Network":
        """Itself as it is fastest in a loop over calls; it computes the same."""
        return dataclasses.replace(self, model=for_sampling(self.model, self._on))

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens of clean context per sequence, a multiple of the block size."""
        head_dim = self.model.width // self.model.num_heads
        shape = (batch, self.model.num_heads, capacity, head_dim)

        def zeros() -> Any:
            # An array of its own for each, so that all may be donated.
            if self._is_unrolled:
                return tuple(jnp.zeros(shape, self.dtype) for _ in range(self.model.num_layers))
            return jnp.zeros((self.model.num_layers, *shape), self.dtype)

        return KVCache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def _is_unrolled(self) -> bool:
        """Whether there is no scan over the layers."""
        return self.settled.scan_unroll >= self.model.num_layers

    def freeze(self, params: Params) -> Frozen:
        """What is the same at every call of `decode`, done once: the layers' weights as they compute.

        Where layers are scanned they stay stacked; where they are unrolled each has its own arrays, since a loop over
        calls would copy each layer's part of the stack again and again.
        """
        transformer = self._merge(params)
        graph, blocks = nnx.split(transformer.blocks)
        cond = self._cond(transformer, None)
        layers = jax.vmap(lambda block: nnx.merge(graph, block).layer(cond, self.dtype, self._flat))(blocks)
        if self._is_unrolled:
            each = (jax.tree.map(lambda leaf, n=n: leaf[n], layers) for n in range(self.model.num_layers))
            layers = jax.lax.optimization_barrier(tuple(each))
        embedding, kernel = (
            leaf[...].astype(self.dtype) for leaf in (transformer.embedding, transformer.output.kernel)
        )
        return Frozen(embedding, layers, transformer.final(cond), (kernel, transformer.output.bias[...]))

    def decode(
        self,
        params: AnyParams,
        tokens: Int[Array, "b T"],
        cache: KVCache,
        block_size: int | None = None,
        at: Int[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n d"], KVBlock]:
        """Hidden states of the newest tokens, which see the cache and each other, and their keys and values.

        The cache is not changed: `KVCache.append` stores a block once its tokens are final. For networks that are not
        conditioned on time.

        Args:
          params: see `init`; frozen where there are many calls.
          tokens: they follow what is cached; one block, or several, which see each other block-causally, and each no
            more than S tokens before it, S the cache's capacity, if all but the last of them fit into it. At negative
            positions (see `KVCache`) they are seen by nobody but their own block.
          cache: of earlier tokens.
          block_size: None: T.
          at: which of the tokens hidden states are wanted of; None: all. The last layer does no work for the others
            but their keys and values.
        """
        frozen = params if isinstance(params, Frozen) else self.freeze(params)
        x = jnp.take(frozen.embedding, tokens, axis=0)[:, None]
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        cos, sin = rotary_angles(positions, self.model.width // self.model.num_heads)
        rotary = (cos[:, None, None], sin[:, None, None])  # broadcast over heads and streams
        ahead, own = np.zeros(1, int), None
        if block_size is not None and block_size < tokens.shape[1]:
            ahead = np.arange(tokens.shape[1]) // block_size * block_size
            number = positions // block_size
            same, earlier = number[:, :, None] == number[:, None, :], number[:, :, None] > number[:, None, :]
            own = same | (earlier & (positions >= 0)[:, None, :])
        old = cache.visible(ahead)

        def apply_layer(x: Array, xs: tuple[Any, Array, Array], at: Array | None = None) -> tuple[Array, KVBlock]:
            layer, keys, values = xs
            seen = old, own
            if own is not None and at is not None:
                seen = (
                    jnp.take_along_axis(old, at[..., None], axis=1),
                    jnp.take_along_axis(own, at[..., None], axis=1),
                )

            def attend(q: Array, k: Array, v: Array) -> Array:
                return attention.cached(q[:, :, 0], k[:, :, 0], v[:, :, 0], keys, values, *seen)[:, :, None]

            x, (k, v) = layer(x, rotary, attend, None, 1, at)
            return x, KVBlock(k[:, :, 0], v[:, :, 0])

        # The last layer stands apart: it is needed at fewer positions.
        last = self.model.num_layers - 1
        if self._is_unrolled:
            stored = []
            for n, xs in enumerate(zip(frozen.layers, cache.keys, cache.values, strict=True)):
                x, new = apply_layer(x, xs, at if n == last else None)
                stored.append(new)
            block = KVBlock(tuple(new.keys for new in stored), tuple(new.values for new in stored))
        else:
            # Indexed and not sliced: the compiler would copy all layers but the last, cache included, at every call.
            part = lambda n: jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, n, keepdims=False),
                (frozen.layers, cache.keys, cache.values),
            )
            layer: Any = lambda x, n: apply_layer(x, part(n))
            x, earlier = jax.lax.scan(layer, x, jnp.arange(last), unroll=self.settled.scan_unroll)
            x, new = apply_layer(x, part(last), at)
            block = jax.tree.map(lambda before, newest: jnp.concatenate([before, newest[None]]), earlier, new)
        return finish(x[:, 0], *frozen.final), block

    def output(self, params: Params) -> tuple[Float[Array, "d V"], Float[Array, "V"]]:
        """The output layer. On a mesh its whole width is on every device: gathered once, and not for every use."""
        kernel, bias = params["output"]["kernel"], params["output"]["bias"]
        return mesh.constrain(kernel, None, mesh.tensor_axis(self.vocab_size)), bias

    def unembed(self, params: AnyParams, hidden: Float[Array, "... d"]) -> Float[Array, "... V"]:
        """Float32 logits; the mask token's is included and is for the objective to treat."""
        if isinstance(params, Frozen):
            kernel, bias = params.output
        else:
            kernel, bias = params["output"]["kernel"], params["output"]["bias"]
        kernel, precision = kernel.astype(hidden.dtype), precision_of(hidden)
        return jnp.tensordot(hidden, kernel, 1, precision=precision, preferred_element_type=jnp.float32) + bias
