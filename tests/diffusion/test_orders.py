"""Likelihoods under a fixed order of unmasking: all texts of a toy together, and token by token as a sampler goes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import orders
from bd3_jax.language_model import LanguageModel

LENGTH, TOKENS = 4, 3
eval_losses = jax.jit(LanguageModel.eval_losses, static_argnums=(0, 4))


def even_params(random_params, lm):
    """Of a model that is nowhere so sure that confidences are all 1."""
    params = random_params(lm)
    return {**params, "output": jax.tree.map(lambda leaf: 0.1 * leaf, params["output"])}


def one_by_one(lm, params, text, order):
    """-log p of every token: each block masked after the clean ones before it, its tokens filled in one at a time.

    In float64 from the logits, by the block-causal pass that samplers use.
    """

    @jax.jit
    def logits(tokens):
        return lm.network.unembed(params, lm.network.apply(params, tokens[None], lm.block_size))[0]

    losses, now = np.zeros(LENGTH), np.full(LENGTH, lm.ids.mask)
    for start in range(0, LENGTH, lm.block_size):
        block = list(range(start, start + lm.block_size))
        if start == 0 and lm.noise.ignore_bos:
            now[0] = text[0]
            block.remove(0)
        while block:
            values = np.asarray(logits(jnp.asarray(now)), np.float64)[:, :TOKENS]
            probs = np.exp(values) / np.exp(values).sum(-1, keepdims=True)
            # Where all is masked, positions differ by rounding alone: the first of them is taken.
            surest = max(probs[place].max() for place in block) - 1e-6
            position = next(p for p in block if order == "left_to_right" or probs[p].max() > surest)
            losses[position] = -np.log(probs[position, text[position]])
            now[position] = text[position]
            block.remove(position)
    return losses


@pytest.mark.parametrize("order", orders.ORDERS)
@pytest.mark.parametrize(("objective", "block_size"), [("bd3lm", 2), ("mdlm", 4)])
def test_all_texts_have_probability_1(toy_lm, random_params, objective, block_size, order):
    lm = toy_lm(objective, block_size, vocab_size=TOKENS + 1, length=LENGTH, ignore_bos=False)
    texts = np.array(list(itertools.product(range(TOKENS), repeat=LENGTH)), np.int32)
    params = even_params(random_params, lm)
    losses = np.asarray(eval_losses(lm, params, texts, jax.random.key(0), order))
    assert np.exp(-losses.sum(1)).sum() == pytest.approx(1, abs=1e-5)
    for index in (0, 17, 44, 80):
        np.testing.assert_allclose(losses[index], one_by_one(lm, params, texts[index], order), rtol=1e-4, atol=1e-5)
    other = eval_losses(lm, params, texts, jax.random.key(0), next(o for o in orders.ORDERS if o != order))
    assert np.abs(np.asarray(other) - losses).max() > 1e-2  # the order matters


@pytest.mark.parametrize("order", orders.ORDERS)
def test_a_given_bos_has_no_loss(toy_lm, random_params, order):
    lm = toy_lm("bd3lm", 2, vocab_size=TOKENS + 1, length=LENGTH)
    params, texts = even_params(random_params, lm), np.array([[0, 1, 2, 1], [0, 2, 2, 0]], np.int32)
    losses = np.asarray(eval_losses(lm, params, texts, jax.random.key(0), order))
    for text, own in zip(texts, losses, strict=True):
        np.testing.assert_allclose(own, one_by_one(lm, params, text, order), rtol=1e-4, atol=1e-5)
    assert (losses[:, 0] == 0).all()


def test_at_block_size_1_it_is_the_exact_likelihood(toy_lm, random_params):
    lm = toy_lm("bd3lm", 1, vocab_size=TOKENS + 1, length=LENGTH)
    params, texts = random_params(lm), np.array([[0, 1, 2, 1]], np.int32)
    exact = eval_losses(lm, params, texts, jax.random.key(0), "monte_carlo")
    free = jnp.ones(texts.shape, bool).at[:, 0].set(not lm.noise.ignore_bos)
    for order in orders.ORDERS:
        found = orders.token_losses(lm._unmasking(order, params, jnp.asarray(texts)), free, 1).losses
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
