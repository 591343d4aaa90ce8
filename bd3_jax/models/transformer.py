"""The network of every objective: a DiT, with or without adaLN, its layers stacked and scanned.

Outside this package only `Network` is seen: parameters are a nested dict, `apply` and `decode` give hidden states and
`unembed` turns those into logits, so that nobody needs the logits of all positions at once.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import ModelConfig
from bd3_jax.models import attention
from bd3_jax.models.kv_cache import KVBlock, KVCache

Params = dict[str, Any]
TIME_FEATURES = 256


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, axes: tuple[str | None, ...]) -> nnx.Param:
    """A weight U(-1/sqrt(fan_in), 1/sqrt(fan_in)); `axes` names each dimension for the sharding rules."""
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=axes)


def _constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def _layer_norm(x: Array, scale: nnx.Param) -> Array:
    """Scale only, eps 1e-5, in float32; the result has the dtype of x."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    return (y * scale[...]).astype(x.dtype)


def _modulate(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


def _dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def rotary_angles(positions: Int[Array, "*b L"], head_dim: int) -> tuple[Array, Array]:
    """Cosine and sine `[*b, L, k/2]` of position * 10000^(-2i / head_dim)."""
    frequencies = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "... L k"], cos: Array, sin: Array) -> Array:
    """Rotates pairs (i, i + k/2) of each head by its angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Linear(nnx.Module):
    """x W + b over the last axis, in the dtype of x."""

    def __init__(
        self, fan_in: int, out: tuple[int, ...], axes: tuple[str | None, ...], *, rngs: nnx.Rngs, zero: bool = False
    ):
        shape = (fan_in, *out)
        self.kernel = _constant(0, shape, axes) if zero else _uniform(rngs, shape, fan_in, axes)
        self.bias = _constant(0, out, axes[1:]) if zero else _uniform(rngs, out, fan_in, axes[1:])

    def __call__(self, x: Array) -> Array:
        return jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=1) + self.bias[...].astype(x.dtype)


class TimeEmbedding(nnx.Module):
    """sigma -> 256 sinusoids -> Linear -> SiLU -> Linear -> SiLU: what every adaLN projection reads."""

    def __init__(self, cond_dim: int, *, rngs: nnx.Rngs):
        self.input = Linear(TIME_FEATURES, (cond_dim,), (None, "cond"), rngs=rngs)
        self.output = Linear(cond_dim, (cond_dim,), (None, "cond"), rngs=rngs)

    def __call__(self, sigma: Float[Array, "b"]) -> Float[Array, "b c"]:
        half = TIME_FEATURES // 2
        frequencies = np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
        angles = sigma[:, None].astype(jnp.float32) * frequencies
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return jax.nn.silu(self.output(jax.nn.silu(self.input(features))))


class Block(nnx.Module):
    """Pre-norm attention and MLP; with adaLN each is shifted, scaled and gated by the time embedding."""

    def __init__(self, model: ModelConfig, adaln: bool, *, rngs: nnx.Rngs):
        width, heads = model.width, model.num_heads
        head_dim = width // heads
        self.dropout = model.dropout
        self.attention_norm = _constant(1, (width,), ("embed",))
        self.qkv = _uniform(rngs, (width, 3, heads, head_dim), width, ("embed", None, "heads", None))
        self.attention_out = _uniform(rngs, (heads, head_dim, width), width, ("heads", None, "embed"))
        self.mlp_norm = _constant(1, (width,), ("embed",))
        self.mlp_in = Linear(width, (4 * width,), ("embed", "mlp"), rngs=rngs)
        self.mlp_out = Linear(4 * width, (width,), ("mlp", "embed"), rngs=rngs)
        self.modulation = (
            Linear(model.cond_dim, (6, width), ("cond", None, "embed"), rngs=rngs, zero=True) if adaln else None
        )

    def modulations(self, cond: Float[Array, "b c"] | None, dtype: jnp.dtype) -> tuple[Array, ...]:
        """Shift, scale, gate for attention, then for the MLP, each `[b, 1, d]` (b = 1: the same for all sequences)."""
        if self.modulation is None or cond is None:
            zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
            return zero, zero, one, zero, zero, one
        return tuple(jnp.moveaxis(self.modulation(cond).astype(dtype), 1, 0)[:, :, None, :])

    def heads(self, x: Float[Array, "*s L d"], cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """x -> q, k (rotated) and v, each `[*s, h, L, k]`."""
        q, k, v = jnp.einsum("...ld,dthk->t...hlk", x, self.qkv[...].astype(x.dtype))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def join(self, x: Float[Array, "*s h L k"]) -> Float[Array, "*s L d"]:
        return jnp.einsum("...hlk,hkd->...ld", x, self.attention_out[...].astype(x.dtype))

    def mlp(self, x: Array) -> Array:
        return self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=True))

    def __call__(
        self,
        x: Float[Array, "s b L d"],
        rotary: tuple[Array, Array],
        attend: Any,
        cond: Array | None,
        key: PRNGKeyArray | None,
        streams: int,
    ) -> tuple[Float[Array, "s b L d"], tuple[Array, Array]]:
        """One layer; `attend(q, k, v)` is the pattern. Only the first `streams` of x go on: all the last layer needs
        of the clean half is its keys and values. Returns those too.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulations(cond, x.dtype)
        key_a, key_m = (None, None) if key is None else jax.random.split(key)
        q, k, v = self.heads(_modulate(_layer_norm(x, self.attention_norm), shift_a, scale_a), *rotary)
        x = x[:streams]
        x = x + gate_a * _dropout(self.join(attend(q[:streams], k, v)), self.dropout, key_a)
        y = self.mlp(_modulate(_layer_norm(x, self.mlp_norm), shift_m, scale_m))
        return x + gate_m * _dropout(y, self.dropout, key_m), (k, v)


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm and output projection."""

    def __init__(self, model: ModelConfig, vocab_size: int, adaln: bool, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=model.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(model, adaln, rngs=rngs)

        self.embedding = _uniform(rngs, (vocab_size, model.width), model.width, ("vocab", "embed"))
        self.time = TimeEmbedding(model.cond_dim, rngs=rngs) if adaln else None
        self.blocks = stacked(rngs)
        self.final_norm = _constant(1, (model.width,), ("embed",))
        self.final_modulation = (
            Linear(model.cond_dim, (2, model.width), ("cond", None, "embed"), rngs=rngs, zero=True) if adaln else None
        )
        self.output = Linear(model.width, (vocab_size,), ("embed", "vocab"), rngs=rngs, zero=True)

    def finish(self, x: Float[Array, "b L d"], cond: Array | None) -> Float[Array, "b L d"]:
        x = _layer_norm(x, self.final_norm)
        if self.final_modulation is None or cond is None:
            return x
        shift, scale = jnp.moveaxis(self.final_modulation(cond).astype(x.dtype), 1, 0)[:, :, None, :]
        return _modulate(x, shift, scale)


class Frozen(NamedTuple):
    """Parameters as `Network.decode` reads them: what is computed from them alone is there already.

    layers: weights and adaLN's outputs, stacked on axis 0, or a tuple of those of each layer.
    """

    params: Params
    layers: Any


@dataclasses.dataclass(frozen=True)
class Network:
    """Pure functions of the parameters; static, hashable, holds no array."""

    model: ModelConfig
    vocab_size: int
    adaln: bool
    time_conditioned: bool

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations: 'auto' is float32 on CPU, bfloat16 elsewhere."""
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(auto if self.model.dtype == "auto" else self.model.dtype)

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

    def _cond(self, transformer: Transformer, sigma: Array | None, dtype: jnp.dtype) -> Array | None:
        """[b, c]; [1, c] where the network is not conditioned on time and is fed sigma = 0."""
        if transformer.time is None:
            return None
        if not self.time_conditioned:
            sigma = jnp.zeros((1,), jnp.float32)
        elif sigma is None:
            raise ValueError("a time-conditioned network needs sigma")
        return transformer.time(sigma).astype(dtype)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "b L"],
        block_size: int,
        *,
        clean: Int[Array, "b L"] | None = None,
        sigma: Float[Array, "b"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b L d"]:
        """Hidden states after the final norm.

        Args:
          params: see `init`.
          tokens: any length, divisible by the block size.
          block_size: attention is block-causal: 1 is causal (AR), L all to all (MDLM, SEDD).
          clean: with it, the two-stream pass over [tokens ; clean] of BD3-LM; both carry positions 0..L-1, and the
            hidden states of the noised half are returned (Block Diffusion, section 3.1).
          sigma: total noise, where the network is conditioned on time; elsewhere ignored and taken as 0.
          dropout_key: None turns dropout off.
        """
        length = tokens.shape[1]
        if length % block_size:
            raise ValueError(f"the block size {block_size} must divide the length {length}")
        transformer, dtype, streams = self._merge(params), self.dtype, 1 if clean is None else 2
        backend = attention.get_backend(self.model.attention, self.model.attention_chunk)

        def attend(q: Array, k: Array, v: Array) -> Array:
            if clean is None:
                return backend.block_causal(q[0], k[0], v[0], block_size)[None]
            return backend.block_diffusion(q, k, v, block_size)

        ids = tokens[None] if clean is None else jnp.stack([tokens, clean])
        x = jnp.take(transformer.embedding[...], ids, axis=0).astype(dtype)
        cond = self._cond(transformer, sigma, dtype)
        rotary = rotary_angles(jnp.arange(length), self.model.width // self.model.num_heads)
        graph, layers = nnx.split(transformer.blocks)

        def layer(x: Array, index: Array, layer_params: Any, streams: int) -> Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return nnx.merge(graph, layer_params)(x, rotary, attend, cond, key, streams)[0]

        # The last layer stands outside the scan: of its clean half only keys and values are needed.
        last = self.model.num_layers - 1
        x, _ = jax.lax.scan(
            lambda x, xs: (layer(x, *xs, streams), None),
            x,
            (jnp.arange(last), jax.tree.map(lambda leaf: leaf[:last], layers)),
            unroll=self._unroll(last),
        )
        x = layer(x, jnp.asarray(last), jax.tree.map(lambda leaf: leaf[last], layers), 1)
        return transformer.finish(x[0], cond)

    def _unroll(self, layers: int) -> int:
        return max(1, min(self.model.scan_unroll, layers))

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens of clean context per sequence, a multiple of the block size."""
        head_dim = self.model.width // self.model.num_heads
        shape = (batch, self.model.num_heads, capacity, head_dim)

        def zeros() -> Any:
            # An array of its own for each, so that all may be donated.
            if self._is_unrolled:
                return tuple(jnp.zeros(shape, self.dtype) for _ in range(self.model.num_layers))
            return jnp.zeros((self.model.num_layers, *shape), self.dtype)

        return KVCache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))

    @property
    def _is_unrolled(self) -> bool:
        """Whether decoding goes through the layers without a scan."""
        return self.model.scan_unroll >= self.model.num_layers

    def freeze(self, params: Params) -> Frozen:
        """What is the same at every call of `decode`, done once: adaLN's outputs, an array for each layer's weight.

        Where layers are scanned the weights stay stacked; where they are unrolled, a loop over calls would copy each
        layer's part of the stack again and again.
        """
        transformer = self._merge(params)
        graph, layers = nnx.split(transformer.blocks)
        cond = self._cond(transformer, None, self.dtype)
        modulations = jax.vmap(lambda layer: jnp.stack(nnx.merge(graph, layer).modulations(cond, self.dtype)))(layers)
        stacked = layers, modulations
        if not self._is_unrolled:
            return Frozen(params, stacked)
        each = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.model.num_layers))
        return Frozen(params, jax.lax.optimization_barrier(each))

    def decode(
        self,
        params: Params | Frozen,
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
          tokens: they follow what is cached; one block, or several, which see each other block-causally. At negative
            positions (see `KVCache`) they are seen by nobody but their own block.
          cache: of earlier tokens.
          block_size: None: T.
          at: which of the tokens hidden states are wanted of; None: all. The last layer does no work for the others
            but their keys and values.
        """
        frozen = params if isinstance(params, Frozen) else self.freeze(params)
        transformer, dtype = self._merge(frozen.params), self.dtype
        x = jnp.take(transformer.embedding[...], tokens, axis=0).astype(dtype)
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        cos, sin = rotary_angles(positions, self.model.width // self.model.num_heads)
        rotary = (cos[:, None], sin[:, None])  # broadcast over heads
        graph, _ = nnx.split(transformer.blocks)
        valid, own = cache.valid, None
        if block_size is not None and block_size < tokens.shape[1]:
            number = positions // block_size
            same, earlier = number[:, :, None] == number[:, None, :], number[:, :, None] > number[:, None, :]
            own = same | (earlier & (positions >= 0)[:, None, :])

        def layer(x: Array, xs: tuple[Any, Array, Array], at: Array | None = None) -> tuple[Array, KVBlock]:
            (layer_params, modulation), keys, values = xs
            block, seen = nnx.merge(graph, layer_params), own
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
            q, k, v = block.heads(_modulate(_layer_norm(x, block.attention_norm), shift_a, scale_a), *rotary)
            if at is not None:
                x, q = jnp.take_along_axis(x, at[..., None], 1), jnp.take_along_axis(q, at[:, None, :, None], 2)
                seen = None if own is None else jnp.take_along_axis(own, at[..., None], 1)
            x = x + gate_a * block.join(attention.cached(q, k, v, keys, values, valid, seen))
            y = block.mlp(_modulate(_layer_norm(x, block.mlp_norm), shift_m, scale_m))
            return x + gate_m * y, KVBlock(k, v)

        # The last layer stands apart: it is needed at fewer positions.
        last = self.model.num_layers - 1
        if isinstance(cache.keys, tuple):
            blocks = []
            for n, xs in enumerate(zip(frozen.layers, cache.keys, cache.values, strict=True)):
                x, block = layer(x, xs, at if n == last else None)
                blocks.append(block)
            new = KVBlock(tuple(block.keys for block in blocks), tuple(block.values for block in blocks))
        else:
            stacked = frozen.layers, cache.keys, cache.values
            of_all_but_last = jax.tree.map(lambda leaf: leaf[:last], stacked)
            over: Any = layer  # the scan gives no `at`
            x, earlier = jax.lax.scan(over, x, of_all_but_last, unroll=self._unroll(last))
            x, block = layer(x, jax.tree.map(lambda leaf: leaf[last], stacked), at)
            new = jax.tree.map(lambda earlier, newest: jnp.concatenate([earlier, newest[None]]), earlier, block)
        return transformer.finish(x, self._cond(transformer, None, dtype)), new

    def unembed(self, params: Params, hidden: Float[Array, "... d"]) -> Float[Array, "... V"]:
        """Float32 logits; the mask token's is included and is for the objective to treat."""
        kernel, bias = params["output"]["kernel"], params["output"]["bias"]
        product = jnp.tensordot(hidden, kernel.astype(hidden.dtype), axes=1, preferred_element_type=jnp.float32)
        return product + bias
