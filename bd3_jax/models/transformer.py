"""The parameters of the network as Flax modules: their shapes, initialisation, names for the sharding rules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bd3_jax.config import ModelConfig
from bd3_jax.models.layer import Entry, Exit, Layer
from bd3_jax.precision import precision_of

TIME_FEATURES = 256


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, axes: tuple[str | None, ...]) -> nnx.Param:
    """A weight U(-1/sqrt(fan_in), 1/sqrt(fan_in)); `axes` names each dimension for the sharding rules."""
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes=axes)


def _constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """x W + b over the last axis, in the dtype of x."""

    def __init__(
        self, fan_in: int, out: tuple[int, ...], axes: tuple[str | None, ...], *, rngs: nnx.Rngs, zero: bool = False
    ):
        shape = (fan_in, *out)
        self.kernel = _constant(0, shape, axes) if zero else _uniform(rngs, shape, fan_in, axes)
        self.bias = _constant(0, out, axes[1:]) if zero else _uniform(rngs, out, fan_in, axes[1:])

    def __call__(self, x: Array) -> Array:
        kernel, bias = (leaf[...].astype(x.dtype) for leaf in (self.kernel, self.bias))
        return jnp.tensordot(x, kernel, axes=1, precision=precision_of(x)) + bias


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

    def layer(self, cond: Float[Array, "b c"] | None, dtype: jnp.dtype, flat: bool) -> Layer:
        """The weights as they compute; `cond`: of each sequence, or b = 1 for all of them, or None (no adaLN)."""
        shift_a = scale_a = gate_a = shift_m = scale_m = gate_m = None
        enter_a = enter_m = None
        if self.modulation is not None and cond is not None:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.moveaxis(self.modulation(cond), 1, 0)
            enter_a, enter_m = (shift_a, scale_a), (shift_m, scale_m)
        attention_norm, qkv = self.attention_norm[...], self.qkv[...]
        q, k, v = (Entry.fold(qkv[:, i], None, attention_norm, enter_a, dtype) for i in range(3))
        attention_out = self.attention_out[...].reshape(-1, self.attention_norm.shape[0])
        return Layer(
            q, k, v,
            Exit.fold(attention_out, None, gate_a, dtype),
            Entry.fold(self.mlp_in.kernel[...], self.mlp_in.bias[...], self.mlp_norm[...], enter_m, dtype),
            Exit.fold(self.mlp_out.kernel[...], self.mlp_out.bias[...], gate_m, dtype),
            self.dropout, flat,
        )  # fmt: skip


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

    def final(self, cond: Float[Array, "b c"] | None) -> tuple[Array, Array | None]:
        """Scale and shift after the last normalisation, over `[b, L, d]`."""
        if self.final_modulation is None or cond is None:
            return self.final_norm[...], None
        shift, scale = jnp.moveaxis(self.final_modulation(cond), 1, 0)[:, :, None, :]
        return self.final_norm[...] * (1 + scale), shift
