"""Objectives bound to the network: identities between them, and what may depend on what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from bd3_jax.config_dict import from_config_dict
from bd3_jax.diffusion import likelihood, objectives
from bd3_jax.diffusion.output_loss import Chunks, Output
from bd3_jax.language_model import LanguageModel
from configs.base import get_config

RNG = np.random.default_rng(5)


eval_losses = jax.jit(LanguageModel.eval_losses, static_argnums=(0, 4))


def rows(lm, batch=3):
    """Clean tokens: any but the mask."""
    return RNG.integers(0, lm.ids.mask, (batch, lm.length)).astype(np.int32)


def next_token_nll(lm, params, x0, cached):
    """-log p(x_i | x_{<i}), asking for one position at a time, the current one masked, as a sampler does."""
    network, mask = lm.network, lm.ids.mask

    @jax.jit
    def step(position, cache):
        if cached:
            current = jnp.full((len(x0), 1), mask)
            hidden, _ = network.decode(params, current, cache)
            _, kv = network.decode(params, jax.lax.dynamic_slice_in_dim(x0, position, 1, axis=1), cache)
            cache = cache.append(kv)
        else:
            context = jnp.where(jnp.arange(lm.length) < position, x0, mask)
            hidden = network.apply(params, context, 1)[:, position][:, None]
        log_probs = objectives.subs_log_probs(network.unembed(params, hidden), jnp.full((len(x0), 1), mask), mask)
        return -jnp.take_along_axis(log_probs[:, 0], x0[:, position][:, None], axis=-1)[:, 0], cache

    x0, cache, losses = jnp.asarray(x0), network.init_cache(len(x0), lm.length), []
    for position in range(lm.length):
        loss, cache = step(position, cache)
        losses.append(loss)
    return np.stack(losses, axis=1)


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "cached"])
@pytest.mark.parametrize("ignore_bos", [True, False])
def test_block_size_1_is_an_exact_autoregressive_likelihood(toy_lm, random_params, cached, ignore_bos):
    lm = toy_lm("bd3lm", block_size=1, ignore_bos=ignore_bos)
    params, x0 = random_params(lm), rows(lm)
    ours = np.asarray(eval_losses(lm, params, x0, jax.random.key(0), "monte_carlo"))
    expected = next_token_nll(lm, params, x0, cached)
    if ignore_bos:
        expected[:, 0] = 0
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ours, eval_losses(lm, params, x0, jax.random.key(1), "low_variance"))
    assert lm.is_exact


def test_one_block_is_mdlm(toy_lm, random_params):
    """BD3-LM's pass over [xt ; x0], whose clean half nothing can see where B = L, gives MDLM's losses."""
    lm = toy_lm("mdlm")
    params, x0 = random_params(lm), rows(lm)
    draw = likelihood.draw_monte_carlo(jax.random.key(0), x0, 12, lm.noise, lm.ids.mask)
    hidden = lm.network.apply(params, draw.xt, 12, clean=x0)
    output, chunks = Output(**params["output"]), Chunks(1000, 1)
    _, ours = likelihood.token_losses("bd3lm", hidden, output, x0, draw, lm.ids.mask, chunks)
    assert (ours > 0).any()
    np.testing.assert_allclose(ours, lm.token_losses(params, x0, draw)[1], rtol=1e-4, atol=1e-4)


def test_only_the_objectives_that_draw_are_inexact(toy_lm):
    assert toy_lm("ar").is_exact
    assert not any(toy_lm(name, size).is_exact for name, size in (("mdlm", 12), ("sedd", 12), ("bd3lm", 2)))


# ------------------------------------------------------------------------------------------------ what depends on what


def influence(losses, x0, vocab_size):
    """[i, j]: whether changing x0[j] changes the loss of position i."""
    base = np.asarray(losses(x0))
    changed = np.zeros((x0.shape[1],) * 2, bool)
    for j in range(x0.shape[1]):
        other = x0.copy()
        other[:, j] = (other[:, j] + 1) % (vocab_size - 1)
        changed[:, j] = (np.abs(np.asarray(losses(other)) - base) > 1e-6).any(0)
    return changed


def test_ar_losses_depend_on_the_past_alone(toy_lm, random_params):
    lm = toy_lm("ar")
    params = random_params(lm)
    losses = jax.jit(lambda x0: eval_losses(lm, params, x0, jax.random.key(0), ""))
    expected = np.tril(np.ones((12, 12), bool))
    expected[0] = False  # nothing predicts position 0
    np.testing.assert_array_equal(influence(losses, rows(lm), lm.ids.vocab_size), expected)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_bd3lm_losses_depend_on_earlier_blocks_and_what_is_unmasked_in_their_own(toy_lm, random_params, block_size):
    lm = toy_lm("bd3lm", block_size=block_size, ignore_bos=False)
    params, mask = random_params(lm), np.zeros(12, bool)
    mask[[0, 1, 5, 6, 7, 9, 11]] = True

    @jax.jit
    def losses(x0):
        xt = jnp.where(mask, lm.ids.mask, x0)
        draw = likelihood.Draw(xt, jnp.ones(xt.shape), jnp.zeros((len(x0), 12 // block_size)))
        return lm.token_losses(params, x0, draw)[1]

    block = np.arange(12) // block_size
    same, earlier = block[:, None] == block, block[:, None] > block
    expected = mask[:, None] & (earlier | (same & ~mask) | np.eye(12, dtype=bool))
    np.testing.assert_array_equal(influence(losses, rows(lm), lm.ids.vocab_size), expected)


@pytest.mark.parametrize("objective", ["mdlm", "sedd"])
def test_masked_tokens_are_seen_by_no_one_else(toy_lm, random_params, objective):
    lm = toy_lm(objective)
    params, mask = random_params(lm), np.arange(12) % 3 == 0

    @jax.jit
    def losses(x0):
        xt = jnp.where(mask, lm.ids.mask, x0)
        draw = likelihood.Draw(xt, jnp.ones(xt.shape), jnp.full((len(x0), 1), 0.7))
        return lm.token_losses(params, x0, draw)[1]

    expected = mask[:, None] & (~mask | np.eye(12, dtype=bool))
    np.testing.assert_array_equal(influence(losses, rows(lm), lm.ids.vocab_size), expected)


# ------------------------------------------------------------------------------------------------------- losses as used


@pytest.mark.parametrize(("objective", "block_size"), [("ar", 1), ("mdlm", 12), ("sedd", 12), ("bd3lm", 4)])
def test_training_loss(toy_lm, random_params, objective, block_size):
    """The mean over counted tokens, noise and dropout from the key, and a gradient for every parameter."""
    lm = toy_lm(objective, block_size, attention_chunk=12)
    params, x0 = random_params(lm, scale=0.2), rows(lm)

    @jax.jit
    def run(key):
        loss = lambda p: lm.training_loss(p, x0, key, 1e-3, 1.0)
        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, per_token), gradient = run(jax.random.key(0))
    assert per_token.shape == (3, 12)
    assert (np.asarray(per_token[:, 0]) == 0).all()  # the BOS is kept, and AR has no target there
    counted = 3 * 11 if objective == "ar" else 3 * 12
    assert loss == pytest.approx(np.asarray(per_token).sum() / counted, rel=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path
    (other, _), _ = run(jax.random.key(1))
    assert other != loss


def test_noised_copies_are_rows_that_share_their_clean_half(toy_lm, random_params):
    """The loss and gradient of a batch in which every row is there three times, for the same draw."""
    lm = toy_lm("bd3lm", 4, dropout=0.0)
    params, x0 = random_params(lm), jnp.asarray(rows(lm))
    draw = likelihood.draw_training(jax.random.key(0), jnp.repeat(x0, 3, axis=0), 4, lm.noise, 1e-3, 1.0, lm.ids.mask)

    @jax.jit
    def run(params, x0):
        return jax.value_and_grad(lambda p: lm.token_losses(p, x0, draw), has_aux=True)(params)

    (_, shared), gradient = run(params, x0)
    (_, expected), expected_gradient = run(params, jnp.repeat(x0, 3, axis=0))
    np.testing.assert_allclose(shared, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    # In training: times are stratified over all copies, and the loss is the mean over all of them.
    copied = dataclasses.replace(lm, noise_copies=3)
    loss, per_token = jax.jit(copied.training_loss)(params, x0, jax.random.key(0), 1e-3, 1.0)
    assert per_token.shape == (9, 12)
    assert loss == pytest.approx(np.asarray(per_token).mean(), rel=1e-5)
    assert len({tuple(row) for row in np.asarray(per_token)[:3]}) == 3  # each copy has its own noise


def test_interval_reaches_the_noise(toy_lm, random_params):
    """A traced interval, as training passes it: above 0.5 weights are 1, so a loss is a plain -log p."""
    lm = toy_lm("bd3lm", block_size=4, resample=True, dropout=0.0, ignore_bos=False)
    params, x0 = jax.tree.map(jnp.zeros_like, random_params(lm)), rows(lm, 64)
    run = jax.jit(lambda low, high: lm.training_loss(params, x0, jax.random.key(0), low, high)[1])
    uniform = np.log(lm.ids.vocab_size - 1)
    masked = np.asarray(run(0.6, 0.9)) > 0
    np.testing.assert_allclose(np.asarray(run(0.6, 0.9))[masked], uniform, rtol=1e-5)
    assert set(masked.reshape(64, 3, 4).sum(-1).ravel()) == {3}  # the only count within [2.4, 3.6]
    low = np.asarray(run(0.2, 0.3))
    assert set((low > 0).reshape(64, 3, 4).sum(-1).ravel()) == {1}
    weights = low[low > 0] / uniform
    assert weights.min() >= 1 / 0.3 - 1e-3
    assert weights.max() <= 1 / 0.2 + 1e-3


@pytest.mark.slow
def test_uniform_model_has_the_entropy_of_the_vocabulary(toy_lm):
    """A fresh model predicts every token alike: ln(V - 1) nats a token, exactly or on average over the noise."""
    for objective, size in (("ar", 1), ("bd3lm", 1), ("bd3lm", 4), ("mdlm", 12)):
        lm = toy_lm(objective, size, attention_chunk=12)
        params, x0 = jax.jit(lm.network.init)(jax.random.key(0)), rows(lm, 400)
        losses = np.asarray(eval_losses(lm, params, x0, jax.random.key(1), "low_variance"), np.float64)
        per_row = losses[:, lm.counted(12)].mean(1)
        error = max(per_row.std(ddof=1) / 20, 1e-6)
        assert per_row.mean() == pytest.approx(np.log(lm.ids.vocab_size - 1), abs=4 * error)


def test_counted(toy_lm):
    assert toy_lm("ar", ignore_bos=False).counted(4).tolist() == [False, True, True, True]
    assert toy_lm("mdlm").counted(4).tolist() == [False, True, True, True]
    assert toy_lm("bd3lm", 4, ignore_bos=False).counted(4).tolist() == [True] * 4


def test_evaluation_uses_its_own_interval_and_no_dropout(toy_lm, random_params):
    lm = toy_lm("bd3lm", 4, low=0.45, high=0.55, resample=True)
    params, x0, key = random_params(lm), rows(lm), jax.random.key(0)
    plain = toy_lm("bd3lm", 4, dropout=0.0)
    for estimator in ("monte_carlo", "low_variance"):
        ours = eval_losses(lm, params, x0, key, estimator)
        np.testing.assert_array_equal(ours, eval_losses(plain, params, x0, key, estimator))
        np.testing.assert_array_equal(ours, eval_losses(lm, params, x0, key, estimator))
        assert not np.array_equal(ours, eval_losses(lm, params, x0, jax.random.key(1), estimator))
    assert not np.array_equal(
        eval_losses(lm, params, x0, key, "monte_carlo"), eval_losses(lm, params, x0, key, "low_variance")
    )


def test_a_time_conditioned_network_needs_one_time_a_row(toy_lm, random_params):
    def timed(lm):
        return dataclasses.replace(lm, network=dataclasses.replace(lm.network, time_conditioned=True))

    mdlm, blocks, key = timed(toy_lm("mdlm")), timed(toy_lm("bd3lm", 4)), jax.random.key(0)
    params, x0 = random_params(mdlm), rows(mdlm)
    with pytest.raises(ValueError, match="one sigma per row"):
        blocks.eval_losses(params, x0, key, "monte_carlo")
    with pytest.raises(ValueError, match="one sigma per row"):
        blocks.training_loss(params, x0, key, 1e-3, 1.0)
    with pytest.raises(ValueError, match="low_variance draws no time"):
        mdlm.eval_losses(params, x0, key, "low_variance")
    assert np.isfinite(eval_losses(mdlm, params, x0, key, "monte_carlo")).all()


@pytest.mark.parametrize("objective", ["ar", "mdlm", "sedd", "bd3lm"])
def test_from_config(toy_lm, objective):
    config = from_config_dict(get_config(f"{objective},block_size=16" if objective == "bd3lm" else objective))
    ids = toy_lm("ar").ids
    lm = LanguageModel.from_config(config, ids)
    assert (lm.objective, lm.length) == (objective, 1024)
    assert lm.block_size == {"ar": 1, "bd3lm": 16}.get(objective, 1024)
    assert lm.network.adaln == (objective != "ar")
    assert lm.network.time_conditioned == (objective == "sedd")
    assert lm.network.vocab_size == ids.vocab_size
    assert hash(lm) == hash(dataclasses.replace(lm))


def test_only_ar_and_blocks_of_one_token_are_exact(toy_lm):
    """A row of one token is a block of one token too, but SEDD's and MDLM's bound draws a time for it."""
    exact = [toy_lm("ar"), toy_lm("bd3lm", 1)]
    bounds = [toy_lm("bd3lm", 2), toy_lm("mdlm"), toy_lm("sedd"), toy_lm("mdlm", length=1), toy_lm("sedd", length=1)]
    assert [lm.is_exact for lm in exact + bounds] == [True] * 2 + [False] * 5


@pytest.mark.parametrize(
    ("objective", "attention"), [("bd3lm", "auto"), ("bd3lm", "dense"), ("ar", "auto"), ("sedd", "auto")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_float32_everywhere(toy_lm, objective, attention, dtype):
    """No product of the loss or its gradient leaves the rounding of float32 operands to the machine."""
    lm = toy_lm(objective, 4 if objective == "bd3lm" else 0, dtype=dtype, attention=attention)
    params = lm.network.init(jax.random.key(0))
    tokens = jnp.zeros((2, 12), jnp.int32)
    loss = lambda params: lm.training_loss(params, tokens, jax.random.key(1), 1e-3, 1.0)[0]
    program = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    found = [({str(each.aval.dtype) for each in eqn.invars}, eqn.params["precision"]) for eqn in products(program)]
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert all(precision == highest for kinds, precision in found if kinds == {"float32"})
    assert any(kinds == {dtype} for kinds, _ in found)
    assert any("bfloat16" in kinds for kinds, _ in found) == (dtype == "bfloat16")


def products(jaxpr):
    """All products of a program, those in its loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)
