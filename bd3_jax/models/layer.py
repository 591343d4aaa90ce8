"""One layer as it computes: pre-norm attention and MLP, their norm scales and adaLN multiplied into the weights.

With adaLN, a branch computes gate * f((normalise(x) * norm * (1 + scale)) W + shift W + bias). What is the same for all
sequences goes into W and the bias, which are small, and not over every token of every sequence: neither pass then
multiplies, keeps or sums up arrays of the activations' size for it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.models import chunked
from bd3_jax.precision import precision_of

HEADS, HIDDEN = "heads", "mlp"
"""Names of q, k, v and of the MLP's input to its GELU, for rematerialisation policies."""
REMAT_SAVED = (HEADS, HIDDEN, chunked.RESIDUALS)
"""What the policy 'block' keeps of a layer; of its products only attention's last, a twelfth, is computed again."""

Streams = Float[Array, "b s L d"]
Attend = Callable[[Array, Array, Array], Array]


@jax.custom_vjp
def normalise(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """LayerNorm without scale or bias, eps 1e-5, computed in float32; the result has the dtype of x.

    The backward pass reads the result, which the next product keeps anyway, and not x.
    """
    return _normalise(x)[0]


def _normalise(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5)
    y = (y * inverse).astype(x.dtype)
    return y, (y, inverse)


def _normalise_bwd(residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    y, inverse = residuals[0].astype(jnp.float32), residuals[1]
    dx = dy.astype(jnp.float32)
    dx = dx - dx.mean(-1, keepdims=True) - y * (dx * y).mean(-1, keepdims=True)
    return ((dx * inverse).astype(dy.dtype),)


normalise.defvjp(_normalise, _normalise_bwd)


def finish(
    x: Float[Array, "b L d"], scale: Float[Array, "..."], shift: Float[Array, "..."] | None
) -> Float[Array, "b L d"]:
    """The last normalisation, after all layers."""
    y = normalise(x) * scale
    return (y if shift is None else y + shift).astype(x.dtype)


def _dropout(x: Float[Array, "*n d"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*n d"]:
    """Drops with probability `rate`, rounded to 1/65,536: a random number of 32 bits serves two places. d is even."""
    if key is None or rate == 0:
        return x
    bits = jax.random.bits(key, (*x.shape[:-1], x.shape[-1] // 2))
    halves = jnp.stack([bits & 0xFFFF, bits >> 16], axis=-2).reshape(x.shape)
    dropped = round(rate * 2**16)
    return jnp.where(halves >= dropped, x * (1 / (1 - dropped / 2**16)), 0)


def rotate(x: Float[Array, "... L k"], cos: Array, sin: Array) -> Float[Array, "... L k"]:
    """Rotates pairs (i, i + k/2) of each head by its angles `[..., L, k/2]`, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _product(x: Float[Array, "*n i"], kernel: Float[Array, "i *o"], flat: bool) -> Float[Array, "..."]:
    """`flat`: as one matrix product, see `platform.flat_products`."""
    if not flat:
        return jnp.tensordot(x, kernel, axes=1, precision=precision_of(x))
    matrix = kernel.reshape(kernel.shape[0], -1)
    product = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, precision=precision_of(x))
    return product.reshape(*x.shape[:-1], *kernel.shape[1:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entry:
    """The projection of normalised activations at the start of a branch.

    `scale` is adaLN's where each sequence has its own, as has then the bias `[b, *o]`.
    """

    kernel: Float[Array, "d *o"]
    bias: Float[Array, "*o"] | Float[Array, "b *o"] | None
    scale: Float[Array, "b d"] | None

    @classmethod
    def fold(
        cls,
        kernel: Float[Array, "d *o"],
        bias: Float[Array, "*o"] | None,
        norm: Float[Array, "d"],
        modulation: tuple[Float[Array, "b d"], Float[Array, "b d"]] | None,
        dtype: jnp.dtype,
    ) -> "Entry":
        """`modulation`: shift and scale, b = 1 where they are the same for all sequences."""
        scale, gain = None, norm
        if modulation is not None:
            shift, scale = modulation
            shifted = jnp.tensordot(shift, kernel, axes=1, precision=precision_of(shift))
            bias = shifted if bias is None else shifted + bias
            if scale.shape[0] == 1:
                gain, scale, bias = norm * (1 + scale[0]), None, bias[0]
        kernel = gain.reshape(-1, *(1,) * (kernel.ndim - 1)) * kernel
        return jax.tree.map(lambda x: x.astype(dtype), cls(kernel, bias, scale))

    def side_by_side(self) -> "Entry":
        """The same with all heads along one axis."""
        bias = None if self.bias is None else self.bias.reshape(*self.bias.shape[:-2], -1)
        return Entry(self.kernel.reshape(self.kernel.shape[0], -1), bias, self.scale)

    def __call__(self, y: Streams, flat: bool) -> Float[Array, "b s L *o"]:
        if self.scale is None:
            out = _product(y, self.kernel, flat)
            return out if self.bias is None else out + self.bias
        assert self.bias is not None
        return _product(y * (1 + self.scale[:, None, None]), self.kernel, flat) + self.bias[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exit:
    """The projection back to the residual stream at the end of a branch; `gate` where each sequence has its own."""

    kernel: Float[Array, "i d"]
    bias: Float[Array, "d"] | None
    gate: Float[Array, "b d"] | None

    @classmethod
    def fold(
        cls,
        kernel: Float[Array, "i d"],
        bias: Float[Array, "d"] | None,
        gate: Float[Array, "b d"] | None,
        dtype: jnp.dtype,
    ) -> "Exit":
        """`gate`: b = 1 where it is the same for all sequences."""
        if gate is not None and gate.shape[0] == 1:
            kernel, bias, gate = kernel * gate[0], None if bias is None else bias * gate[0], None
        return jax.tree.map(lambda x: x.astype(dtype), cls(kernel, bias, gate))

    def __call__(self, x: Float[Array, "b s L i"], flat: bool) -> Streams:
        return self._gated(_product(x, self.kernel, flat))

    def of_heads(self, x: Float[Array, "b h s L k"], flat: bool) -> Streams:
        """Of the heads one after the other."""
        if flat:
            joined = jnp.moveaxis(x, 1, -2)
            return self(joined.reshape(*joined.shape[:-2], -1), flat)
        kernel = self.kernel.reshape(x.shape[1], x.shape[-1], -1)
        return self._gated(jnp.einsum("bhslk,hkd->bsld", x, kernel, precision=precision_of(x)))

    def _gated(self, out: Streams) -> Streams:
        out = out if self.bias is None else out + self.bias
        return out if self.gate is None else out * self.gate[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """A block's weights, in the dtype of the activations."""

    q: Entry
    k: Entry
    v: Entry
    attention_out: Exit
    mlp_in: Entry
    mlp_out: Exit
    dropout: float = dataclasses.field(metadata=dict(static=True))
    flat: bool = dataclasses.field(metadata=dict(static=True))  # see `platform.flat_products`

    def __call__(
        self,
        x: Streams,
        rotary: tuple[Array, Array] | None,
        attend: Attend,
        key: PRNGKeyArray | None,
        streams: int,
        at: Int[Array, "b n"] | None = None,
    ) -> tuple[Streams, tuple[Array, Array]]:
        """The residual stream after this layer, and the keys and values as `attend` takes them.

        Args:
          x: s residual streams of the same positions.
          rotary: cosines and sines, see `rotate`; None: `attend` rotates.
          attend: the attention pattern, (q, k, v) -> the result for the streams of q, of rotated `[b, h, s, L, k]`;
            where it rotates itself, of `[b, s, L, h k]`.
          key: None turns dropout off.
          streams: only the first so many go on. The last layer's clean half is needed for its keys and values alone.
          at: only these of the L positions go on; None: all.
        """
        key_a, key_m = (None, None) if key is None else jax.random.split(key)
        y = normalise(x)
        x, y_q = x[:, :streams], y[:, :streams]
        if rotary is None:
            assert at is None  # `attend` rotates all positions
            entries = ((self.q, y_q), (self.k, y), (self.v, y))
            q, k, v = (checkpoint_name(entry.side_by_side()(each, self.flat), HEADS) for entry, each in entries)
            return self._finish(x, self.attention_out(attend(q, k, v), self.flat), key_a, key_m), (k, v)
        rotary_q = rotary
        if at is not None:
            x, y_q = (jnp.take_along_axis(each, at[:, None, :, None], axis=2) for each in (x, y_q))
            cos, sin = (jnp.take_along_axis(each, at[:, None, None, :, None], axis=3) for each in rotary)
            rotary_q = cos, sin
        q, k, v = (
            checkpoint_name(heads, HEADS)
            for heads in (
                rotate(_heads_first(self.q(y_q, self.flat)), *rotary_q),
                rotate(_heads_first(self.k(y, self.flat)), *rotary),
                _heads_first(self.v(y, self.flat)),
            )
        )
        mixed = self.attention_out.of_heads(attend(q, k, v), self.flat)
        return self._finish(x, mixed, key_a, key_m), (k, v)

    def _finish(self, x: Streams, mixed: Streams, key_a: PRNGKeyArray | None, key_m: PRNGKeyArray | None) -> Streams:
        """What follows attention."""
        x = x + _dropout(mixed, self.dropout, key_a)
        hidden = checkpoint_name(self.mlp_in(normalise(x), self.flat), HIDDEN)
        # Only `hidden` is kept: a GELU is computed faster than it is read.
        leave = jax.checkpoint(lambda exit, hidden: exit(jax.nn.gelu(hidden), self.flat), prevent_cse=False)
        out = leave(self.mlp_out, hidden)
        return x + _dropout(out, self.dropout, key_m)


def _heads_first(x: Float[Array, "b s L h k"]) -> Float[Array, "b h s L k"]:
    return jnp.moveaxis(x, -2, 1)
