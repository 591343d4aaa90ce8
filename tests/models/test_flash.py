"""The kernels in the interpreter, against the plain masked softmax of rotated queries and keys."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.models import attention, flash
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.layer import rotate
from bd3_jax.models.network import rotary_angles


def plain(q, k, v, pattern):
    """On `[b, s, L, d]`."""
    rotary = rotary_angles(jnp.arange(pattern.length), pattern.head_dim)
    heads = lambda x: jnp.moveaxis(x.reshape(*x.shape[:3], -1, pattern.head_dim), 3, 1)
    q, k, v = rotate(heads(q), *rotary), rotate(heads(k), *rotary), heads(v)
    dense = attention.Dense()
    if pattern.copies:
        out = dense.block_diffusion(q, k, v, pattern.block_size)
    else:
        out = dense.block_causal(q[:, :, 0], k[:, :, 0], v[:, :, 0], pattern.block_size)[:, :, None]
    return jnp.moveaxis(out, 1, 3).reshape(*out.shape[0:1], *out.shape[2:4], -1)


@pytest.mark.parametrize(
    ("length", "block_size", "copies", "with_clean", "head_dim", "tile"),
    [
        (256, 4, 1, True, 64, 128),
        (256, 128, 1, False, 64, 256),  # the last layer: no clean queries
        (128, 8, 2, True, 64, 128),  # two noised copies
        (384, 12, 0, True, 128, 128),  # one head a program; blocks across tiles
        (256, 256, 0, True, 32, 128),  # all to all; four heads a program
        (256, 1, 0, True, 64, 256),  # causal
    ],
)
def test_values_and_gradients(length, block_size, copies, with_clean, head_dim, tile):
    pattern = Pattern(length, block_size, copies, head_dim, tile, interpret=True)
    rng = np.random.default_rng(0)
    draw = lambda streams: jnp.asarray(rng.normal(size=(1, streams, length, 256)), jnp.float32)
    queries = copies + with_clean
    q, k, v, cotangent = draw(queries), draw(copies + 1), draw(copies + 1), draw(queries)
    rotary = rotary_angles(jnp.arange(length), head_dim)
    functions = [lambda *x: flash.attend(*x, rotary, pattern), lambda *x: plain(*x, pattern)]

    @jax.jit
    def both():
        found = [jax.vjp(function, q, k, v) for function in functions]
        return [(value, pull_back(cotangent)) for value, pull_back in found]

    for a, b in zip(*map(jax.tree.leaves, both()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_exact_as_its_operands():
    """Beside float32 on the same numbers: what is left is the rounding of operands and results."""
    pattern = Pattern(128, 16, 1, 64, 128, interpret=True)
    rotary = rotary_angles(jnp.arange(128), 64)
    x = [jax.random.normal(jax.random.key(n), (1, 2, 128, 128)).astype(jnp.bfloat16) for n in range(3)]
    wide = flash.attend(*(each.astype(jnp.float32) for each in x), rotary, pattern)
    narrow = flash.attend(*x, rotary, pattern)
    assert narrow.dtype == jnp.bfloat16
    assert jnp.abs(narrow - wide).max() < 0.02 * jnp.abs(wide).max()


def test_how_many_scores_it_declares():
    """By hand, in tiles of 128. B = 4: a band of noised queries, the tiles of clean keys before and with each tile."""
    assert Pattern(256, 4, 1, 64, 128).scores(1) == (2 + 1 + 2) * 128**2
    assert Pattern(256, 4, 1, 64, 128).scores(2) == (2 + 1 + 2 + 1 + 2) * 128**2
    assert Pattern(256, 4, 1, 64, 256).scores(1) == 256 * 128 + 256**2
    assert Pattern(256, 128, 1, 64, 128).scores(1) == (2 + 0 + 1) * 128**2  # the first block sees nothing clean
    assert Pattern(256, 256, 0, 64, 128).scores(1) == 256**2
    assert Pattern(384, 1, 0, 64, 128).scores(1) == (1 + 2 + 3) * 128**2


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "block_size", "copies", "holds"),
    [
        (1024, 12, 64, 4, 1, True),
        (128, 12, 64, 128, 1, True),
        (1024, 12, 64, 12, 1, False),  # blocks that cross a band's border
        (1024, 12, 64, 12, 0, True),
        (1000, 12, 64, 4, 1, False),  # not a multiple of 128
        (1024, 3, 64, 4, 1, False),  # half a register
        (1024, 12, 48, 4, 1, False),
        (4096, 12, 64, 16, 1, True),
        (8192, 12, 64, 16, 1, False),  # the rows do not fit
    ],
)
def test_where_it_is_used(length, heads, head_dim, block_size, copies, holds):
    assert flash.supports(length, heads, head_dim, block_size, copies, jnp.dtype("bfloat16")) == holds


def test_operands_of_float32_take_more_memory():
    held = [flash.supports(length, 12, 64, 4, 1, jnp.dtype("float32")) for length in (2048, 4096)]
    assert held == [True, False]


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 8), ("ar", 0), ("sedd", 0)])
def test_a_network_with_it(toy_lm, random_params, monkeypatch, objective, block_size):
    """Hidden states and gradients, beside the decomposed form; SEDD has an adaLN of its own for every row."""
    monkeypatch.setattr("bd3_jax.models.network.Pattern", functools.partial(Pattern, interpret=True))
    model = toy_lm(objective, block_size, length=128, width=128, num_heads=2, dropout=0.0)
    params, rng = random_params(model, scale=0.1), np.random.default_rng(0)
    tokens, clean = rng.integers(0, 11, (2, 2, 128))
    streams = {"clean": clean} if objective == "bd3lm" else {}
    sigma = {"sigma": jnp.array([0.3, 2.0])} if objective == "sedd" else {}

    def loss(network, params):
        hidden = network.apply(params, tokens, model.block_size, **streams, **sigma)
        return (hidden**3).mean(), hidden

    with_it = dataclasses.replace(model.network, platform="tpu")
    assert with_it.settled.attention == "flash"
    networks = model.network, with_it
    results = [jax.jit(jax.value_and_grad(lambda p, n=n: loss(n, p), has_aux=True))(params) for n in networks]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


ON_TWO_DEVICES = """
import jax, numpy as np
from bd3_jax.models import flash
from bd3_jax.models.flash_kernels import Pattern
from bd3_jax.models.network import rotary_angles

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(SHAPE), ("data", "fsdp", "tensor"))
pattern, rotary = Pattern(128, 16, 1, 64, 128, interpret=True), rotary_angles(np.arange(128), 64)
x = [jax.random.normal(jax.random.key(n), (2, 2, 128, 256)) for n in range(3)]
alone = flash.attend(*x, rotary, pattern)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    run = jax.jit(lambda *x: flash.attend(*x, rotary, pattern))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, None, "tensor"))
    out = run(*(jax.device_put(each, split) for each in x))
    assert [flash.supports(128, heads, 64, 16, 1, x[0].dtype) for heads in (2, 4)] == HOLDS
assert out.sharding.shard_shape(out.shape) == HELD, out.sharding
np.testing.assert_allclose(out, alone, atol=1e-6)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "held", "holds"),
    [((1, 2, 1), (1, 2, 128, 256), [True, True]), ((1, 1, 2), (2, 2, 128, 128), [False, True])],
)
def test_each_device_has_rows_and_heads_of_its_own(shape, held, holds):
    """Two heads of 64 on two devices would be half a register each."""
    code = ON_TWO_DEVICES.replace("SHAPE", str(shape)).replace("HELD", str(held)).replace("HOLDS", str(holds))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
