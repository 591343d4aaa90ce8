"""Losses in chunks of counted positions, and gradients computed beside them, against all logits and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import objectives, output_loss
from bd3_jax.diffusion.output_loss import Chunks, Output

BATCH, LENGTH, WIDTH, V = 4, 13, 5, 7  # a prime length: no chunk but 1 divides it
MASK = V - 1
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
OUTPUT = Output(jnp.asarray(RNG.normal(size=(WIDTH, V)), jnp.float32), jnp.asarray(RNG.normal(size=V), jnp.float32))
X0 = jnp.asarray(RNG.integers(0, V - 1, (BATCH, LENGTH)))
WEIGHT = jnp.asarray(RNG.uniform(0.5, 2, (BATCH, LENGTH)), jnp.float32)
SIGMA = jnp.asarray(RNG.uniform(0.1, 3, (BATCH, LENGTH)), jnp.float32)

# Name -> loss of logits, and its arguments.
LOSSES = {
    "ar": (lambda logits, x0: objectives.ar_loss(logits, x0, MASK), lambda xt: (X0,)),
    "subs": (lambda logits, *args: objectives.subs_loss(logits, *args, MASK), lambda xt: (X0, xt, WEIGHT)),
    "sedd": (lambda logits, *args: objectives.sedd_loss(logits, *args, MASK), lambda xt: (X0, xt, SIGMA, WEIGHT)),
}
# Which positions count: a share of them, one row alone, none, all.
COUNTED = {
    "some": RNG.random((BATCH, LENGTH)) < 0.4,
    "a row": np.arange(BATCH)[:, None] == np.full(LENGTH, 2),
    "none": np.zeros((BATCH, LENGTH), bool),
    "all": np.ones((BATCH, LENGTH), bool),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("counted", COUNTED)
def test_equals_autodiff_through_all_logits(name, counted):
    loss, arguments = LOSSES[name]
    counted = jnp.asarray(COUNTED[counted])
    args = arguments(jnp.where(counted, MASK, X0))

    def plain(hidden, output):
        losses = jnp.where(counted, loss(hidden @ output.kernel + output.bias, *args), 0)
        return 3 * losses.sum(), losses

    def gradients(function):
        return jax.tree.leaves(jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(HIDDEN, OUTPUT))

    expected = gradients(plain)
    # One position a chunk; a last chunk that is not full; shards with a count each.
    for max_logits, shards in ((1, 1), (5 * V, 1), (3 * V, 2)):

        def ours(hidden, output, chunks=Chunks(max_logits, shards)):  # noqa: B008
            total, losses = output_loss.summed(loss, chunks, hidden, output, args, counted)
            return 3 * total, losses

        for value, reference in zip(gradients(ours), expected, strict=True):
            np.testing.assert_allclose(value, reference, rtol=1e-5, atol=1e-5)
        # Without gradients the losses are the same.
        np.testing.assert_allclose(ours(HIDDEN, OUTPUT)[1], expected[1], rtol=1e-5, atol=1e-5)


def test_bfloat16_states():
    """With gradients and without, near the float32 losses; the output layer's gradient is float32."""
    loss, arguments = LOSSES["ar"]
    counted, hidden = jnp.ones_like(X0, bool), HIDDEN.astype(jnp.bfloat16)

    def ours(hidden, output):
        return output_loss.summed(loss, Chunks(5 * V, 2), hidden, output, arguments(None), counted)

    expected = ours(HIDDEN, OUTPUT)[1]
    np.testing.assert_allclose(ours(hidden, OUTPUT)[1], expected, rtol=0.05, atol=0.05)
    (_, losses), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, OUTPUT)
    np.testing.assert_allclose(losses, expected, rtol=0.05, atol=0.05)
    assert [leaf.dtype for leaf in jax.tree.leaves(gradients)] == [jnp.bfloat16, jnp.float32, jnp.float32]


def test_single_losses_have_no_gradient():
    loss, arguments = LOSSES["ar"]

    def weighted(hidden):
        _, losses = output_loss.summed(loss, Chunks(1000, 1), hidden, OUTPUT, arguments(None), jnp.ones_like(X0, bool))
        return (losses * WEIGHT).sum()

    np.testing.assert_array_equal(jax.grad(weighted)(HIDDEN), jnp.zeros_like(HIDDEN))


def test_only_a_chunk_of_logits_exists():
    loss, arguments = LOSSES["ar"]

    def total(hidden, output):
        return output_loss.summed(loss, Chunks(2 * V, 2), hidden, output, arguments(None), jnp.ones_like(X0, bool))[0]

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(HIDDEN, OUTPUT))
    assert f"f32[2,2,{V}]" in text  # shards, positions, V
    assert not any(f"[{rows},{V}]" in text for rows in (BATCH * LENGTH, f"{BATCH},{LENGTH}", f"2,{2 * LENGTH}"))
