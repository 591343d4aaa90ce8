"""Samplers against the exact distribution over all sequences of a toy vocabulary, by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion.objectives import log_probs_without_mask
from bd3_jax.sampling import analytic, autoregressive, block
from bd3_jax.sampling.block import Layout
from bd3_jax.sampling.nucleus import nucleus
from bd3_jax.sampling.updates import Ancestral, FirstHitting
from tests.sampling import toy

N = 50_000
ALL_MASKED = [toy.MASK] * toy.L
PROMPTED = [2, 0, toy.MASK, toy.MASK]
GAP = [toy.MASK, 1, toy.MASK, toy.MASK]


def keys(seed):
    return jax.random.split(jax.random.key(seed), N)


def canvases(row):
    return jnp.tile(jnp.asarray(row, jnp.int32), (N, 1))


@functools.partial(jax.jit, static_argnames=("block_size", "p"))
def run_blocks(keys, canvas, log_table, num_steps, block_size, p):
    """A table in place of the network: hidden states are its log-probabilities. First-hitting where T is None."""

    def hidden(state, canvas, start, tokens):
        canvas = jax.lax.dynamic_update_slice_in_dim(canvas, tokens, start, axis=1)
        return jax.lax.dynamic_slice_in_dim(log_table[canvas @ toy.INDEX], start, block_size, axis=1)

    update = FirstHitting() if num_steps is None else Ancestral(num_steps)
    layout = Layout(block_size, block_size, toy.L // block_size)
    context = block.Context(None, hidden, None)
    return block.sample(context, lambda h: nucleus(h, p), update, layout, toy.MASK, keys, canvas)


def sample_blocks(table, num_steps, block_size, p, row):
    log_table = jnp.log(jnp.asarray(table, jnp.float32))
    samples = jax.device_get(run_blocks(keys(0), canvases(row), log_table, num_steps, block_size, p))
    given = np.asarray(row) != toy.MASK
    assert (samples.tokens[:, given] == np.asarray(row)[given]).all()
    return samples


@pytest.mark.parametrize(
    ("block_size", "p", "row"),
    [
        (4, 1.0, ALL_MASKED),
        (4, 0.8, GAP),
        (2, 1.0, PROMPTED),
        (2, 0.8, ALL_MASKED),
        (2, 1.0, GAP),
        (1, 1.0, ALL_MASKED),
    ],
)
def test_first_hitting_has_the_enumerated_distribution(block_size, p, row):
    table = toy.random_table(1)
    samples = sample_blocks(table, None, block_size, p, row)
    toy.assert_drawn_from(samples.tokens, toy.first_hitting(toy.nucleus(table, p), row, block_size))
    assert (samples.nfe == row.count(toy.MASK)).all()


@pytest.mark.parametrize(("block_size", "p"), [(4, 1.0), (4, 0.8), (2, 1.0)])
def test_ancestral_has_the_enumerated_distribution_and_tends_to_first_hitting(block_size, p):
    table = toy.random_table(2)
    limit = toy.first_hitting(toy.nucleus(table, p), ALL_MASKED, block_size)
    distances = []
    for num_steps in (1, 3, 12, 96):
        exact = toy.ancestral(toy.nucleus(table, p), ALL_MASKED, block_size, num_steps)
        samples = sample_blocks(table, num_steps, block_size, p, ALL_MASKED)
        toy.assert_drawn_from(samples.tokens, exact)
        # A call for each step in which at least one of the block's tokens is unmasked.
        calls = toy.L // block_size * num_steps * (1 - (1 - 1 / num_steps) ** block_size)
        assert abs(samples.nfe.mean() - calls) <= 5 * samples.nfe.std() / np.sqrt(N) + 1e-6
        distances.append(toy.total_variation(exact, limit))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 8 * distances[3]
    assert distances[3] < 0.02


def test_chi_square_tells_one_ancestral_step_from_first_hitting():
    table = toy.random_table(2)
    samples = sample_blocks(table, 1, 4, 1.0, ALL_MASKED)
    with pytest.raises(AssertionError):
        toy.assert_drawn_from(samples.tokens, toy.first_hitting(table, ALL_MASKED, 4))


@pytest.mark.parametrize(("p", "row"), [(1.0, [2, 0, 3, 3]), (0.95, [2, 3, 3, 3])])
def test_autoregressive_has_the_enumerated_distribution(p, row):
    table = toy.random_table(3)
    logits = jnp.log(jnp.asarray(table, jnp.float32)).at[..., toy.MASK].set(9.0)  # never drawn, whatever it says

    def read(state, canvas, position):
        return logits[canvas @ toy.INDEX, position + 1], None

    @jax.jit
    def run(keys, canvas):
        context = autoregressive.Context(None, read)
        log_probs = lambda h: nucleus(log_probs_without_mask(h, toy.MASK), p)
        return autoregressive.sample(context, log_probs, toy.MASK, keys, canvas)

    samples = jax.device_get(run(keys(0), canvases(row)))
    # Left to right is what a block size of 1 is.
    toy.assert_drawn_from(samples.tokens, toy.first_hitting(toy.nucleus(table, p), row, 1))
    assert (samples.nfe == row.count(toy.MASK)).all()


def exact_analytic(table, row, num_steps, p):
    """SEDD's sampler by enumeration, from its definition: staggered score times transition, then denoising."""
    times = np.linspace(1, 1e-5, num_steps + 1)
    with np.errstate(divide="ignore"):
        sigmas = np.minimum(-np.log1p(-times), -np.log(1e-3))

    def step(sigma, dsigma, final=False):
        score = table / np.expm1(sigma)
        score[..., toy.MASK] = 1
        if p < 1:
            score = toy.nucleus(score / score.sum(-1, keepdims=True), p)
        staggered = score * np.exp(dsigma)
        staggered[..., toy.MASK] += (1 - np.exp(dsigma)) * score.sum(-1)
        transition = np.full(toy.V, 1 - np.exp(-dsigma)) + np.exp(-dsigma) * np.eye(toy.V)[toy.MASK]
        probs = np.maximum(staggered * transition, 0)
        if final:
            probs[..., toy.MASK] = 0
        return toy.move(probs / np.maximum(probs.sum(-1, keepdims=True), 1e-300), np.ones(toy.L, bool))

    distribution = toy.start_at(row)
    for sigma, after in itertools.pairwise(sigmas):
        distribution = distribution @ step(sigma, sigma - after)
    return distribution @ step(sigmas[-1], sigmas[-1], final=True)


@pytest.mark.parametrize(("p", "row"), [(1.0, ALL_MASKED), (0.8, ALL_MASKED), (1.0, GAP)])
def test_analytic_has_the_enumerated_distribution_and_tends_to_the_data(p, row):
    joint = toy.random_joint(4)
    table = toy.conditionals(joint)
    log_table = jnp.log(jnp.asarray(table, jnp.float32))

    def log_score(hidden, sigma):
        return (hidden - jnp.log(jnp.expm1(sigma))).at[..., toy.MASK].set(0)

    @jax.jit
    def run(keys, canvas, num_steps):
        hidden = lambda tokens, sigma: log_table[tokens @ toy.INDEX]
        return analytic.sample(hidden, log_score, num_steps, p, toy.MASK, keys, canvas)

    distances = []
    for num_steps in (2, 6, 24):
        samples = jax.device_get(run(keys(num_steps)[: N // 2], canvases(row)[: N // 2], num_steps))
        exact = exact_analytic(table, row, num_steps, p)
        toy.assert_drawn_from(samples.tokens, exact)
        assert (samples.nfe == num_steps + 1).all()
        given = (row == toy.STATES) | (np.asarray(row) == toy.MASK)
        data = joint * given.all(1)
        distances.append(toy.total_variation(exact, data / data.sum()))
    if p == 1:
        assert distances[0] > 2 * distances[1] > 4 * distances[2]
        assert distances[2] < 0.04
