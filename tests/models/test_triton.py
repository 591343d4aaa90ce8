"""The kernels for GPUs: what they declare, and that they lower. Their values are in test_attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.models import attention, triton
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.triton_kernels import visited


@pytest.mark.parametrize(
    ("length", "block_size", "copies"), [(64, 4, 1), (96, 12, 1), (64, 64, 1), (64, 8, 2), (64, 1, 0)]
)
def test_every_tile_that_is_visited_has_something_to_see(length, block_size, copies):
    """And every other one has nothing."""
    tile = 16
    mask = attention.block_diffusion_mask(length, block_size, copies)
    tiles = mask.reshape(mask.shape[0] // tile, tile, -1, tile).any((1, 3))
    for streams in {copies, copies + 1} - {0}:
        expected = tiles[: streams * length // tile].sum() * tile**2
        assert visited(Pattern(length, block_size, copies, 16, tile), streams) == expected


@pytest.mark.parametrize(
    ("length", "head_dim", "most", "holds"),
    [
        (1024, 64, 64, True),
        (1040, 64, 64, True),  # in tiles of 16
        (1000, 64, 64, False),  # of 8
        (1024, 64, 8, False),
        (1024, 48, 64, False),
        (1024, 8, 64, False),
    ],
)
def test_where_it_is_used(length, head_dim, most, holds):
    assert triton.supports(length, head_dim, most) == holds


def test_bfloat16_is_as_exact_as_its_operands():
    """Beside float32 on the same numbers: what is left is the rounding of operands and results."""
    backend = attention.Triton(16, interpret=True)
    x = [jax.random.normal(jax.random.key(n), (1, 1, 2, 32, 16)).astype(jnp.bfloat16) for n in range(4)]

    @jax.jit
    def both(*x):
        value, pull_back = jax.vjp(lambda *x: backend.block_diffusion(*x, 4), *x[:3])
        return value, *pull_back(x[3])

    for narrow, wide in zip(both(*x), both(*(each.astype(jnp.float32) for each in x)), strict=True):
        assert narrow.dtype == jnp.bfloat16
        assert jnp.abs(narrow - wide).max() < 0.02 * jnp.abs(wide).max()


@pytest.mark.parametrize("block_size", [4, 12])
def test_three_kernels_lower_for_a_gpu(block_size):
    """To Triton's own language; it takes the extra `cuda` to compile them."""
    backend = attention.get_backend("triton", 64, 192)
    x = jax.ShapeDtypeStruct((2, 3, 2, 192, 64), jnp.bfloat16)
    gradients = jax.grad(
        lambda *x: backend.block_diffusion(*x, block_size).astype(jnp.float32).sum(), argnums=(0, 1, 2)
    )
    lowered = jax.jit(gradients).trace(x, x, x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for kernel in ("forward", "backward_queries", "backward_keys"):
        assert text.count(f'name = "triton_{kernel}"') == 1


@pytest.mark.slow
def test_a_network_with_it(toy_lm, random_params, monkeypatch):
    """Hidden states and gradients of two noised copies, beside the decomposed form."""
    lm = toy_lm("bd3lm", 8, length=32, width=32, num_layers=2, num_heads=2, dropout=0.0)
    params, rng = random_params(lm, scale=0.1), np.random.default_rng(0)
    clean, tokens = rng.integers(0, 11, (2, 32)), rng.integers(0, 11, (4, 32))

    def run():
        def loss(params):
            hidden = lm.network.apply(params, tokens, 8, clean=clean)
            return (hidden**3).mean(), hidden

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = run()
    monkeypatch.setattr(attention, "get_backend", lambda name, chunk, length: attention.Triton(16, interpret=True))
    for a, b in zip(*map(jax.tree.leaves, (run(), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
