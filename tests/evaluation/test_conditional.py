"""Continuations given their contexts, by enumeration: of all texts of a toy, all masks, all orders."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.config import EvalConfig
from bd3_jax.diffusion import orders
from bd3_jax.evaluation.conditional import Row, padded_length, score
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling.drawing import draw
from bd3_jax.sampling.sampler import Sampler
from tests.sampling.settings import sampling_config

LENGTH, TOKENS = 8, 3


def evaluation(estimator, batch_size=27, seed=0):
    return EvalConfig("given", batch_size, 0, estimator, "never", False, seed, "ema")


@pytest.fixture
def toy(toy_lm, attentive_params):
    """A model of 3 tokens, and parameters with which it depends on all that it sees and is nowhere sure."""

    def build(objective, block_size=0, **settings):
        lm = toy_lm(objective, block_size, vocab_size=TOKENS + 1, **{"length": LENGTH, **settings})
        return lm, attentive_params(lm, output=0.15)

    return build


def probabilities(lm, params):
    """Of the tokens at every position of a row: a function that remembers, float64, by the pass that samplers use."""

    @jax.jit
    def logits(tokens):
        return lm.network.unembed(params, lm.network.apply(params, tokens[None], lm.block_size))[0]

    found = {}

    def of(tokens):
        if tokens not in found:
            values = np.exp(np.asarray(logits(jnp.asarray(tokens)), np.float64)[:, :TOKENS])
            found[tokens] = values / values.sum(-1, keepdims=True)
        return found[tokens]

    return of


def by_all_orders(lm, probs, given, free):
    """Mean over all orders in each block of log p, and log of the mean of p, of the free tokens; nats."""
    mean_log, log_mean = 0.0, 0.0
    row = [*given, *free]
    row += [lm.ids.mask] * (LENGTH - len(row))
    for start in range(0, len(given) + len(free), lm.block_size):
        hidden = list(range(max(start, len(given)), min(start + lm.block_size, len(given) + len(free))))
        logs = []
        for order in itertools.permutations(hidden):
            now = row[: start + lm.block_size] + [lm.ids.mask] * (LENGTH - start - lm.block_size)
            for i in hidden:
                now[i] = lm.ids.mask
            logs.append(0.0)
            for i in order:
                logs[-1] += np.log(probs(tuple(now))[i, row[i]])
                now[i] = row[i]
        mean_log += np.mean(logs)
        log_mean += np.log(np.mean(np.exp(logs)))
    return mean_log, log_mean


# Contexts that end at a block's end, inside one, before its last token; continuations of one block, or across two.
CASES = [
    ("bd3lm", 4, [0, 1, 2, 0], 3), ("bd3lm", 4, [0, 1], 3), ("bd3lm", 4, [0, 2, 1], 3), ("mdlm", 0, [0, 2], 3),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "block_size", "given", "count"), CASES)
def test_all_continuations(toy, objective, block_size, given, count):
    """The NELBO's mean is that of all orders; it bounds a distribution; exact orders are distributions of their own."""
    lm, params = toy(objective, block_size)
    texts = list(itertools.product(range(TOKENS), repeat=count))
    probs = probabilities(lm, params)
    bounds, exact = zip(*(by_all_orders(lm, probs, given, text) for text in texts), strict=True)
    assert np.exp(exact).sum() == pytest.approx(1, abs=1e-9)
    assert (np.array(bounds) < np.array(exact) + 1e-9).all()
    assert max(np.array(exact) - np.array(bounds)) > 1e-4

    # 256 seeds of 12 draws: their mean is within its own error, which is small enough to tell.
    rows = [Row(given, text, noise) for noise in range(256) for text in texts]
    found = score(lm, params, rows, evaluation("low_variance", 27 * 16), draws=12)
    values = np.array([each.log_likelihood for each in found]).reshape(256, len(texts))
    error = values.std(0, ddof=1) / 16
    assert error.max() < 0.02 * np.abs(bounds).mean()
    assert (np.abs(values.mean(0) - bounds) <= 4.5 * error + 1e-5).all()

    for order in orders.ORDERS:
        found = score(lm, params, [Row(given, text, 0) for text in texts], evaluation(order), draws=1)
        assert np.exp([each.log_likelihood for each in found]).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("objective", ["ar", "bd3lm"])
def test_exact_models_and_left_to_right_obey_the_chain_rule(toy, objective):
    """log p(ab) = log p(a) + log p(b | a), and no draw matters."""
    lm, params = toy(objective, 1)
    text = [0, 1, 2, 2, 0, 1, 1]
    eval_losses = jax.jit(lm.eval_losses, static_argnums=3)
    everything = eval_losses(params, jnp.asarray([[*text, 0]]), jax.random.key(0), "monte_carlo")[0]
    for begin in (1, 3, 6):
        (found,) = score(lm, params, [Row(text[:begin], text[begin:], 5)], evaluation("low_variance"), draws=1)
        assert found.log_likelihood == pytest.approx(-float(everything[begin:7].sum()), rel=1e-5)
    lm, params = toy("bd3lm", 4)
    parts = [Row(text[:1], text[1:6], 0), Row(text[:1], text[1:3], 0), Row(text[:3], text[3:6], 0)]
    whole, first, second = (each.log_likelihood for each in score(lm, params, parts, evaluation("left_to_right"), 1))
    assert whole == pytest.approx(first + second, rel=1e-5)


def test_one_free_token_of_a_block_leaves_nothing_to_chance(toy):
    lm, params = toy("bd3lm", 4)
    rows = [Row([0, 1, 2], [1], noise) for noise in range(4)]
    found = [each.log_likelihood for each in score(lm, params, rows, evaluation("low_variance"), draws=1)]
    (bound, _) = by_all_orders(lm, probabilities(lm, params), [0, 1, 2], [1])
    np.testing.assert_allclose(found, bound, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "bd3lm", "mdlm", "sedd"])
def test_padding_and_batches_change_nothing(toy, objective):
    lm, params = toy(objective, 4 if objective == "bd3lm" else 0, length=128)
    rng = np.random.default_rng(0)
    estimator = "monte_carlo" if objective == "sedd" else "low_variance"
    rows = [Row([0, *rng.integers(0, 3, n)], list(rng.integers(0, 3, 5)), n) for n in (3, 70, 17, 122, 30)]
    rows.append(Row([0, 1], [], 0))
    alone = jax.jit(LanguageModel.conditional, static_argnums=(0, 5, 6))
    together = score(lm, params, rows, evaluation(estimator, batch_size=2), draws=3)
    assert together[-1] == (0.0, True)
    for row, wanted in zip(rows[:-1], together, strict=False):
        x0 = np.full((1, lm.length), lm.ids.mask)
        x0[0, : row.length] = [*row.given, *row.free]
        free = np.zeros(x0.shape, bool)
        free[0, len(row.given) : row.length] = True
        key = jax.random.fold_in(jax.random.key(0), row.noise)[None]
        losses, _ = alone(lm, params, x0, free, key, estimator, 3)
        assert wanted.log_likelihood == pytest.approx(-float(losses[0]), rel=2e-5)
    lengths = {padded_length(lm, row.length) for row in rows}
    assert lengths == ({32, 64, 128} if objective in ("ar", "bd3lm") else {128})


def test_lengths_hold_whole_blocks(toy):
    lm, _ = toy("bd3lm", 12, length=180)
    assert sorted({padded_length(lm, n) for n in range(1, 181)}) == [24, 48, 96, 180]
    assert all(padded_length(lm, n) >= n for n in range(1, 181))


@pytest.mark.parametrize(
    ("objective", "estimator"), [("ar", "monte_carlo"), ("bd3lm", "low_variance"), ("mdlm", "most_confident")]
)
def test_what_a_greedy_sampler_draws_is_greedy(toy, objective, estimator):
    lm, params = toy(objective, 4 if objective == "bd3lm" else 0, num_layers=1)
    sampler = "autoregressive" if objective == "ar" else "confidence"
    config = sampling_config(objective, sampler=sampler, top_k=1, nucleus=1.0, max_length=LENGTH)
    drawer = Sampler(lm, config)
    (drawn,) = draw(drawer, params, drawer.canvas([[1, 2]])[0], 1, 1)
    given, free = drawn.tokens[:3].tolist(), drawn.tokens[3:].tolist()
    changed = [[*free[:i], (free[i] + 1) % TOKENS, *free[i + 1 :]] for i in range(len(free))]
    rows = [Row(given, text, 0) for text in (free, *changed)]
    found = score(lm, params, rows, evaluation(estimator), draws=1)
    assert [each.is_greedy for each in found] == [True] + [False] * len(changed)


def test_nothing_of_sedd_is_greedy(toy):
    lm, params = toy("sedd")
    found = score(lm, params, [Row([0], [token], 0) for token in range(TOKENS)], evaluation("monte_carlo"), draws=64)
    assert not any(each.is_greedy for each in found)
    assert all(math.isfinite(each.log_likelihood) for each in found)
