"""The network: initialisation, dropout, conditioning, precision, and the cache against the block-causal pass."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from bd3_jax.config import ModelConfig
from bd3_jax.models import transformer
from bd3_jax.models.network import Network

RNG = np.random.default_rng(0)


def tokens(lm, batch=2, length=None):
    return RNG.integers(0, lm.ids.vocab_size, (batch, length or lm.length)).astype(np.int32)


def replaced(lm, **model):
    network = dataclasses.replace(lm.network, model=dataclasses.replace(lm.network.model, **model))
    return dataclasses.replace(lm, network=network)


def small(**model):
    """The paper's small model over GPT-2's vocabulary and the mask."""
    settings = dict(
        length=1024, width=768, num_layers=12, num_heads=12, cond_dim=128, dropout=0.1,
        dtype="float32", attention="auto", attention_chunk=256, scan_unroll=1, remat="none", max_logits=0,
    )  # fmt: skip
    return ModelConfig(**(settings | model))


def count(network):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network.abstract_params()))


def test_parameter_count():
    assert count(Network(small(), 50258, adaln=True, time_conditioned=False)) == pytest.approx(169.6e6, abs=5e4)
    embeddings = 2 * 50258 * 768 + 50258
    layers = 12 * (12 * 768**2 + 7 * 768) + 768  # two matrices of 4 d^2, 4 d^2 of attention, 5 d of biases, norms
    assert count(Network(small(), 50258, adaln=False, time_conditioned=False)) == embeddings + layers


def test_initialisation(toy_lm):
    lm = toy_lm("mdlm", width=64, num_heads=4, cond_dim=32, vocab_size=200, num_layers=3)
    params = jax.jit(lm.network.init)(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, lm.network.abstract_params())
    uniform = {  # fan-in of each
        ("embedding",): 64,
        ("time", "input", "kernel"): 256,
        ("time", "input", "bias"): 256,
        ("time", "output", "kernel"): 32,
        ("time", "output", "bias"): 32,
        ("blocks", "qkv"): 64,
        ("blocks", "attention_out"): 64,
        ("blocks", "mlp_in", "kernel"): 64,
        ("blocks", "mlp_in", "bias"): 64,
        ("blocks", "mlp_out", "kernel"): 256,
        ("blocks", "mlp_out", "bias"): 256,
    }
    constant = {("blocks", "attention_norm"): 1, ("blocks", "mlp_norm"): 1, ("final_norm",): 1}
    for part in (("blocks", "modulation"), ("final_modulation",), ("output",)):
        constant |= {(*part, "kernel"): 0, (*part, "bias"): 0}

    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, leaf = tuple(entry.key for entry in path), np.asarray(leaf)
        seen.add(name)
        assert leaf.dtype == np.float32
        if name in constant:
            assert (leaf == constant[name]).all()
            continue
        bound = 1 / math.sqrt(uniform[name])
        assert np.abs(leaf).max() <= bound
        assert np.abs(leaf).max() > 0.85 * bound
        assert leaf.mean() == pytest.approx(0, abs=4 * bound / math.sqrt(3 * leaf.size))
        assert leaf.std() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(leaf.size))
    assert seen == uniform.keys() | constant.keys()

    layers = np.asarray(params["blocks"]["qkv"])
    assert not np.array_equal(layers[0], layers[1])
    again = jax.jit(lm.network.init)(jax.random.key(0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    assert not np.array_equal(params["embedding"], jax.jit(lm.network.init)(jax.random.key(1))["embedding"])


@pytest.mark.parametrize("objective", ["ar", "sedd"])
def test_logical_axes_fit_the_shapes(toy_lm, objective):
    lm = toy_lm(objective, width=32, num_heads=4, cond_dim=8, vocab_size=50, num_layers=3)
    sizes = {"layers": {3}, "vocab": {50}, "embed": {32}, "heads": {4}, "mlp": {128}, "cond": {8}}
    is_axes = lambda leaf: isinstance(leaf, tuple)
    axes, treedef = jax.tree.flatten(lm.network.logical_axes(), is_leaf=is_axes)
    leaves, expected = jax.tree.flatten(lm.network.abstract_params())
    assert treedef == expected
    for names, leaf in zip(axes, leaves, strict=True):
        assert len(names) == leaf.ndim
        assert all(name is None or size in sizes[name] for name, size in zip(names, leaf.shape, strict=True))


def test_dropout(toy_lm, random_params):
    """Only with a key, different for every key, on average without effect on what is added, and gone at rate 0."""
    lm = toy_lm("bd3lm", block_size=3)
    params, x, clean = random_params(lm), tokens(lm), tokens(lm)
    apply = jax.jit(lambda key: lm.network.apply(params, x, 3, clean=clean, dropout_key=key))
    plain = apply(None)
    np.testing.assert_array_equal(plain, apply(None))
    first, second = apply(jax.random.key(0)), apply(jax.random.key(1))
    np.testing.assert_array_equal(first, apply(jax.random.key(0)))
    assert not np.allclose(first, plain)
    assert not np.allclose(first, second)
    undropped = replaced(lm, dropout=0.0).network.apply(params, x, 3, clean=clean, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(undropped, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("silent", ["attention_out", "mlp_out"])
def test_dropout_of_each_branch(toy_lm, random_params, monkeypatch, silent):
    """One layer, one branch silent, no final norm: x + branch, whose entries are 0 or scaled by 1 / (1 - rate)."""
    monkeypatch.setattr("bd3_jax.models.network.finish", lambda x, scale, shift: x)
    lm = toy_lm("ar", num_layers=1, dropout=0.25, width=64, length=64, attention_chunk=64)
    params, x = random_params(lm), tokens(lm, 1)
    params["blocks"][silent] = jax.tree.map(np.zeros_like, params["blocks"][silent])
    run = lambda key: np.asarray(lm.network.apply(params, x, 1, dropout_key=key)) - params["embedding"][x]
    branch, dropped = run(None), run(jax.random.key(0))
    kept = np.abs(dropped) > 1e-6
    np.testing.assert_allclose(dropped[kept], branch[kept] / 0.75, rtol=1e-3, atol=1e-4)
    assert 1 - kept.mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / kept.size))


def test_layers_drop_independently(toy_lm, random_params, monkeypatch):
    """Layer n adds 3^n wherever it is not dropped, so that a sum tells which layers were."""
    monkeypatch.setattr("bd3_jax.models.network.finish", lambda x, scale, shift: x)
    lm = toy_lm("ar", num_layers=3, dropout=0.5, width=64, length=64, attention_chunk=64)
    params, x = random_params(lm), tokens(lm, 1)
    params["blocks"]["attention_out"][:] = 0
    params["blocks"]["mlp_out"]["kernel"][:] = 0
    params["blocks"]["mlp_out"]["bias"][:] = np.array([1, 3, 9])[:, None] / 2  # kept entries are doubled
    added = np.asarray(lm.network.apply(params, x, 1, dropout_key=jax.random.key(0))) - params["embedding"][x]
    values, counts = np.unique(np.round(added).astype(int), return_counts=True)
    assert values.tolist() == [0, 1, 3, 4, 9, 10, 12, 13]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_unrolling_changes_nothing(toy_lm, random_params):
    lm = toy_lm("bd3lm", block_size=4, num_layers=4, attention_chunk=12)
    params, x = random_params(lm, scale=0.1), tokens(lm)

    def run(unroll):
        network = replaced(lm, scan_unroll=unroll).network
        return jax.jit(lambda p: network.apply(p, x, 4, dropout_key=jax.random.key(0)))(params)

    expected = run(1)
    for unroll in (2, 50):  # the scan is over 3 layers
        np.testing.assert_allclose(run(unroll), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["ar", "sedd", "bd3lm"])
def test_other_platforms_compute_the_same(toy_lm, random_params, objective):
    """For a TPU products go over several axes; with adaLN for each sequence (sedd), for all together, and without."""
    lm = toy_lm(objective, 4 if objective == "bd3lm" else 0)
    params, tokens = random_params(lm), np.random.default_rng(0).integers(0, 10, (3, 12))
    sigma = jnp.array([0.2, 1.0, 3.0]) if objective == "sedd" else None
    clean = tokens[::-1] if objective == "bd3lm" else None

    def run(platform):
        network = dataclasses.replace(lm.network, platform=platform)
        hidden = lambda params: network.apply(params, tokens, lm.block_size, clean=clean, sigma=sigma)
        loss = lambda params: (hidden(params) ** 2 * np.arange(12)[:, None]).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    (wanted, gradients), (found, others) = run("cpu"), run("tpu")
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    for gradient, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max())


def test_time_conditioning(toy_lm, random_params):
    sedd, mdlm = toy_lm("sedd"), toy_lm("mdlm")
    params, x = random_params(sedd), tokens(sedd)
    run = lambda lm, sigma: np.asarray(lm.network.apply(params, x, lm.length, sigma=jnp.asarray(sigma, jnp.float32)))
    both = run(sedd, [0.5, 2.0])
    np.testing.assert_allclose(both[0], run(sedd, [0.5, 0.5])[0], rtol=1e-5, atol=1e-5)  # each sequence its own
    assert not np.allclose(both[1], run(sedd, [0.5, 0.5])[1])
    np.testing.assert_array_equal(run(mdlm, [0.5, 2.0]), run(mdlm, [0.1, 0.1]))
    np.testing.assert_allclose(run(mdlm, [0.5, 2.0]), run(sedd, [0.0, 0.0]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs sigma"):
        sedd.network.apply(params, x, sedd.length)


def test_time_features():
    """cos(sigma f) then sin(sigma f), f = exp(-ln 10000 i / 128): read off through an identity for the first Linear."""
    embed = transformer.TimeEmbedding(256, rngs=nnx.Rngs(0))
    for linear in (embed.input, embed.output):
        linear.kernel[...] = jnp.eye(256)
        linear.bias[...] = jnp.zeros(256)
    silu = lambda v: v / (1 + np.exp(-v))
    angles = 1.7 * np.exp(-np.log(10000) * np.arange(128) / 128)
    expected = silu(silu(np.concatenate([np.cos(angles), np.sin(angles)])))
    np.testing.assert_allclose(embed(jnp.array([1.7]))[0], expected, atol=1e-5)


def test_bfloat16_is_close_to_float32(toy_lm):
    lm = toy_lm("bd3lm", block_size=4, width=64, num_heads=4)
    params, x, clean = jax.jit(lm.network.init)(jax.random.key(0)), tokens(lm), tokens(lm)
    params["output"]["kernel"] = jax.random.normal(jax.random.key(1), params["output"]["kernel"].shape) * 0.1

    def logits(lm):
        hidden = jax.jit(lambda p: lm.network.apply(p, x, 4, clean=clean))(params)
        return hidden.dtype, lm.network.unembed(params, hidden)

    kind, ours = logits(replaced(lm, dtype="bfloat16"))
    _, expected = logits(lm)
    assert kind == jnp.bfloat16
    assert ours.dtype == jnp.float32
    error = np.abs(ours - expected).max()
    assert 1e-5 < error < 0.03 * np.abs(expected).max()
    for model, dtype in ((lm, jnp.float32), (replaced(lm, dtype="bfloat16"), jnp.bfloat16)):
        assert {leaf.dtype for leaf in jax.tree.leaves(model.network.init_cache(1, 4).keys)} == {jnp.dtype(dtype)}


def test_length_must_be_divisible(toy_lm, random_params):
    lm = toy_lm("bd3lm", block_size=4)
    with pytest.raises(ValueError, match="block size 4 must divide the length 6"):
        lm.network.apply(random_params(lm), tokens(lm, length=6), 4)


@pytest.mark.parametrize(("objective", "block_size"), [("ar", 1), ("bd3lm", 1), ("bd3lm", 3), ("bd3lm", 12)])
def test_cache_equals_the_block_causal_pass(toy_lm, random_params, objective, block_size):
    """Block by block, in a batch whose sequences begin one after the other."""
    lm = toy_lm(objective, block_size=block_size)
    params, x = random_params(lm), tokens(lm, 3)
    expected = jax.jit(lambda x: lm.network.apply(params, x, block_size))(x)
    late = block_size * np.arange(3)
    cache = dataclasses.replace(lm.network.init_cache(3, 12), length=jnp.asarray(-late))
    decode = jax.jit(lambda block, cache: lm.network.decode(params, block, cache))
    for start in range(0, 12 + late[-1], block_size):
        done = start - late
        firsts = np.clip(done, 0, 12 - block_size)
        block = np.stack([row[first : first + block_size] for row, first in zip(x, firsts, strict=True)])
        hidden, kv = decode(block, cache)
        for row in np.flatnonzero((done >= 0) & (done < 12)):
            np.testing.assert_allclose(
                hidden[row], expected[row, done[row] : done[row] + block_size], rtol=1e-4, atol=1e-4
            )
        cache = cache.append(kv)


def test_a_slid_cache_is_attention_over_the_last_tokens(toy_lm, random_params):
    """With one layer nothing else of the past is left: the same as a fresh pass over the window, positions shifted."""
    lm, block_size, capacity = toy_lm("bd3lm", block_size=2, num_layers=1), 2, 4
    params, x = random_params(lm), tokens(lm, 2, length=14)
    cache = lm.network.init_cache(2, capacity)
    decode = jax.jit(lambda block, cache: lm.network.decode(params, block, cache))
    apply = jax.jit(lambda window: lm.network.apply(params, window, block_size))
    for start in range(0, 14, block_size):
        hidden, kv = decode(x[:, start : start + block_size], cache)
        window = x[:, max(0, start - capacity) : start + block_size]
        # Rotary angles differ by a shift, hence not to the last digit.
        np.testing.assert_allclose(hidden, apply(window)[:, -block_size:], rtol=1e-3, atol=1e-3)
        cache = cache.append(kv)
    assert cache.length.tolist() == [14, 14]
