import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3_jax.sampling import categorical
from bd3_jax.sampling.block import fill_blocks
from bd3_jax.sampling.contexts import Memory, Windowed
from bd3_jax.sampling.updates import Ancestral, Denoiser

V = 50_258
DRAWS = 100_000


def ours(log_probs, draws=DRAWS):
    draw_one = lambda key: categorical.draw(key[None], log_probs[None])[0]
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(draw_one, keys, batch_size=2000))(keys))


def thin_tail():
    """One token has 0.998; the other 0.002 are spread over 50,257, each less likely than a float32 Gumbel reaches."""
    probs = np.full(V, 0.002 / (V - 1))
    probs[40_000] = 0.998
    return jnp.asarray(np.log(probs), jnp.float32)


def test_thin_tail_has_its_share():
    tokens = ours(thin_tail())
    tail = tokens[tokens != 40_000]
    assert stats.binomtest(len(tail), DRAWS, 0.002).pvalue > 1e-3
    # Within the tail all ids are equally likely.
    assert stats.kstest(tail / V, "uniform").pvalue > 1e-3


def test_a_plain_gumbel_loses_the_thin_tail():
    """What `draw` is there to avoid, and a proof that the test above can fail."""
    log_probs = thin_tail()
    gumbel = lambda key: -jnp.log(-jnp.log(jax.random.uniform(key, (V,), minval=1e-10)))
    few = jax.random.split(jax.random.key(1), 10_000)
    tokens = jax.lax.map(lambda key: (log_probs + gumbel(key)).argmax(), few, batch_size=50)
    assert stats.binomtest(int((tokens != 40_000).sum()), 10_000, 0.002).pvalue < 1e-3


def test_tail_groups_of_known_probability():
    """Zipf's law, in random order: groups of tokens by rank, the last of tokens of about 1e-7 each."""
    order = np.random.default_rng(0).permutation(V)
    weights = 1 / (1.0 + np.arange(V)) ** 1.3
    probs = np.empty(V)
    probs[order] = weights / weights.sum()
    tokens = ours(jnp.asarray(np.log(probs), jnp.float32) + 7.0)  # need not be normalised
    rank = np.empty(V, int)
    rank[order] = np.arange(V)
    edges = [0, 1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000, 10_000, 20_000, 30_000, 40_000, V]
    expected = DRAWS * np.histogram(np.arange(V), edges, weights=probs[order])[0]
    observed = np.histogram(rank[tokens], edges)[0]
    assert expected.min() > 30
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("vocab_size", [1, 2, 4, 5, 30, 37])
def test_every_token_of_a_small_vocabulary(vocab_size):
    probs = np.random.default_rng(vocab_size).dirichlet(np.ones(vocab_size)) + 1e-3
    probs[vocab_size // 2] = 0 if vocab_size > 1 else 1
    tokens = ours(jnp.log(jnp.asarray(probs / probs.sum(), jnp.float32)), 20_000)
    observed = np.bincount(tokens, minlength=vocab_size)
    assert (observed[probs == 0] == 0).all()
    expected = len(tokens) * (probs / probs.sum())
    if vocab_size > 2:
        assert stats.chisquare(observed[probs > 0], expected[probs > 0]).pvalue > 1e-3


def test_a_draw_depends_on_its_own_key_only():
    keys = jax.random.split(jax.random.key(3), 6)
    log_probs = jax.random.normal(jax.random.key(4), (6, 2001))
    draw = jax.jit(categorical.draw)
    together = draw(keys, log_probs)
    alone = [draw(keys[i : i + 1], log_probs[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)


def zipf(size, seed=0):
    """Probabilities in random order, and the rank of each token."""
    rank = np.random.default_rng(seed).permutation(size)
    weights = 1 / (1.0 + rank)
    return weights / weights.sum(), rank


def test_the_same_as_inverting_the_cumulative_distribution():
    """Against another way to draw, in float64: counts of groups of tokens by rank, the rarest of 1e-6 a token."""
    probs, rank = zipf(V)
    edges = [0, 1, 2, 4, 8, 30, 100, 1000, 10_000, 30_000, V]
    inverted = np.searchsorted(np.cumsum(probs), np.random.default_rng(5).random(DRAWS) * probs.sum())
    tokens = ours(jnp.asarray(np.log(probs), jnp.float32))
    counts = [np.histogram(rank[drawn], edges)[0] for drawn in (tokens, inverted)]
    assert np.min(counts) > 1000
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_modes_of_jax():
    """The usual mode of `jax.random.gumbel`, and so of `categorical`, ends at 16; "high" goes on."""
    low, high = (np.asarray(jax.random.gumbel(jax.random.key(0), (2**25,), mode=mode)) for mode in ("low", "high"))
    assert low.max() < 16 < high.max()
    # In 2^25 draws a few are above 16, as exp(-16) says.
    assert stats.binomtest(int((high > 16).sum()), 2**25, -np.expm1(-np.exp(-16))).pvalue > 1e-3


def entropy(probs):
    return -(probs * np.log(np.where(probs > 0, probs, 1))).sum()


def plain_gumbel_step(probs, num_steps):
    """Which token a masked position becomes in a step that unmasks it with probability 1/T, by a float32 Gumbel.

    The mask competes with probability 1 - 1/T; u has 23 bits, so that tokens reach -ln(-ln(1 - 2^-23)) = 15.9 at most.
    A token wins where its Gumbel exceeds the mask's by the difference of the log-probabilities; two tokens hardly ever
    both do.
    """
    u = 1 - np.arange(1, 2**16) * 2.0**-23
    reach = -np.log(-np.log(u))
    lead = np.log(1 - 1 / num_steps) - np.log(probs / num_steps)
    wins = np.array([np.exp(-np.exp(-(reach - each))).sum() for each in lead])
    return wins / wins.sum()


def test_entropy_of_a_sampler_with_5000_steps():
    """A plain Gumbel that decides on unmasking and on the token at once takes nats away; ours takes none."""
    probs, rank = zipf(2000)
    assert entropy(plain_gumbel_step(probs, 5000)) < entropy(probs) - 1
    assert entropy(plain_gumbel_step(probs, 100)) > entropy(probs) - 0.05  # few steps do little harm

    log_probs = jnp.log(jnp.asarray(probs, jnp.float32))
    denoiser = Denoiser(lambda hidden: jnp.broadcast_to(log_probs, (len(hidden), 2000)), categorical.draw, 2000)

    class Still:
        apply = staticmethod(lambda params, tokens, block_size: jnp.zeros((*tokens.shape, 1)))

    given, first, end = jnp.full((1500, 16), 2000), jnp.zeros(1500, jnp.int32), jnp.full(1500, 16)
    keys, memory = jax.random.split(jax.random.key(2), 1500), Memory(None, jnp.zeros_like(given))
    context = Windowed(Still(), 16, 16)
    run = jax.jit(lambda: fill_blocks(context, denoiser, Ancestral(5000), None, keys, memory, first, given, end))
    tokens = np.ravel(run()[1].tokens)
    counts = np.bincount(tokens, minlength=2000)
    # The empirical entropy of n draws is too small by (V - 1) / 2n on average.
    assert entropy(counts / counts.sum()) + 1999 / (2 * len(tokens)) == pytest.approx(entropy(probs), abs=0.03)
    edges = [0, 1, 3, 10, 30, 100, 300, 1000, 2000]
    expected = len(tokens) * np.histogram(rank, edges, weights=probs)[0]
    assert stats.chisquare(np.histogram(rank[tokens], edges)[0], expected).pvalue > 1e-3
