"""Times and masks against their distributions, enumerated; every test at a fixed seed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3_jax.config import NoiseConfig, can_clip
from bd3_jax.diffusion import corruption, likelihood

draw_clipped_masks = jax.jit(corruption.draw_clipped_mask, static_argnums=2)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def assert_drawn_from(observed, expected):
    """Chi-square test; outcomes of probability 0 must not occur."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    if possible.sum() > 1:
        expected = expected[possible] / expected[possible].sum() * observed.sum()
        assert stats.chisquare(observed[possible], expected).pvalue > 1e-3


@pytest.mark.parametrize(("batch", "num_blocks"), [(1, 1), (1, 8), (3, 5), (64, 16)])
def test_every_stratum_is_used_once(batch, num_blocks):
    count = batch * num_blocks
    for t in jax.vmap(lambda key: corruption.draw_times(key, batch, num_blocks, 0.0, 1.0))(keys(5)):
        assert t.shape == (batch, num_blocks)
        np.testing.assert_array_equal(np.sort(np.floor(np.float64(t) * count).ravel()), np.arange(count))


def test_every_block_is_equally_likely_to_get_every_stratum():
    """With a fixed order early blocks would always get little noise."""
    draws = 3000
    t = jax.vmap(lambda key: corruption.draw_times(key, 2, 3, 0.0, 1.0))(keys(draws)).reshape(draws, 6)
    strata = np.floor(np.float64(t) * 6).astype(int)
    table = np.stack([np.bincount(strata[:, block], minlength=6) for block in range(6)])
    # Rows and columns sum to `draws` by construction: (6 - 1)^2 degrees of freedom.
    statistic = ((table - draws / 6) ** 2 / (draws / 6)).sum()
    assert stats.chi2.sf(statistic, 25) > 1e-3
    within = (np.float64(t) * 6 % 1).ravel()
    assert stats.kstest(within, "uniform").pvalue > 1e-3


def test_times_fill_the_interval():
    t = np.asarray(corruption.draw_times(jax.random.key(0), 100, 10, 0.3, 0.8))
    assert 0.3 <= t.min() < 0.301
    assert 0.799 < t.max() <= 0.8
    np.testing.assert_array_equal(corruption.draw_times(jax.random.key(0), 2, 4, 1.0, 1.0), np.ones((2, 4)))


def masks_of(block_size):
    return np.array(list(itertools.product([False, True], repeat=block_size)))


def frequencies(masks):
    """How often each of `masks_of(B)` occurs among `[draws, B]`."""
    size = masks.shape[-1]
    codes = np.asarray(masks).reshape(-1, size) @ (1 << np.arange(size)[::-1])
    return np.bincount(codes, minlength=2**size)


def bernoulli(chance, block_size):
    """Probability of every mask where each token is masked independently."""
    size = masks_of(block_size).sum(-1)
    return chance**size * (1 - chance) ** (block_size - size)


def test_tokens_are_masked_independently():
    chance = jnp.array([[0.2, 0.7]])
    draws = jax.vmap(lambda key: corruption.draw_mask(key, chance, 3))(keys(4000)).reshape(4000, 2, 3)
    assert_drawn_from(frequencies(draws[:, 0]), bernoulli(0.2, 3))
    assert_drawn_from(frequencies(draws[:, 1]), bernoulli(0.7, 3))


@pytest.mark.parametrize(
    ("low", "high", "counts"),
    [
        (1e-3, 1.0, [0, 1, 2, 3, 4]),
        (0.25, 0.75, [1, 2, 3]),  # inclusive
        (0.26, 0.74, [2]),
        (1e-3, 0.5, [0, 1, 2]),  # the lower bound is waived
        (0.3, 1.0, [2, 3, 4]),
        (0.55, 0.8, [3]),
        (1.0, 1.0, [4]),
    ],
)
@pytest.mark.parametrize("chance", [0.1, 0.45, 0.95])
def test_clipped_masks_are_those_that_rejection_would_keep(low, high, counts, chance):
    chance = 1.0 if low == 1 else chance
    draws = draw_clipped_masks(jax.random.key(1), jnp.full((500, 8), chance), 4, low, high).reshape(-1, 4)
    expected = np.where(np.isin(masks_of(4).sum(-1), counts), bernoulli(chance, 4), 0)
    assert_drawn_from(frequencies(draws), expected)


def test_clipped_masks_differ_by_block():
    chance = jnp.tile(jnp.array([0.3, 0.8]), (4000, 1))
    draws = draw_clipped_masks(jax.random.key(0), chance, 3, 0.3, 0.8).reshape(4000, 2, 3)
    for block, p in enumerate((0.3, 0.8)):
        expected = np.where(np.isin(masks_of(3).sum(-1), [1, 2]), bernoulli(p, 3), 0)
        assert_drawn_from(frequencies(draws[:, block]), expected)


def test_clipped_count_of_large_blocks():
    """The truncated binomial itself, at B = 1024 and far from its mean."""
    chance, low, high = 0.5, 0.45, 0.48
    masked = draw_clipped_masks(jax.random.key(0), jnp.full((2000, 1), chance), 1024, low, high).sum(-1)
    allowed = np.arange(461, 492)  # 0.45 * 1024 = 460.8, 0.48 * 1024 = 491.5
    observed = np.bincount(np.asarray(masked), minlength=1025)
    assert observed.sum() == observed[allowed].sum()
    expected = stats.binom.pmf(allowed, 1024, chance)
    groups = np.array_split(np.arange(len(allowed)), 6)
    assert_drawn_from([observed[allowed][g].sum() for g in groups], [expected[g].sum() for g in groups])


@pytest.mark.parametrize("size", range(5))
def test_subsets_are_uniform(size):
    draws = corruption.draw_subset(jax.random.key(0), jnp.full((1000, 3), size), 4)
    assert draws.shape == (1000, 12)
    assert_drawn_from(frequencies(draws.reshape(-1, 4)), masks_of(4).sum(-1) == size)


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_corrupt(ignore_bos):
    x0 = np.array([[5, 6, 7], [8, 9, 5]])
    mask = np.array([[True, False, True], [True, True, False]])
    first = [5, 8] if ignore_bos else [3, 3]
    expected = [[first[0], 6, 3], [first[1], 3, 5]]
    np.testing.assert_array_equal(corruption.corrupt(x0, jnp.array(mask), 3, ignore_bos), expected)


@pytest.mark.parametrize("resample", [True, False])
def test_block_size_1_from_1_masks_everything(resample):
    x0 = np.tile(np.arange(6), (50, 1))
    noise = NoiseConfig("loglinear", 1.0, 1.0, resample=resample, ignore_bos=True)
    draw = likelihood.draw_training(jax.random.key(0), x0, 1, noise, 1.0, 1.0, 9)
    np.testing.assert_array_equal(draw.xt, np.tile([0, 9, 9, 9, 9, 9], (50, 1)))
    np.testing.assert_array_equal(draw.weight, np.ones((50, 6)))


@pytest.mark.parametrize("block_size", [7, 10, 15])
def test_clipped_bounds_are_inclusive_and_what_the_settings_allow(block_size):
    """In [i/B, j/B] lie all counts from i to j and no other, also where i/B rounds in float32."""
    first, last = np.triu_indices(block_size)
    first, last = first[first > 0], last[first > 0]
    chance = jnp.full((100, 8), 0.5)

    def counts(key, low, high):
        masks = draw_clipped_masks(key, chance, block_size, low, high).reshape(-1, block_size)
        return jnp.bincount(masks.sum(-1), length=block_size + 1)

    bounds = first / block_size, last / block_size
    drawn = np.asarray(jax.vmap(counts)(keys(len(first)), *bounds))
    for i, j, low, high, found in zip(first, last, *bounds, drawn, strict=True):
        assert can_clip(block_size, low, high)
        assert found[i : j + 1].sum() == chance.size
        often = stats.binom.pmf(np.arange(block_size + 1), block_size, 0.5) > 0.02
        assert (found[i : j + 1] > 0)[often[i : j + 1]].all()
