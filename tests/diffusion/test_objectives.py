"""The objectives, one position at a time, against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import objectives

V, MASK = 5, 3
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(2, 6, V)) * 2, jnp.float32)
X0 = np.array([[0, 1, 2, 4, 1, 0], [4, 4, 0, 2, 1, 2]])
XT = np.where(np.array([[1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1]], bool), MASK, X0)
WEIGHT = RNG.uniform(1, 9, size=(2, 6)).astype(np.float32)
SIGMA = RNG.uniform(0.01, 6, size=(2, 6)).astype(np.float32)


def each(function):
    """The values of function(index) for every position."""
    return np.array([[function((b, i)) for i in range(6)] for b in range(2)])


def probabilities(logits):
    """Softmax over all but the mask."""
    values = np.exp(np.float64(logits))
    values[MASK] = 0
    return values / values.sum()


def test_autoregressive():
    with np.errstate(divide="ignore"):
        expected = each(lambda at: np.log(probabilities(LOGITS[at])))
    np.testing.assert_allclose(objectives.log_probs_without_mask(LOGITS, MASK), expected, rtol=1e-5)
    expected = each(lambda at: -np.log(probabilities(LOGITS[at])[X0[at]]))
    np.testing.assert_allclose(objectives.ar_loss(LOGITS, X0, MASK), expected, rtol=1e-5)


def test_subs():
    def chances(at):
        return probabilities(LOGITS[at]) if XT[at] == MASK else np.eye(V)[XT[at]]

    np.testing.assert_allclose(np.exp(objectives.subs_log_probs(LOGITS, XT, MASK)), each(chances), rtol=1e-5, atol=1e-7)
    expected = each(lambda at: -WEIGHT[at] * np.log(chances(at)[X0[at]]))
    np.testing.assert_allclose(objectives.subs_loss(LOGITS, X0, XT, WEIGHT, MASK), expected, rtol=1e-5)


def sedd_term(at):
    """Score entropy sum_y rate_y (s_y - r_y ln s_y + K(r_y)), K(a) = a (ln a - 1), over transitions out of the mask."""
    if XT[at] != MASK:
        return 0.0
    sigma = np.float64(SIGMA[at])
    scores = np.exp(np.float64(LOGITS[at])) / np.expm1(sigma) / (V - 1)
    total = 0.0
    for y in range(V):
        if y == MASK:
            continue
        ratio = 1 / np.expm1(sigma) if y == X0[at] else 0.0
        total += scores[y]
        if ratio:
            total += ratio * (np.log(ratio) - 1) - ratio * np.log(scores[y])
    return WEIGHT[at] * np.expm1(sigma) * total


def test_sedd():
    losses = objectives.sedd_loss(LOGITS, X0, XT, SIGMA, WEIGHT, MASK)
    np.testing.assert_allclose(losses, each(sedd_term), rtol=2e-4, atol=1e-4)

    def log_scores(at):
        values = np.float64(LOGITS[at]) - np.log(np.expm1(np.float64(SIGMA[at]))) - np.log(V - 1)
        values[XT[at]] = 0
        return values

    ours = objectives.sedd_log_score(LOGITS, XT, SIGMA, MASK)
    np.testing.assert_allclose(ours, each(log_scores), rtol=1e-5, atol=1e-5)


def test_sedd_of_a_distribution_is_subs():
    """Scores that are a distribution over x0 times the true ratio give weight * -ln p(x0): the two bounds are one."""
    log_p = jax.nn.log_softmax(LOGITS.at[..., MASK].set(-jnp.inf))
    logits = jnp.where(jnp.arange(V) == MASK, 7.0, log_p + np.log(V - 1))
    ours = objectives.sedd_loss(logits, X0, XT, SIGMA, WEIGHT, MASK)
    np.testing.assert_allclose(ours, objectives.subs_loss(log_p, X0, XT, WEIGHT, MASK), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 6.9077554])
def test_sedd_at_the_ends_of_time(sigma):
    """No cancellation where expm1(sigma) is tiny or large."""
    one = np.float32([sigma])
    loss = objectives.sedd_loss(LOGITS[0, :1], X0[0, :1], np.array([MASK]), one, np.float32([1.0]), MASK)
    scores = np.exp(np.float64(LOGITS[0, 0])) / (V - 1)  # times r, which leaves weight * expm1(sigma) * r = 1
    expected = scores[np.arange(V) != MASK].sum() - np.log(scores[X0[0, 0]]) - 1
    np.testing.assert_allclose(loss, [expected], rtol=1e-4)


@pytest.mark.parametrize("objective", ["subs", "sedd"])
def test_unmasked_positions_have_no_gradient(objective):
    def total(logits):
        if objective == "subs":
            return objectives.subs_loss(logits, X0, XT, WEIGHT, MASK).sum()
        return objectives.sedd_loss(logits, X0, XT, SIGMA, WEIGHT, MASK).sum()

    gradient = np.asarray(jax.grad(total)(LOGITS))
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient).max(-1) > 0).tolist() == (XT == MASK).tolist()
    assert (gradient[..., MASK] == 0).all()
