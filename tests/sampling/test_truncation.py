"""Nucleus and top-k: what they keep, and that draws by rejection come from what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3_jax.sampling import truncation
from bd3_jax.sampling.nucleus import kept_top_k
from bd3_jax.sampling.truncation import Truncation
from tests.sampling import toy


@pytest.mark.parametrize(
    ("probs", "k", "expected"),
    [
        ([0.1, 0.6, 0.3], 1, [0, 1, 0]),
        ([0.1, 0.6, 0.3], 2, [0, 1, 1]),
        ([0.25, 0.25, 0.25, 0.25], 3, [1, 1, 1, 0]),  # ties in the order of ids
        ([0.5, 0.0, 0.5, 0.0], 3, [1, 1, 1, 0]),
        ([0.2, 0.8], 7, [1, 1]),
    ],
)
def test_top_k_by_hand(probs, k, expected):
    np.testing.assert_array_equal(kept_top_k(jnp.asarray(probs, jnp.float32), k), np.asarray(expected, bool))


@pytest.mark.parametrize("k", [1, 10, 700])
def test_top_k_equals_a_sort(k):
    probs = np.random.default_rng(k).dirichlet(np.full(2001, 0.3), size=3).astype(np.float32)
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
    expected = np.zeros(probs.shape, bool)
    np.put_along_axis(expected, order, True, axis=-1)
    np.testing.assert_array_equal(kept_top_k(jnp.asarray(probs), k), expected)


def test_both_together_keep_what_both_keep():
    log_probs = jnp.log(jnp.asarray([0.4, 0.3, 0.2, 0.1], jnp.float32))
    np.testing.assert_allclose(np.exp(Truncation(0.95, 2)(log_probs)), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(Truncation(0.75, 4)(log_probs)), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)
    assert Truncation()(log_probs) is log_probs


@pytest.mark.parametrize(
    ("p", "k", "tries"),
    [
        *((0.5, 0, tries) for tries in (0, 1, truncation.TRIES)),
        (0.9, 0, truncation.TRIES),
        (1e-6, 0, 1),
        (1.0, 3, 1),
        (0.8, 5, truncation.TRIES),
        (1.0, 0, truncation.TRIES),
    ],
)
def test_draws_have_the_truncated_distribution(p, k, tries, monkeypatch):
    """Whatever share of them rejection finds."""
    monkeypatch.setattr(truncation, "TRIES", tries)
    probs = np.random.default_rng(7).dirichlet(np.full(30, 0.5))
    expected = toy.nucleus(probs, p)
    if k:
        expected[np.argsort(-probs)[k:]] = 0
        expected /= expected.sum()
    log_probs = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (20_000, 30))
    draw = jax.jit(lambda keys, log_probs: Truncation(p, k).draw(keys, log_probs))  # not seen before, so traced anew
    tokens = draw(jax.random.split(jax.random.key(1), 20_000), log_probs)
    observed = np.bincount(tokens, minlength=30)
    assert observed[expected == 0].sum() == 0
    likely = expected * 20_000 > 5
    if likely.sum() > 1:
        observed = np.append(observed[likely], observed[~likely].sum())
        expected = np.append(expected[likely], expected[~likely].sum())
        stays = expected > 0
        assert stats.chisquare(observed[stays], 20_000 * expected[stays] / expected.sum()).pvalue > 1e-3


def test_a_draw_depends_on_its_own_key_only():
    log_probs = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), (6, 500)))
    keys = jax.random.split(jax.random.key(1), 6)
    draw = jax.jit(Truncation(0.5).draw)
    together = draw(keys, log_probs)
    alone = [draw(keys[i : i + 1], log_probs[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)
