import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bd3_jax.sampling import categorical

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
    few = jax.random.split(jax.random.key(1), 8000)
    tokens = jax.lax.map(lambda key: (log_probs + gumbel(key)).argmax(), few, batch_size=50)
    assert stats.binomtest(int((tokens != 40_000).sum()), 8000, 0.002).pvalue < 1e-3


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
    together = categorical.draw(keys, log_probs)
    alone = [categorical.draw(keys[i : i + 1], log_probs[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)
