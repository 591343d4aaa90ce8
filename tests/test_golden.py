"""The authors' numbers: their weights and inputs give their outputs (tests/golden/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import likelihood, objectives
from bd3_jax.diffusion.schedules import get_schedule

SUBS = ["bd3lm_block4", "bd3lm_block1", "mdlm", "mdlm_loss_scale"]
SEDD = ["sedd", "sedd_loss_scale"]
BACKENDS = [
    dict(attention="dense"),
    dict(attention="decomposed", attention_chunk=16),
    dict(attention="decomposed", attention_chunk=5, scan_unroll=2),
]


@pytest.mark.parametrize("name", ["loglinear", "square", "square_root", "log", "cosine"])
def test_schedules(name):
    """The stored values carry float32 cancellation, hence the wider tolerance."""
    with np.load(Path(__file__).parent / "golden" / "schedules.npz") as stored:
        schedule, t = get_schedule(name), stored["t"]
        for ours, part in ((schedule.move_chance, "move_chance"), (schedule.loss_scale, "loss_scale")):
            np.testing.assert_allclose(ours(t), stored[f"{name}_{part}"], rtol=5e-4, atol=5e-4)


def draw_of(case):
    """The stored noise as a Draw, its weights from our schedule."""
    t = case["t"][:, :: case.lm.block_size]
    schedule = get_schedule(case.lm.noise.schedule)
    weight = np.repeat(-schedule.loss_scale(t), case.lm.block_size, axis=1)
    return likelihood.Draw(case["xt"], weight, schedule.total_noise(t))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", [*SUBS, *SEDD])
def test_diffusion(golden, name, backend):
    case = golden(name, **backend)
    lm, draw = case.lm, draw_of(case)
    if name in SEDD:
        case.agree(draw.sigma, "sigma")

    @jax.jit
    def run(params):
        logits = lm.network.unembed(params, lm.hidden(params, case["x0"], draw))
        if name in SEDD:
            sigma = jnp.broadcast_to(draw.sigma, draw.xt.shape)
            output = objectives.sedd_log_score(logits, draw.xt, sigma, lm.ids.mask)
        else:
            output = objectives.subs_log_probs(logits, draw.xt, lm.ids.mask)
        return logits, output, lm.token_losses(params, case["x0"], draw)[1]

    for ours, stored in zip(run(case.params), ("logits", "model_output", "nll_per_token"), strict=True):
        case.agree(ours, stored)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_block1"])
def test_sampling_mode(golden, name, backend):
    case = golden(name, **backend)
    network, x = case.lm.network, case["sample_x"]

    @jax.jit
    def run(params):
        logits = network.unembed(params, network.apply(params, x, case.lm.block_size))
        return objectives.subs_log_probs(logits, x, case.lm.ids.mask)

    case.agree(run(case.params), "sample_model_output")


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_block1"])
def test_sampling_mode_with_a_cache(golden, name):
    case = golden(name)
    network, block_size, x = case.lm.network, case.lm.block_size, case["sample_x"]

    @jax.jit
    def step(params, block, cache):
        hidden, kv = network.decode(params, block, cache)
        output = objectives.subs_log_probs(network.unembed(params, hidden), block, case.lm.ids.mask)
        return output, cache.append(kv)

    cache, outputs = network.init_cache(len(x), x.shape[1]), []
    for start in range(0, x.shape[1], block_size):
        output, cache = step(case.params, x[:, start : start + block_size], cache)
        outputs.append(output)
    case.agree(np.concatenate(outputs, axis=1), "sample_model_output")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_autoregressive(golden, backend):
    case = golden("ar", **backend)
    lm = case.lm

    @jax.jit
    def run(params):
        logits = lm.network.unembed(params, lm.hidden(params, case["x0"], None))
        return (
            logits,
            objectives.log_probs_without_mask(logits, lm.ids.mask),
            lm.token_losses(params, case["x0"], None)[1],
        )

    logits, log_probs, losses = run(case.params)
    case.agree(logits, "logits")
    case.agree(log_probs, "log_probs")
    case.agree(losses[:, 1:], "nlls")
    case.agree(losses.sum() / losses[:, 1:].size, "loss")
