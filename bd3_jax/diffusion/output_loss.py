"""Losses of logits that are never all there: the output layer and its gradient, in chunks of the positions that count.

A SUBS or SEDD loss is 0 at unmasked positions, so the output layer, a large part of a small model's work, is left out
there. And since a training loss is a plain sum over positions, its gradient is known as soon as a chunk's logits are:
it is computed beside the loss, and the logits are computed once and not kept (as in Cut Cross-Entropy, Wijmans et al.,
2024, and the like, here for any loss).

Tokamax 0.0.12 has such an operation, but it returns the sum of the losses alone, all with one weight, while ours weighs
each by its noise; and elsewhere than on TPUs it holds all logits.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bd3_jax.precision import precision_of

Loss = Callable[..., Float[Array, "n"]]
"""(logits `[n, V]`, one array `[n]` after the other) -> losses `[n]`."""


class Output(NamedTuple):
    """The output layer: logits = hidden kernel + bias."""

    kernel: Float[Array, "d V"]
    bias: Float[Array, "V"]


class Chunks(NamedTuple):
    """`max_logits`: how many a device holds at once, about. `shards`: into how many parts devices split the batch.

    Each part goes through its own positions, so that none waits for data of another's. No number depends on either.
    """

    max_logits: int
    shards: int

    def size(self, n: int, vocab_size: int) -> int:
        """Positions of a chunk, where a device has n: as few chunks as may be, and those of one size."""
        most = min(max(1, self.max_logits // vocab_size), n)
        return -(-n // -(-n // most))


def summed(
    loss: Loss,
    chunks: Chunks,
    hidden: Float[Array, "b L d"],
    output: Output,
    args: tuple[Array, ...],
    counted: Bool[Array, "b L"],
) -> tuple[Float[Array, ""], Float[Array, "b L"]]:
    """Sum of the losses at counted positions, and each of them, 0 at the others.

    `args`, each `[b, L]`, go to `loss` and have no gradient. That of the output layer and the hidden states flows
    through the sum alone.
    """
    total, losses = _summed(loss, chunks, hidden, output, args, counted)
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    loss: Loss, chunks: Chunks, hidden: Array, output: Output, args: tuple[Array, ...], counted: Array
) -> tuple[Array, Array]:
    losses = _compute(loss, chunks, hidden, output, args, counted, with_gradients=False)[0]
    return losses.sum(), losses


def _summed_fwd(
    loss: Loss, chunks: Chunks, hidden: Array, output: Output, args: tuple[Array, ...], counted: Array
) -> tuple[tuple[Array, Array], tuple[Array, Output]]:
    losses, dhidden, doutput = _compute(loss, chunks, hidden, output, args, counted, with_gradients=True)
    return (losses.sum(), losses), (dhidden, doutput)


def _summed_bwd(
    loss: Loss, chunks: Chunks, gradients: tuple[Array, Output], cotangents: tuple[Array, Array]
) -> tuple[Array, Output, None, None]:
    dtotal, _ = cotangents
    dhidden, doutput = jax.tree.map(lambda x: (dtotal * x).astype(x.dtype), gradients)
    return dhidden, doutput, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)


def _compute(
    loss: Loss,
    chunks: Chunks,
    hidden: Float[Array, "b L d"],
    output: Output,
    args: tuple[Array, ...],
    counted: Bool[Array, "b L"],
    with_gradients: bool,
) -> tuple[Float[Array, "b L"], Float[Array, "b L d"], Output]:
    """Losses `[b, L]`, and the gradients of their sum; without those, empty arrays in their place."""
    (batch, length, width), vocab_size, shards = hidden.shape, output.bias.shape[0], chunks.shards
    n = batch // shards * length
    size = chunks.size(n, vocab_size)
    kernel = output.kernel.astype(hidden.dtype)

    # Counted positions first, and after the last one any that fill up a chunk.
    own = counted.reshape(shards, n)
    order = jnp.argsort(~own, axis=1, stable=True)
    before, count = own.cumsum(axis=1) - own, own.sum(axis=1)
    place = jnp.where(own, before, count[:, None] + jnp.arange(n) - before)  # the inverse of `order`
    order = jnp.pad(order, ((0, 0), (0, -n % size)))
    hidden, args = (jax.tree.map(lambda x: x.reshape(shards, n, *x.shape[2:]), x) for x in (hidden, args))

    def one_shard(
        h: Float[Array, "c d"], args: tuple[Array, ...], counted: Bool[Array, "c"]
    ) -> tuple[Float[Array, "c"], Float[Array, "c d"], Output]:
        precision = precision_of(h)
        logits = jnp.dot(h, kernel, precision=precision, preferred_element_type=jnp.float32) + output.bias
        losses, pull_back = jax.vjp(lambda logits: jnp.where(counted, loss(logits, *args), 0.0), logits)
        if not with_gradients:
            return losses, jnp.zeros((size, 0), h.dtype), Output(jnp.zeros((0, 0)), jnp.zeros(0))
        (dlogits,) = pull_back(jnp.ones_like(losses))
        dlogits = dlogits.astype(h.dtype)
        # The bias' gradient as a product too: on CPU a sum over rows takes as long as all the rest.
        dkernel, dbias = (
            jnp.einsum("c...,cv->...v", x, dlogits, precision=precision, preferred_element_type=jnp.float32)
            for x in (h, jnp.ones(size, h.dtype))
        )
        return losses, jnp.dot(dlogits, kernel.T, precision=precision), Output(dkernel, dbias)

    def one_chunk(index: Array, carry: tuple[Array, Array, Output]) -> tuple[Array, Array, Output]:
        losses, dhidden, doutput = carry
        start = index * size
        positions = jax.lax.dynamic_slice_in_dim(order, start, size, axis=1)
        h, own_args = jax.tree.map(lambda x: _take(x, positions), (hidden, args))
        new, dnew, dpart = jax.vmap(one_shard)(h, own_args, start + jnp.arange(size) < count[:, None])
        losses = jax.lax.dynamic_update_slice_in_dim(losses, new, start, axis=1)
        dhidden = jax.lax.dynamic_update_slice_in_dim(dhidden, dnew, start, axis=1)
        return losses, dhidden, jax.tree.map(jnp.add, doutput, dpart)

    # Each shard's gradient of the output layer stays its own until the end: devices add them up once, not every chunk.
    kernel_shape, bias_shape = ((width, vocab_size), (vocab_size,)) if with_gradients else ((0, 0), (0,))
    carry = (
        jnp.zeros(order.shape),
        jnp.zeros((*order.shape, width if with_gradients else 0), kernel.dtype),
        Output(jnp.zeros((shards, *kernel_shape)), jnp.zeros((shards, *bias_shape))),
    )
    losses, dhidden, doutput = jax.lax.fori_loop(0, -(-count.max() // size), one_chunk, carry)
    losses, dhidden = _take(losses, place), _take(dhidden, place)
    doutput = Output(*(x.sum(axis=0) for x in doutput))
    return losses.reshape(batch, length), dhidden.reshape(batch, length, -1), doutput


def _take(x: Float[Array, "s n *k"], at: Int[Array, "s c"]) -> Float[Array, "s c *k"]:
    """Those of every shard's positions."""
    return jax.vmap(lambda x, at: x[at])(x, at)
