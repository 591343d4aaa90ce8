"""Estimators of the NELBO against brute force on a toy: V = 4 (3 tokens and the mask), L = 4.

A table gives the logits of every position for every context, so that the expected loss is a finite sum over masks and
an integral over time. Both are worked out here in float64, from formulas of the papers that share nothing with the
package; the estimators' means have to agree within their own standard error.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.config import NoiseConfig
from bd3_jax.diffusion import likelihood
from bd3_jax.diffusion.output_loss import Chunks, Output

V, L, MASK, EPS = 4, 4, 3, 1e-3
RNG = np.random.default_rng(7)
TABLE = RNG.normal(size=(L, V**L, V)).astype(np.float32) * 1.5
TILT = RNG.normal(size=(L, V**L, V)).astype(np.float32) * 0.3  # the logits' dependence on time, for SEDD
X0 = np.array([[2, 0, 1, 2], [1, 1, 0, 2], [0, 2, 2, 1]])
POWERS = V ** np.arange(L)

# p(t) and -s(t), float64.
SCHEDULES = {
    "loglinear": (lambda t: t, lambda t: 1 / t),
    "square": (lambda t: np.maximum(t**2, EPS), lambda t: 2 * t / np.maximum(t**2, EPS)),
    "square_root": (np.sqrt, lambda t: 0.5 / t),
    "log": (lambda t: np.log2(1 + t), lambda t: 1 / (np.log(1 + t) * (1 + t))),
    "cosine": (
        lambda t: 1 - (1 - EPS) * np.cos(np.pi * t / 2),
        lambda t: np.pi / 2 * (1 - EPS) * np.sin(np.pi * t / 2) / (1 - (1 - EPS) * np.cos(np.pi * t / 2) + EPS),
    ),
    "scaled_loglinear": (lambda t: (1 - EPS) * t, lambda t: 1 / t),
}


def noise(schedule="loglinear", low=EPS, high=1.0, resample=False, ignore_bos=True):
    return NoiseConfig(schedule, low, high, resample, ignore_bos)


def logits(position, block_size, x0, xt, sigma):
    """What the table says of a position whose block is xt, after the clean tokens of earlier blocks."""
    start = position // block_size * block_size
    seen = np.concatenate([x0[:start], xt[start : start + block_size], np.zeros(L - start - block_size, int)])
    code = int((seen * POWERS).sum())
    return np.float64(TABLE[position, code]) + np.multiply.outer(sigma, np.float64(TILT[position, code]))


def expected_losses(objective, x0, block_size, settings, given=()):
    """Exact expectation of every token's loss over t ~ U[low, high] and the masks; given positions stay as they are."""
    given = {0, *given} if settings.ignore_bos else set(given)
    chance, scale = SCHEDULES[settings.schedule]
    # A fine grid on which 1/t is smooth.
    t = np.exp(np.linspace(np.log(settings.low), np.log(settings.high), 4001)) if settings.high > settings.low else None
    times = np.array([settings.high]) if t is None else t
    p = chance(times)
    weight = np.ones_like(times) if settings.low > 0.5 else scale(times)
    sigma = np.minimum(-np.log(np.maximum(1 - p, 1e-300)), -math.log(EPS))
    total = np.zeros((L, len(times)))
    for start in range(0, L, block_size):
        masks = list(itertools.product([False, True], repeat=block_size))
        if settings.resample:
            low, high = (settings.low if settings.low > EPS else 0), settings.high
            masks = [mask for mask in masks if low <= sum(mask) / block_size <= high]
        chances = [p ** sum(mask) * (1 - p) ** (block_size - sum(mask)) for mask in masks]
        for mask, probability in zip(masks, chances, strict=True):
            probability = probability / sum(chances)
            xt = x0.copy()
            for i, masked in enumerate(mask):
                if masked and start + i not in given:
                    xt[start + i] = MASK
            for i in range(start, start + block_size):
                if xt[i] == MASK:
                    loss = subs if objective == "subs" else sedd
                    total[i] += probability * loss(i, block_size, x0, xt, sigma, weight)
    if t is None:
        return total[:, 0]
    return np.trapezoid(total, t, axis=1) / (settings.high - settings.low)


def subs(i, block_size, x0, xt, sigma, weight):
    values = logits(i, block_size, x0, xt, 0.0)[: V - 1]
    return weight * (np.log(np.exp(values).sum()) - values[x0[i]])


def sedd(i, block_size, x0, xt, sigma, weight):
    """Rate of leaving the mask, times the score entropy (SEDD, eq. 9)."""
    ratio = 1 / np.expm1(sigma)
    scores = np.exp(logits(i, block_size, x0, xt, sigma)[:, : V - 1]) * ratio[:, None] / (V - 1)
    entropy = scores.sum(-1) - ratio * np.log(scores[:, x0[i]]) + ratio * (np.log(ratio) - 1)
    return weight / ratio * entropy


def estimates(objective, block_size, draw, count=6000, copies=8):
    """`[count, copies * 3, L]` losses: `count` independent batches, in which every sequence comes `copies` times."""
    x0 = jnp.asarray(np.tile(X0, (copies, 1)))

    def one(key):
        noised = draw(key, x0)
        block = jnp.arange(L) // block_size
        seen = jnp.where(block[:, None] == block, noised.xt[:, None], jnp.where(block[:, None] > block, x0[:, None], 0))
        code = (seen * POWERS).sum(-1)
        position = jnp.arange(L)
        hidden = jnp.asarray(TABLE)[position, code]
        if objective == "sedd":
            hidden += noised.sigma[..., None] * jnp.asarray(TILT)[position, code]
        identity = Output(jnp.eye(V), jnp.zeros(V))
        return likelihood.token_losses(objective, hidden, identity, x0, noised, MASK, Chunks(2**20, 1))[1]

    return np.asarray(
        jax.jit(lambda key: jax.lax.map(one, jax.random.split(key, count)))(jax.random.key(3)), np.float64
    )


def assert_unbiased(losses, expected, precision=0.03):
    """Each token of each sequence: mean over batches within 4 standard errors, which are small enough to tell."""
    losses = losses.reshape(len(losses), -1, *X0.shape).mean(1)
    error = losses.std(0, ddof=1) / np.sqrt(len(losses))
    assert (error <= precision * expected.max()).all()
    assert (np.abs(losses.mean(0) - expected) <= 4 * error + 1e-5 * expected).all()


def training_draw(block_size, settings):
    return lambda key, x0: likelihood.draw_training(key, x0, block_size, settings, settings.low, settings.high, MASK)


@pytest.mark.parametrize(
    ("block_size", "settings"),
    [
        (1, noise()),
        (2, noise(ignore_bos=False)),
        (4, noise()),
        *((4, noise(name)) for name in SCHEDULES if name != "loglinear"),
        (2, noise("cosine")),
        (4, noise(low=0.3, high=0.8, resample=True)),
        (4, noise(low=0.5, high=1.0, resample=True)),  # 1/t
        (2, noise(low=0.55, high=1.0, resample=True)),  # weight 1
        (2, noise(low=EPS, high=0.5)),
        (1, noise(low=1.0, high=1.0)),
    ],
    ids=str,
)
def test_training(block_size, settings):
    losses = estimates("subs", block_size, training_draw(block_size, settings))
    assert_unbiased(losses, np.stack([expected_losses("subs", x0, block_size, settings) for x0 in X0]))


@pytest.mark.parametrize(
    "settings", [noise(name, ignore_bos=name != "scaled_loglinear") for name in SCHEDULES], ids=str
)
def test_sedd_training(settings):
    losses = estimates("sedd", L, training_draw(L, settings))
    assert_unbiased(losses, np.stack([expected_losses("sedd", x0, L, settings) for x0 in X0]), precision=0.04)


@pytest.mark.parametrize("name", ["square", "scaled_loglinear"])
def test_evaluation_is_loglinear_on_the_whole_interval(name):
    """... whatever the training schedule was, but for the checkpoints that need the scaled one."""
    settings = noise(name, low=0.3, high=0.8, resample=True)
    draw = lambda key, x0: likelihood.draw_monte_carlo(key, x0, 2, settings, MASK)
    whole = noise("scaled_loglinear" if name == "scaled_loglinear" else "loglinear")
    assert_unbiased(estimates("subs", 2, draw), np.stack([expected_losses("subs", x0, 2, whole) for x0 in X0]))


@pytest.mark.parametrize("block_size", [2, 4])
def test_low_variance(block_size):
    """The mean of the whole interval (0, 1], with less variance than drawing t."""
    low = estimates(
        "subs", block_size, lambda key, x0: likelihood.draw_low_variance(key, x0, block_size, noise(), MASK)
    )
    plain = estimates("subs", block_size, training_draw(block_size, noise()))
    whole = noise(low=1e-7)
    assert_unbiased(low, np.stack([expected_losses("subs", x0, block_size, whole) for x0 in X0]))
    assert low.mean((1, 2)).var() < 0.8 * plain.mean((1, 2)).var()


def test_low_variance_counts_are_uniform_and_weighted():
    x0 = jnp.zeros((5, 12), int)
    draw = likelihood.draw_low_variance(jax.random.key(0), x0, 4, noise(ignore_bos=False), MASK)
    masked = np.asarray(draw.xt == MASK).reshape(15, 4).sum(-1)
    np.testing.assert_allclose(draw.weight.reshape(15, 4)[:, 0], 4 / masked)
    counts = np.bincount(masked, minlength=5)
    assert counts[0] == 0
    assert ((counts[1:] >= 3) & (counts[1:] <= 4)).all()  # 15 strata over 4 counts


@pytest.mark.parametrize(("block_size", "begin"), [(4, 1), (4, 3), (2, 3), (2, 2)])
def test_a_part_given_its_context(block_size, begin):
    """It ends inside a block, at its end, before its last token: the rest alone is masked and weighed."""
    expected = np.stack([expected_losses("subs", x0, block_size, noise(low=1e-7), range(begin)) for x0 in X0])
    free, variances = jnp.arange(L) >= begin, []
    for draw in (likelihood.draw_low_variance, likelihood.draw_monte_carlo):
        own = lambda key, x0, draw=draw: draw(key, x0, block_size, noise(), MASK, jnp.broadcast_to(free, x0.shape))
        losses = estimates("subs", block_size, own)
        assert_unbiased(losses, expected)
        variances.append(losses.mean((1, 2)).var())
    assert variances[0] < 0.8 * variances[1]


def test_a_part_of_sedd_given_its_context():
    draw = lambda key, x0: likelihood.draw_monte_carlo(
        key, x0, L, noise(), MASK, jnp.broadcast_to(jnp.arange(L) >= 2, x0.shape)
    )
    expected = np.stack([expected_losses("sedd", x0, L, noise(), range(2)) for x0 in X0])
    assert_unbiased(estimates("sedd", L, draw), expected, precision=0.04)


def test_copies_are_stratified_in_every_block():
    """12 draws of a block with 3 or 4 free tokens: every number of masked ones equally often, whatever the padding."""
    free = jnp.tile(jnp.arange(12) > 0, (2, 1)).at[:, 8:].set(False)
    keys, x0 = jax.random.split(jax.random.key(0)), jnp.zeros((2, 12), int)
    copies = lambda x0, free: likelihood.draw_copies(
        likelihood.draw_low_variance, keys, x0, 4, noise(), MASK, free, copies=12
    )
    draw = copies(x0, free)
    masked = np.asarray(draw.xt == MASK).reshape(2, 12, 3, 4).sum(-1)
    for row in masked:
        np.testing.assert_array_equal(np.bincount(row[:, 0]), [0, 4, 4, 4])
        np.testing.assert_array_equal(np.bincount(row[:, 1]), [0, 3, 3, 3, 3])
        assert (row[:, 2] == 0).all()
    np.testing.assert_allclose(
        draw.weight.reshape(2, 12, 3, 4),
        np.where(free.reshape(2, 1, 3, 4), np.array([3, 4, 0])[:, None] / np.maximum(masked, 1)[..., None], 0),
    )
    shorter = copies(x0[:, :8], free[:, :8])
    np.testing.assert_array_equal(shorter.xt, draw.xt[:, :8])


def test_every_schedule_gives_the_same_bound():
    """For a denoiser that does not see the time, up to what the cut-offs at small t leave out."""
    block_size = 4
    exact = np.stack([expected_losses("subs", x0, block_size, noise(low=1e-7)) for x0 in X0]).mean()
    for name, cut in (("square", EPS), ("square_root", math.sqrt(EPS)), ("log", 1.5 * EPS), ("cosine", 7 * EPS)):
        mean = estimates("subs", block_size, training_draw(block_size, noise(name))).mean((1, 2))
        error = mean.std(ddof=1) / np.sqrt(len(mean))
        assert abs(mean.mean() - exact) <= 4 * error + 1.5 * cut * exact, name


def test_all_masked():
    draw = likelihood.draw_all_masked(jnp.asarray(X0), 1, noise(), MASK)
    np.testing.assert_array_equal(draw.xt, np.where(np.arange(L) == 0, X0, MASK))
    np.testing.assert_array_equal(draw.weight, np.ones((3, L)))


@pytest.mark.parametrize(
    ("name", "low", "high", "share"),
    [
        ("loglinear", 0.3, 0.8, 0.55), ("loglinear", 1.0, 1.0, 1.0), ("square", 0.0, 1.0, 1 / 3),
        ("square_root", 0.0, 1.0, 2 / 3), ("log", 0.0, 1.0, 2 - 1 / math.log(2)), ("cosine", 0.0, 1.0, 1 - 2 / math.pi),
    ],
)  # fmt: skip
def test_the_masked_share_is_the_mean_chance(name, low, high, share):
    noise = NoiseConfig(name, low, high, resample=False, ignore_bos=False)
    assert likelihood.masked_share(noise) == pytest.approx(share, abs=2e-3)
