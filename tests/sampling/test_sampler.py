import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.errors import UserError
from bd3_jax.sampling import analytic
from bd3_jax.sampling.contexts import CachedNextToken
from bd3_jax.sampling.sampler import Sampler, sequence_keys
from tests.sampling.settings import GREEDY, change, sampling_config

PROMPTS = [[], [3, 4], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8]]
MODELS = [("bd3lm", 4), ("mdlm", 0), ("ar", 0), ("sedd", 0)]
NAMES = {"bd3lm": "first_hitting", "mdlm": "first_hitting", "ar": "autoregressive", "sedd": "analytic"}


@dataclasses.dataclass
class Samples:
    tokens: np.ndarray
    nfe: np.ndarray
    cache_calls: np.ndarray


compiled = jax.jit(Sampler.__call__, static_argnums=0)


def draw(sampler, params, prompts=PROMPTS, indices=None, seed=0, canvas=None):
    """Rows with prompts of their own, in one call."""
    keys = sequence_keys(seed, np.arange(len(prompts)) if indices is None else np.asarray(indices))
    canvas = sampler.canvas(prompts) if canvas is None else canvas
    filled = jax.device_get(compiled(sampler, params, keys, canvas))
    return Samples(filled.tokens[:, : sampler.config.max_length], filled.nfe.sum(1), filled.cache_calls.sum(1))


@pytest.mark.parametrize(("objective", "block_size"), MODELS)
def test_given_tokens_stay_and_calls_are_counted_for_each_sequence(make, objective, block_size):
    sampler, params = make(objective, block_size)
    samples = draw(sampler, params)
    assert samples.tokens.shape == (len(PROMPTS), 12)
    assert ((samples.tokens >= 0) & (samples.tokens < sampler.model.ids.mask)).all()
    for tokens, nfe, prompt in zip(samples.tokens, samples.nfe, PROMPTS, strict=True):
        assert tokens[: len(prompt) + 1].tolist() == [sampler.model.ids.bos, *prompt]
        assert nfe == (7 + 1 if objective == "sedd" else 11 - len(prompt))


@pytest.mark.parametrize(("objective", "block_size"), MODELS)
def test_a_sample_depends_on_seed_and_index_only(make, objective, block_size):
    sampler, params = make(objective, block_size)
    together = draw(sampler, params).tokens
    for index, prompt in enumerate(PROMPTS):
        among_others = draw(sampler, params, [[7], prompt, [], [1] * 9], [8, index, 5, 6]).tokens[1]
        np.testing.assert_array_equal(among_others, together[index])
    shuffled = draw(sampler, params, PROMPTS[::-1], [3, 2, 1, 0]).tokens
    np.testing.assert_array_equal(shuffled[::-1], together)
    assert (draw(sampler, params, seed=1).tokens != together).any()
    assert (draw(sampler, params, [[]] * 4).tokens[1:] != together[0]).any(axis=1).all()


@pytest.mark.parametrize(
    ("objective", "block_size", "name"),
    [
        ("bd3lm", 4, "first_hitting"),
        ("bd3lm", 3, "ancestral"),
        ("ar", 0, "autoregressive"),
    ],
)
def test_cache_gives_the_same_tokens(make, objective, block_size, name):
    sampler, params = make(objective, block_size, sampler=name)
    with_cache = draw(sampler, params)
    without = draw(change(sampler, kv_cache=False), params)
    np.testing.assert_array_equal(with_cache.tokens, without.tokens)
    np.testing.assert_array_equal(with_cache.nfe, without.nfe)
    assert (without.cache_calls == 0).all()
    # The call that draws a block's first token stores the block before, so only finished blocks cost a call.
    given = [(len(prompt) + 1) // block_size if block_size else len(prompt) + 1 for prompt in PROMPTS]
    assert with_cache.cache_calls.tolist() == given


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("bd3lm", 6), ("ar", 0)])
def test_cache_and_window_agree_beyond_the_context_where_keys_hold_one_token_each(make, objective, block_size):
    """With a single layer nothing that left the window lives on in the keys and values, so the two must not differ.

    Hidden states of the calls of every block, after a context that is read at once.
    """
    sampler, params = make(objective, block_size, num_layers=1, max_length=36)
    size, mask = sampler.model.block_size, sampler.model.ids.mask
    contexts = [change(sampler, kv_cache=kept)._context for kept in (True, False)]
    blocks = np.random.default_rng(0).integers(0, mask, (36 // size, size))
    known = 12 // size
    states = []
    for context in contexts:
        weights = context.freeze(params)
        memory = context.start(weights, blocks.ravel(), known)
        first = jax.jit(functools.partial(context.first, weights))
        look = jax.jit(functools.partial(context.look, weights))
        found = []
        for number in range(known, 36 // size):
            index, tokens = jnp.array([number]), jnp.asarray(blocks[None, number])
            hidden, memory = first(memory, index, jnp.full_like(tokens, mask), None)
            found.append(hidden)
            if objective == "bd3lm":  # AR's blocks have one call
                found.append(look(memory, index, tokens.at[:, size // 2 :].set(mask), None))
            memory = context.finish(memory, index, tokens)
        states.append(found)
    for cached, recomputed in zip(*states, strict=True):
        np.testing.assert_allclose(cached, recomputed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("ar", 0)])
def test_what_is_drawn_depends_on_the_whole_context(make, objective, block_size):
    """So the tests that compare tokens can fail."""
    sampler, params = make(objective, block_size, max_length=12)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 5, 2, 2, 1, 4, 3, 8]]
    drawn = draw(sampler, params, [prompt for prompt in prompts for _ in range(16)], [*range(16)] * 2).tokens
    assert (drawn[:16, 9:] != drawn[16:, 9:]).any(axis=1).mean() > 0.5


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("mdlm", 0)])
def test_windows_beyond_the_context(make, objective, block_size):
    """One ancestral step, greedy: each window's new tokens are the network's first choice given the window."""
    sampler, params = make(
        objective, block_size, sampler="ancestral", num_steps=1, nucleus=GREEDY, max_length=24, kv_cache=False
    )
    lm, mask = sampler.model, sampler.model.ids.mask
    samples = draw(sampler, params)
    new = lm.block_size if lm.block_size < lm.length else lm.length // 2
    for start in range(12, 24, new):
        window = jnp.asarray(samples.tokens[:, start + new - 12 : start + new]).at[:, 12 - new :].set(mask)
        logits = lm.network.unembed(params, lm.network.apply(params, window, lm.block_size))
        first_choice = logits.at[..., mask].set(-jnp.inf).argmax(-1)[:, 12 - new :]
        np.testing.assert_array_equal(samples.tokens[:, start : start + new], first_choice)
    finished_blocks = [(len(prompt) + 1) // lm.block_size for prompt in PROMPTS]
    assert samples.nfe.tolist() == [sampler.layout.num_blocks - finished for finished in finished_blocks]


def test_a_block_of_one_token_has_no_further_call(make):
    """It would feed the masked token itself: what it gives could not be taken for a prediction."""
    sampler, params = make("ar")
    context = CachedNextToken(sampler.model.network, 1, 11)
    memory, index = context.start(params, np.zeros(12, np.int32), 1), np.ones(1, np.int32)
    hidden, memory = context.first(params, memory, index, np.full((1, 1), sampler.model.ids.mask), None)
    further = context.look(params, memory, index, np.full((1, 1), sampler.model.ids.mask), None)
    assert np.isfinite(hidden).all()
    assert np.isnan(further).all()
    assert further.shape == hidden.shape


@pytest.mark.parametrize("kv_cache", [True, False])
def test_autoregressive_is_the_networks_first_choice(make, kv_cache):
    sampler, params = make("ar", nucleus=GREEDY, kv_cache=kv_cache)
    tokens = draw(sampler, params).tokens
    logits = sampler.model.network.unembed(params, sampler.model.network.apply(params, tokens, 1))
    first_choice = logits.at[..., sampler.model.ids.mask].set(-jnp.inf).argmax(-1)
    for row, choice, prompt in zip(tokens, first_choice, PROMPTS, strict=True):
        np.testing.assert_array_equal(row[len(prompt) + 1 :], choice[len(prompt) : -1])


@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 4), ("sedd", 0)])
def test_the_surplus_of_the_last_block_is_cut(make, objective, block_size):
    sampler, params = make(objective, block_size, max_length=10)
    whole = draw(change(sampler, max_length=12), params)
    np.testing.assert_array_equal(draw(sampler, params).tokens, whole.tokens[:, :10])


def test_positions_may_be_given_anywhere(make):
    """A canvas is not bound to prefixes: diffusion models fill the gaps."""
    for objective, block_size in [("bd3lm", 4), ("mdlm", 0), ("sedd", 0)]:
        sampler, params = make(objective, block_size)
        canvas = sampler.canvas([[]] * 4)
        canvas[:, [3, 6, 11]] = [[7, 8, 9], [1, 1, 2], [3, 3, 3], [9, 0, 9]]
        tokens = draw(sampler, params, canvas=canvas.copy()).tokens
        np.testing.assert_array_equal(tokens[:, [0, 3, 6, 11]], canvas[:, [0, 3, 6, 11]])
        assert (tokens != sampler.model.ids.mask).all()


def test_temperature(make):
    sampler, params = make("bd3lm", 4, temperature=0.5)
    hidden = jax.random.normal(jax.random.key(0), (3, 16))
    logits = np.array(sampler.model.network.unembed(params, hidden), np.float64)
    logits[:, sampler.model.ids.mask] = -np.inf
    expected = np.exp(logits) ** 2 / (np.exp(logits) ** 2).sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(sampler.log_probs(params, hidden)), expected, rtol=1e-4, atol=1e-7)
    coldest = change(sampler, temperature=1e-3).log_probs(params, 100 * hidden)
    np.testing.assert_array_equal(np.exp(coldest).argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(np.exp(coldest).sum(-1), 1, rtol=1e-5)


@pytest.mark.slow
def test_greedy_by_nucleus_or_by_top_k(make):
    sampler, params = make("bd3lm", 4, nucleus=GREEDY)
    by_nucleus = draw(sampler, params).tokens
    np.testing.assert_array_equal(by_nucleus, draw(change(sampler, nucleus=1.0, top_k=1), params).tokens)
    assert (by_nucleus != draw(change(sampler, nucleus=0.9), params).tokens).any()


def test_chunks_of_the_vocabulary_do_not_matter(make, monkeypatch):
    sampler, params = make("sedd")
    whole = draw(sampler, params).tokens
    monkeypatch.setattr(analytic, "MAX_SCORES", 4 * 11 * 5)  # 5 of the 12 positions at a time
    compiled_anew = change(sampler, max_length=9)
    np.testing.assert_array_equal(draw(compiled_anew, params).tokens, whole[:, :9])


def test_denoising_draws_even_where_the_nucleus_holds_the_mask_alone():
    """Ratios so small that the mask takes the whole nucleus: nothing is unmasked until the last step has to."""
    log_ratios = jnp.asarray([-20.0, -21.0, -22.0, 0.0])
    samples = analytic.sample(
        lambda tokens, sigma: jnp.zeros((*tokens.shape, 1)),
        lambda hidden, sigma: jnp.broadcast_to(log_ratios, (*hidden.shape[:-1], 4)),
        3, 0.9, 3, sequence_keys(0, np.arange(2000)), jnp.full((2000, 2), 3),
    )  # fmt: skip
    observed = np.bincount(np.ravel(samples.tokens), minlength=4)
    probs = np.exp(log_ratios[:3]) / np.exp(log_ratios[:3]).sum()
    assert observed[3] == 0
    np.testing.assert_allclose(observed[:3] / 4000, probs, atol=5 * 0.5 / np.sqrt(4000))


def test_what_a_model_cannot_do(toy_lm):
    with pytest.raises(UserError, match=r"sampling.max_length is 13; allowed: up to model.length = 12, since sedd"):
        Sampler.from_config(toy_lm("sedd"), dataclasses.replace(sampling_config("sedd"), max_length=13))
    with pytest.raises(UserError, match=r"sampling.temperature is 0.5; allowed: 1"):
        Sampler.from_config(toy_lm("sedd"), sampling_config("sedd", temperature=0.5))
    assert Sampler.from_config(toy_lm("sedd"), sampling_config("sedd")).config.sampler == "analytic"


@pytest.mark.parametrize(("max_length", "limit"), [(8, 8), (100, 12)])
def test_a_prompt_that_is_too_long(make, max_length, limit):
    sampler, _ = make("bd3lm", 4, max_length=max_length)
    assert (sampler.canvas([[1] * (limit - 1)])[0, 1:limit] == 1).all()
    with pytest.raises(UserError, match=rf"sampling.prompt has {limit + 1} tokens with BOS; allowed: up to {limit}"):
        sampler.canvas([[1] * limit])
