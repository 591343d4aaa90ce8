"""The yardstick computes what we compute, from the same weights: losses, and hidden states with a cache."""

import jax
import numpy as np
import pytest

from bd3_jax.checkpoints.pytorch import to_tensors
from bd3_jax.diffusion import likelihood

torch = pytest.importorskip("torch")

CASES = [("ar", 1), ("mdlm", 12), ("sedd", 12), ("bd3lm", 4)]


@pytest.fixture(scope="module")
def make(script, toy_lm, random_params):
    yardstick = script("torch_baseline")

    def both(objective, block_size):
        lm = toy_lm(objective, block_size, dropout=0.0)
        params, m = random_params(lm), lm.network.model
        shape = yardstick.Shape(
            objective, block_size, m.length, m.width, m.num_layers, m.num_heads, m.cond_dim, 0.0, lm.ids.vocab_size
        )
        return yardstick, lm, params, yardstick.Model.filled(shape, to_tensors(params)).eval()

    return both


@pytest.mark.parametrize(("objective", "block_size"), CASES)
def test_losses_are_ours(make, objective, block_size):
    yardstick, lm, params, model = make(objective, block_size)
    x0 = np.random.default_rng(1).integers(0, 10, (3, 12))
    noise = (x0, block_size, lm.noise, 1e-3, 1.0, lm.ids.mask)
    draw = None if objective == "ar" else likelihood.draw_training(jax.random.key(0), *noise)
    _, ours = lm.token_losses(params, jax.numpy.asarray(x0), draw)
    xt, weight, sigma = (x0, x0, x0[:, :1]) if draw is None else (draw.xt, draw.weight, draw.sigma)
    with torch.no_grad():
        args = (torch.tensor(np.array(x)) for x in (x0, xt, weight, sigma[:, 0]))
        theirs = yardstick.token_losses(model, *args)
    assert np.asarray(ours).sum() > 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "block_size"), [("ar", 1), ("bd3lm", 4)])
def test_decoding_with_a_cache_is_one_pass(make, objective, block_size):
    """Logits of the last block with a cache against those of the whole pass, over clean tokens."""
    _, _, _, model = make(objective, block_size)
    tokens, cache = torch.tensor(np.random.default_rng(2).integers(0, 10, (1, 12))), None
    with torch.no_grad():
        for start in range(0, 12, block_size):
            logits, cache = model.decode(tokens[:, start : start + block_size], start, cache)
        both = tokens if objective == "ar" else torch.cat([tokens, tokens], dim=1)
        whole = model(both, torch.zeros(1))[:, -block_size:]
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("objective", "block_size"), [("ar", 1), ("bd3lm", 4)])
def test_samples_are_whole(make, objective, block_size):
    yardstick, lm, _, model = make(objective, block_size)
    torch.manual_seed(0)
    tokens = yardstick.sample(model, lm.ids.bos, 12)
    assert tokens[0] == lm.ids.bos
    assert ((tokens >= 0) & (tokens < lm.ids.mask)).all()


@pytest.mark.parametrize(("objective", "block_size"), CASES)
def test_training_lowers_the_loss(make, objective, block_size):
    yardstick, _, _, model = make(objective, block_size)
    torch.manual_seed(0)
    x0 = torch.tensor(np.random.default_rng(3).integers(0, 10, (8, 12)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [yardstick.train_step(model, optimizer, x0) for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
