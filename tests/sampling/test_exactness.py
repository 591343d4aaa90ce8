"""Samplers against the exact distribution over all sequences of a toy vocabulary, by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.sampling import analytic, block, categorical
from bd3_jax.sampling.confidence import EntropyBounded, MostConfident, Remasking, Threshold
from bd3_jax.sampling.contexts import Memory, Windowed, WindowedNextToken
from bd3_jax.sampling.truncation import Truncation
from bd3_jax.sampling.updates import Ancestral, Call, Denoiser, Filling, FirstHitting
from tests.sampling import toy

N = 50_000
ALL_MASKED = [toy.MASK] * toy.L
PROMPTED = [2, 0, toy.MASK, toy.MASK]
GAP = [toy.MASK, 1, toy.MASK, toy.MASK]


def keys(seed):
    return jax.random.split(jax.random.key(seed), N)


def canvases(row):
    return jnp.tile(jnp.asarray(row, jnp.int32), (N, 1))


class Table:
    """A table in place of the network: hidden states are its log-probabilities, given the state of all positions."""

    def __init__(self, log_table):
        self.log_table = log_table

    def apply(self, params, tokens, block_size):
        return self.log_table[tokens @ toy.INDEX]


@functools.partial(jax.jit, static_argnames=("update", "block_size", "p"))
def run_blocks(keys, canvas, log_table, update, block_size, p):
    context = Windowed(Table(log_table), block_size, toy.L)
    denoiser = Denoiser(lambda h: h, Truncation(p).draw, toy.MASK)
    memory = Memory(None, jnp.full_like(canvas, toy.MASK))
    first = jnp.zeros(len(canvas), jnp.int32)
    end = jnp.full(len(canvas), toy.L)
    return block.fill_blocks(context, denoiser, update, None, keys, memory, first, canvas, end)[1]


def sample_blocks(table, update, block_size, p, row):
    log_table = jnp.log(jnp.asarray(table, jnp.float32))
    filled = jax.device_get(run_blocks(keys(0), canvases(row), log_table, update, block_size, p))
    given = np.asarray(row) != toy.MASK
    assert (filled.tokens[:, given] == np.asarray(row)[given]).all()
    assert (filled.confidence[:, given] == 0).all()
    assert (filled.drawn_at[:, given] == 0).all()
    assert (filled.drawn_at[:, ~given] > 0).all()
    return filled


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
    samples = sample_blocks(table, FirstHitting(), block_size, p, row)
    toy.assert_drawn_from(samples.tokens, toy.first_hitting(toy.nucleus(table, p), row, block_size))
    assert (samples.nfe.sum(1) == row.count(toy.MASK)).all()


@pytest.mark.parametrize(("block_size", "p"), [pytest.param(4, 0.8, marks=pytest.mark.slow), (2, 1.0)])
def test_ancestral_has_the_enumerated_distribution_and_tends_to_first_hitting(block_size, p):
    table = toy.random_table(2)
    limit = toy.first_hitting(toy.nucleus(table, p), ALL_MASKED, block_size)
    distances = []
    for num_steps in (1, 3, 12, 96):
        exact = toy.ancestral(toy.nucleus(table, p), ALL_MASKED, block_size, num_steps)
        distances.append(toy.total_variation(exact, limit))
        if num_steps == 12:
            continue  # nothing that 3 and 96 do not have, and compiled for itself
        samples = sample_blocks(table, Ancestral(num_steps), block_size, p, ALL_MASKED)
        toy.assert_drawn_from(samples.tokens, exact)
        # A call for each step in which at least one of the block's tokens is unmasked.
        calls = toy.L // block_size * num_steps * (1 - (1 - 1 / num_steps) ** block_size)
        nfe = samples.nfe.sum(1)
        assert abs(nfe.mean() - calls) <= 5 * nfe.std() / np.sqrt(N) + 1e-6
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 8 * distances[3]
    assert distances[3] < 0.02


def test_chi_square_tells_one_ancestral_step_from_first_hitting():
    table = toy.random_table(2)
    samples = sample_blocks(table, Ancestral(1), 4, 1.0, ALL_MASKED)
    with pytest.raises(AssertionError):
        toy.assert_drawn_from(samples.tokens, toy.first_hitting(table, ALL_MASKED, 4))


@pytest.mark.parametrize(("p", "row"), [(1.0, [2, 0, 3, 3]), (0.95, [2, 3, 3, 3])])
def test_autoregressive_has_the_enumerated_distribution(p, row):
    table = toy.random_table(3)
    log_table = jnp.log(jnp.asarray(table, jnp.float32))
    # What the network says at a position is of the next one.
    log_table = jnp.roll(log_table, -1, axis=1)

    @jax.jit
    def run(keys, canvas):
        context = WindowedNextToken(Table(log_table), toy.L)
        denoiser = Denoiser(lambda h: h, Truncation(p).draw, toy.MASK)
        memory = Memory(None, jnp.full_like(canvas, toy.MASK))
        first, end = jnp.zeros(len(canvas), jnp.int32), jnp.full(len(canvas), toy.L)
        return block.fill_blocks(context, denoiser, FirstHitting(), None, keys, memory, first, canvas, end)[1]

    samples = jax.device_get(run(keys(0), canvases(row)))
    # Left to right is what a block size of 1 is.
    toy.assert_drawn_from(samples.tokens, toy.first_hitting(toy.nucleus(table, p), row, 1))
    assert (samples.nfe.sum(1) == row.count(toy.MASK)).all()


def most_confident(k):
    """Which candidates are kept: of every case, given confidences and entropies `[n, 4]`, inf where not masked."""
    return lambda confidence, entropy: np.argsort(np.argsort(-confidence, axis=1), axis=1) < k


def threshold(tau):
    def choose(confidence, entropy):
        return (confidence > tau) | (confidence == confidence.max(1, keepdims=True))

    return choose


def entropy_bounded(gamma):
    def choose(confidence, entropy):
        chosen = np.zeros(entropy.shape, bool)
        for row, values in zip(chosen, entropy, strict=True):
            order = np.argsort(values)
            for count in range(1, np.isfinite(values).sum() + 1):
                taken = values[order[:count]]
                if count == 1 or taken.sum() - taken.max() <= gamma:
                    row[order[:count]] = True
        return chosen

    return choose


@pytest.mark.parametrize(
    ("update", "choose", "block_size", "p", "row"),
    [
        (MostConfident(1), most_confident(1), 4, 1.0, ALL_MASKED),
        (MostConfident(2), most_confident(2), 4, 0.95, GAP),
        (MostConfident(3), most_confident(3), 2, 1.0, ALL_MASKED),
        (Threshold(0.45), threshold(0.45), 4, 1.0, ALL_MASKED),
        (Threshold(0.4), threshold(0.4), 2, 1.0, PROMPTED),
        (EntropyBounded(0.9), entropy_bounded(0.9), 4, 1.0, ALL_MASKED),
        (EntropyBounded(0.0), entropy_bounded(0.0), 2, 0.95, GAP),
    ],
)
def test_confidence_has_the_enumerated_distribution(update, choose, block_size, p, row):
    table = toy.random_table(5)
    samples = sample_blocks(table, update, block_size, p, row)
    toy.assert_drawn_from(samples.tokens, toy.by_candidates(table, toy.nucleus(table, p), row, block_size, choose))
    assert samples.nfe.sum(1).max() <= row.count(toy.MASK)


def test_a_choice_by_confidence_is_not_first_hitting():
    """So the test above can fail."""
    table = toy.random_table(5)
    samples = sample_blocks(table, MostConfident(1), 4, 1.0, ALL_MASKED)
    with pytest.raises(AssertionError):
        toy.assert_drawn_from(samples.tokens, toy.first_hitting(table, ALL_MASKED, 4))


@functools.partial(jax.jit, static_argnames=("update", "taken"))
def take_steps(keys, canvas, log_table, update, taken):
    denoiser = Denoiser(lambda h: h, Truncation().draw, toy.MASK)
    filling, carry = Filling(canvas, jnp.zeros(canvas.shape)), update.init(keys, canvas == toy.MASK)
    for step in range(taken):
        masked = filling.tokens == toy.MASK
        hidden = log_table[filling.tokens @ toy.INDEX]
        call = Call(denoiser, categorical.fold_in(keys, step), filling, masked, hidden)
        filling, carry = update.step(call, carry)
    return filling.tokens


@pytest.mark.parametrize(
    ("eta", "num_steps", "taken", "row"), [(1.0, 5, 3, ALL_MASKED), (0.5, 3, 2, GAP), (0.0, 4, 3, ALL_MASKED)]
)
def test_remasking_has_the_enumerated_distribution_at_every_step(eta, num_steps, taken, row):
    """The table does not depend on the state, so that a token's confidence can be read off the token."""
    table = np.broadcast_to(toy.random_table(6)[:1], (toy.V**toy.L, toy.L, toy.V))
    log_table = jnp.log(jnp.asarray(table, jnp.float32))
    tokens = take_steps(keys(0), canvases(row), log_table, Remasking(num_steps, eta), taken)
    exact = toy.remasking(table, row, num_steps, eta, taken)
    toy.assert_drawn_from(tokens, exact)
    if eta:
        assert toy.total_variation(exact, toy.remasking(table, row, num_steps, 0.0, taken)) > 0.05


@pytest.mark.parametrize(("eta", "num_steps", "row"), [(1.0, 5, ALL_MASKED), (1.0, 1, PROMPTED)])
def test_remasking_ends_with_no_mask(eta, num_steps, row):
    table = np.broadcast_to(toy.random_table(6)[:1], (toy.V**toy.L, toy.L, toy.V))
    samples = sample_blocks(table, Remasking(num_steps, eta), 4, 1.0, row)
    toy.assert_drawn_from(samples.tokens, toy.remasking(table, row, num_steps, eta, num_steps))
    assert (samples.nfe.sum(1) == num_steps).all()


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
        assert (samples.nfe.sum(1) == num_steps + 1).all()
        given = (row == toy.STATES) | (np.asarray(row) == toy.MASK)
        data = joint * given.all(1)
        distances.append(toy.total_variation(exact, data / data.sum()))
    if p == 1:
        assert distances[0] > 2 * distances[1] > 4 * distances[2]
        assert distances[2] < 0.04
