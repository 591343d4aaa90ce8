"""Patterns against their definition, and every backend against the plain masked softmax over [2L, 2L]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bd3_jax.models import attention

# L, B: from B = 1 to B = L; no L is a power of two.
SHAPES = [(6, 1), (12, 3), (6, 6)]
# Chunks within a block and of several; few, and more than have a program of their own; the last one cut short.
BACKENDS = [("dense", 1), ("decomposed", 1), ("decomposed", 4), ("decomposed", 100)]
# A block in pieces of which the last is padded, and more chunks than have a program of their own.
PADDED = (40, 5, "decomposed", 3)
CASES = [(*shape, *backend) for shape in SHAPES for backend in BACKENDS] + [PADDED]


def visible(query, key, length, block_size, copies=1):
    """Block Diffusion, appendix B.6, one pair at a time; the clean stream comes after `copies` noised ones."""
    query_stream, key_stream = query // length, key // length
    query_block, key_block = query % length // block_size, key % length // block_size
    if key_stream < copies:
        return query_stream == key_stream and query_block == key_block
    return key_block < query_block or (query_stream == copies and key_block == query_block)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("length", "block_size"), SHAPES)
def test_masks(length, block_size, copies):
    positions = range((copies + 1) * length)
    expected = [[visible(query, key, length, block_size, copies) for key in positions] for query in positions]
    np.testing.assert_array_equal(attention.block_diffusion_mask(length, block_size, copies), expected)
    clean = [[key // block_size <= query // block_size for key in range(length)] for query in range(length)]
    np.testing.assert_array_equal(attention.block_causal_mask(length, block_size), clean)


def operands(streams, length, seed=0):
    """q, k, v and a cotangent, `[b, h, streams, L, k]`; scores of a size that makes the softmax uneven."""
    return [jax.random.normal(key, (2, 3, streams, length, 4)) * 2 for key in jax.random.split(jax.random.key(seed), 4)]


def reference(q, k, v, mask):
    """Softmax over the visible keys alone, for operands `[b, h, L, k]`."""
    weights = jnp.exp(jnp.einsum("bhqd,bhkd->bhqk", q, k) / jnp.sqrt(q.shape[-1])) * mask
    return jnp.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


def assert_same(ours, expected, args):
    """Equal values and gradients; the last of args is the cotangent."""

    def both(function):
        *inputs, cotangent = args
        value, pull_back = jax.vjp(function, *inputs)
        return value, pull_back(cotangent)

    results = jax.jit(lambda: (both(ours), both(expected)))()
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("length", "block_size", "name", "chunk"), CASES)
def test_block_diffusion(length, block_size, name, chunk):
    backend = attention.get_backend(name, chunk, length)

    def expected(q, k, v):
        mask = jnp.asarray([[visible(i, j, length, block_size) for j in range(2 * length)] for i in range(2 * length)])
        q, k, v = (jnp.concatenate([x[:, :, 0], x[:, :, 1]], axis=2) for x in (q, k, v))
        return jnp.stack(jnp.split(reference(q, k, v, mask), 2, axis=2), axis=2)

    q, k, v, cotangent = operands(2, length)
    assert_same(lambda *x: backend.block_diffusion(*x, block_size), expected, (q, k, v, cotangent))
    # The noised stream alone, as the last layer asks for it.
    noised = backend.block_diffusion(q[:, :, :1], k, v, block_size)
    np.testing.assert_allclose(noised, expected(q, k, v)[:, :, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "length"),
    [
        (attention.Dense(), 12),
        (attention.Decomposed(4), 12),
        (attention.Splash(128, interpret=True), 128),
        (attention.Triton(16, interpret=True), 48),
    ],
)
def test_noised_copies_share_the_clean_stream(backend, length):
    """Each copy's result is that beside the clean stream alone, in values and gradients."""
    block_size = length // 4
    q, k, v, cotangent = (x[:1, :2] for x in operands(3, length))

    def one_by_one(q, k, v):
        pairs = [[x[:, :, [copy, 2]] for x in (q, k, v)] for copy in range(2)]
        first, second = (attention.Dense().block_diffusion(*pair, block_size) for pair in pairs)
        return jnp.concatenate([first[:, :, :1], second], axis=2)

    assert_same(lambda *x: backend.block_diffusion(*x, block_size), one_by_one, (q, k, v, cotangent))
    noised = backend.block_diffusion(q[:, :, :2], k, v, block_size)
    np.testing.assert_allclose(noised, one_by_one(q, k, v)[:, :, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "block_size", "name", "chunk"), CASES)
def test_block_causal(length, block_size, name, chunk):
    backend = attention.get_backend(name, chunk, length)
    mask = jnp.asarray([[j // block_size <= i // block_size for j in range(length)] for i in range(length)])
    args = [x[:, :, 0] for x in operands(1, length)]
    assert_same(lambda *x: backend.block_causal(*x, block_size), lambda *x: reference(*x, mask), args)


@pytest.mark.parametrize(
    ("kernels", "tile", "length", "block_size"),
    [
        (attention.Splash, 128, 256, 16),
        (attention.Splash, 128, 384, 24),
        (attention.Triton, 16, 48, 12),
        pytest.param(attention.Triton, 16, 32, 1, marks=pytest.mark.slow),
        pytest.param(attention.Triton, 16, 32, 32, marks=pytest.mark.slow),
    ],
)
def test_kernels_on_several_tiles(kernels, tile, length, block_size):
    """In the interpreter: block sizes that divide a tile, that do not, and that are larger."""
    backend = kernels(tile, interpret=True)
    dense = attention.Dense()
    q, k, v, cotangent = (x[:1, :2] for x in operands(2, length))
    both = [lambda *x, b=b: b.block_diffusion(*x, block_size) for b in (backend, dense)]
    assert_same(*both, (q, k, v, cotangent))
    noised = [lambda q, k, v, b=b: b.block_diffusion(q[:, :, :1], k, v, block_size) for b in (backend, dense)]
    np.testing.assert_allclose(noised[0](q, k, v), noised[1](q, k, v), rtol=1e-4, atol=1e-5)
    causal = [lambda *x, b=b: b.block_causal(*x, block_size) for b in (backend, dense)]
    assert_same(*causal, [x[:, :, 0] for x in (q, k, v, cotangent)])


def test_large_scores_do_not_overflow():
    q, k, v, _ = (x[:, :, 0] for x in operands(1, 6))
    out = attention.softmax_attention(q * 100, k * 100, v)
    best = jnp.einsum("bhqd,bhkd->bhqk", q, k).argmax(-1)
    np.testing.assert_allclose(out, jnp.take_along_axis(v, best[..., None], axis=2), rtol=1e-4, atol=1e-5)


def test_cached_sees_valid_entries_and_itself():
    q, k, v, _ = (x[:, :, 0] for x in operands(1, 2))
    _, old_k, old_v, _ = (x[:, :, 0] for x in operands(1, 5, seed=1))
    valid = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    out = attention.cached(q, k, v, old_k, old_v, jnp.asarray(valid)[:, None])
    for row in range(2):
        seen_k = jnp.concatenate([old_k[row, :, valid[row]].swapaxes(0, 1), k[row]], axis=1)
        seen_v = jnp.concatenate([old_v[row, :, valid[row]].swapaxes(0, 1), v[row]], axis=1)
        expected = reference(q[row][None], seen_k[None], seen_v[None], 1)[0]
        np.testing.assert_allclose(out[row], expected, rtol=1e-4, atol=1e-5)


def largest_array(jaxpr):
    """Most entries of any array in a jaxpr, constants and inner jaxprs included."""
    sizes = [v.aval.size for v in (*jaxpr.constvars, *jaxpr.invars)]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        sizes += [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize("block_size", [16, 4096])
def test_decomposed_never_builds_2l_by_2l(block_size):
    """At L = 4096 no array of the forward or backward pass comes near (2L)^2, or even L^2, entries."""
    length, chunk = 4096, 256
    x = jax.ShapeDtypeStruct((1, 1, 2, length, 8), jnp.float32)

    def loss(name):
        backend = attention.get_backend(name, chunk, length)
        return lambda q, k, v: backend.block_diffusion(q, k, v, block_size).sum()

    def largest(name):
        return largest_array(jax.make_jaxpr(jax.grad(loss(name), argnums=(0, 1, 2)))(x, x, x).jaxpr)

    assert largest("decomposed") <= chunk * (length + 2 * max(chunk, block_size))
    assert largest("dense") >= 4 * length**2  # so the walk does see such arrays
