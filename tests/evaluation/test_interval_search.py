"""The search against sums done by hand in numpy, and its candidates against the paper's list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import likelihood
from bd3_jax.evaluation import interval_search
from bd3_jax.evaluation.interval_search import SearchResult, candidates, search_interval


def test_candidates():
    """Widths 0.5 and 0.9 of the recipe, written out."""
    wanted = [(1e-3, 1.0), (1e-3, 0.5)]
    wanted += [(0.05, 0.55), (0.1, 0.6), (0.15, 0.65), (0.2, 0.7), (0.25, 0.75), (0.3, 0.8), (0.35, 0.85), (0.4, 0.9)]
    wanted += [(0.45, 0.95), (0.5, 1.0), (1e-3, 0.9), (0.05, 0.95), (0.1, 1.0)]
    assert candidates(16, (0.5, 0.9)) == tuple(wanted)
    assert len(candidates(4, (0.5, 0.6, 0.7, 0.8, 0.9))) == 1 + 11 + 9 + 7 + 5 + 3
    assert candidates(1, (0.5,)) == ((1e-3, 1.0), (1.0, 1.0))


@pytest.mark.parametrize("resample", [False, True])
@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("mdlm", 0)])
def test_variances_by_hand(toy_lm, random_params, objective, block_size, resample):
    """Two batches, the second padded; the network's losses are taken as they are, all sums are done anew."""
    lm = toy_lm(objective, block_size, resample=resample)
    params, key, rng = random_params(lm), jax.random.key(3), np.random.default_rng(0)
    batches = [(rng.integers(0, 10, (5, 12)).astype(np.int32), np.arange(5) < real) for real in (5, 3)]
    intervals = candidates(lm.block_size, (0.5, 0.7))
    found = search_interval(lm, params, intervals, batches, key)

    losses_of = jax.jit(lm.token_losses)
    wanted = []
    for j, (low, high) in enumerate(intervals):
        variances = []
        for i, (rows, is_real) in enumerate(batches):
            own = jax.random.fold_in(jax.random.fold_in(key, i), j)
            draw = likelihood.draw_training(
                own, rows, lm.block_size, lm.noise, jnp.float32(low), jnp.float32(high), lm.ids.mask
            )
            losses = np.asarray(losses_of(params, rows, draw)[1], np.float64)[is_real]
            blocks = [
                row[n : n + lm.block_size].sum() / lm.block_size for row in losses for n in range(0, 12, lm.block_size)
            ]
            mean = sum(blocks) / len(blocks)
            variances.append(sum((block - mean) ** 2 for block in blocks) / (len(blocks) - 1))
        wanted.append(sum(variances) / 2)
    assert found.variances == pytest.approx(wanted, rel=1e-4)
    assert found.best == intervals[min(range(len(wanted)), key=wanted.__getitem__)]
    assert found.blocks == 8 * 12 // lm.block_size


def test_one_program_for_all_candidates(toy_lm, random_params):
    lm = toy_lm("bd3lm", 2, vocab_size=13)
    rows = [(np.zeros((2, 12), np.int32), np.ones(2, bool))]
    search_interval(lm, random_params(lm), candidates(2, (0.5, 0.6)), rows, jax.random.key(0))
    assert interval_search._compiled(lm, None)._cache_size() == 1


def test_a_batch_of_one_block_says_nothing(toy_lm, random_params):
    """As the last one may be, and all of them where a row is one block."""
    lm = toy_lm("bd3lm", 12, vocab_size=13)
    params, rows = random_params(lm), np.random.default_rng(0).integers(0, 12, (3, 12)).astype(np.int32)
    batches = [(rows, np.ones(3, bool)), (rows, np.array([True, False, False]))]
    search = lambda batches: search_interval(lm, params, candidates(12, (0.5,)), batches, jax.random.key(0))
    assert search(batches).variances == search(batches[:1]).variances
    assert np.isfinite(search(batches).variances).all()
    nothing = search(batches[1:])
    assert nothing.best is None
    assert (nothing.record()["search/low"], "chosen" in nothing.table()) == (None, False)


def test_the_first_of_the_smallest_wins():
    intervals = ((1e-3, 1.0), (0.1, 0.6), (0.2, 0.7), (0.3, 0.8))
    result = SearchResult(intervals, (float("nan"), 2.0, 2.0, 3.0), blocks=4, seconds=1.0)
    assert result.record()["search/variance"] == 2.0
    result = SearchResult(intervals, (float("inf"), 2.0, 2.0, float("nan")), blocks=4, seconds=1.0)
    assert result.best == (0.1, 0.6)
    assert result.table().count("<- chosen") == 1
    record = result.record()
    assert (record["search/low"], record["search/high"]) == (0.1, 0.6)
    assert record["search/candidates"][2] == [0.2, 0.7, 2.0]
