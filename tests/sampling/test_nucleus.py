import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.sampling.nucleus import kept, nucleus
from tests.sampling import toy


@pytest.mark.parametrize("vocab_size", [4, 31, 2001, 50_258])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_equals_a_stable_descending_sort(vocab_size, p, scale):
    logits = scale * np.random.default_rng(vocab_size).normal(size=(3, 2, vocab_size))
    log_probs = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    ours = np.exp(jax.jit(nucleus, static_argnums=1)(log_probs, p))
    probs = np.exp(np.asarray(log_probs, np.float64))
    reference = toy.nucleus(probs, p)
    # Rounding may decide otherwise for a token whose cumulative probability is P itself.
    differ = (ours > 0) != (reference > 0)
    order = np.argsort(-probs, axis=-1, kind="stable")
    cumulative = np.empty_like(probs)
    np.put_along_axis(cumulative, order, np.cumsum(np.take_along_axis(probs, order, -1), -1), -1)
    assert (np.abs(cumulative[differ] - p) < 2e-6).all()
    if not differ.any():
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("probs", "p", "expected"),
    [
        ([0.25, 0.5, 0.25], 0.75, [1, 1, 0]),  # ties in the order of ids; inclusive
        ([0.25, 0.5, 0.25], 0.749, [0, 1, 0]),
        ([0.125, 0.125, 0.5, 0.125, 0.125], 0.875, [1, 1, 1, 1, 0]),
        ([0.25, 0.25, 0.25, 0.25], 0.5, [1, 1, 0, 0]),
        ([0.25, 0.25, 0.25, 0.25], 0.1, [1, 0, 0, 0]),  # the first always stays
        ([0.125, 0.75, 0.125], 0.5, [0, 1, 0]),
        ([0.0, 1.0, 0.0], 0.9, [0, 1, 0]),
        ([0.5, 0.0, 0.5], 0.9, [1, 0, 0]),
    ],
)
def test_by_hand(probs, p, expected):
    probs = jnp.asarray(probs, jnp.float32)
    np.testing.assert_array_equal(kept(probs, p), np.asarray(expected, bool))
    restricted = np.exp(nucleus(jnp.log(probs), p))
    kept_by_hand = np.asarray(probs) * expected
    np.testing.assert_allclose(restricted, kept_by_hand / kept_by_hand.sum(), rtol=1e-6)


def test_one_is_the_identity():
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 1000)) * 10)
    assert nucleus(log_probs, 1.0) is log_probs
