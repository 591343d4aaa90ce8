"""The authors' step probabilities (tests/golden/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bd3_jax.diffusion import objectives
from bd3_jax.diffusion.objectives import log_probs_without_mask
from bd3_jax.diffusion.schedules import get_schedule
from bd3_jax.sampling import analytic
from bd3_jax.sampling.contexts import Cached, Memory, Windowed
from bd3_jax.sampling.truncation import Truncation
from tests.conftest import assert_agree


def ancestral_probs(golden, hidden):
    """q(x_s | x_t) at masked positions: unmasked with the schedule's chance, then drawn as the sampler draws."""
    p_x0 = log_probs_without_mask(golden.lm.network.unembed(golden.params, hidden), golden.lm.ids.mask)
    p_x0 = np.exp(Truncation(float(golden["nucleus_p"]))(p_x0))
    p = get_schedule("loglinear").move_chance
    stay = p(golden["ddpm_t"] - golden["ddpm_dt"]) / p(golden["ddpm_t"])
    return p_x0, (1 - stay) * p_x0 + stay * (np.arange(golden.lm.ids.vocab_size) == golden.lm.ids.mask)


@pytest.mark.parametrize("name", ["mdlm", "mdlm_loss_scale"])
def test_ancestral_mdlm(golden, name):
    g = golden(name)
    context = Windowed(g.lm.network, 16, 16)
    x = jnp.asarray(g["ddpm_x"])
    memory = Memory(None, jnp.zeros_like(x))
    look = jax.jit(lambda params, memory, x: context.look(params, memory, jnp.zeros(len(x), jnp.int32), x, None))
    p_x0, q = ancestral_probs(g, look(g.params, memory, x))
    masked = g["ddpm_x"] == g.lm.ids.mask
    assert_agree(p_x0[masked], g["ddpm_p_x0_nucleus"][masked])
    assert_agree(q[masked], g["ddpm_q_xs"][masked])


@pytest.mark.parametrize("name", ["bd3lm_block4", "bd3lm_block1"])
@pytest.mark.parametrize("kv_cache", [False, True])
def test_ancestral_bd3lm(golden, name, kv_cache):
    """The first call of the last block, which with a cache stores the block before it too."""
    g = golden(name)
    size, network = g.lm.block_size, g.lm.network
    x, last = jnp.asarray(g["ddpm_x"]), 16 // size - 1
    context = Cached(network, size, 16 - size) if kv_cache else Windowed(network, size, 16)
    params = context.freeze(g.params)
    first = jax.jit(lambda memory, tokens: context.first(params, memory, jnp.full(1, last), tokens, None)[0])
    hidden = [first(context.start(params, np.asarray(row), last), row[None, 16 - size :]) for row in x]
    _, q = ancestral_probs(g, jnp.concatenate(hidden))
    masked = g["ddpm_x"][:, 16 - size :] == g.lm.ids.mask
    assert_agree(q[masked], g["ddpm_q_xs"][masked])


@pytest.mark.parametrize("name", ["sedd", "sedd_loss_scale"])
@pytest.mark.parametrize("p", [1.0, 0.9])
@pytest.mark.parametrize("step", ["analytic", "denoiser"])
def test_analytic_sedd(golden, name, p, step):
    g = golden(name)
    mask, xt = g.lm.ids.mask, jnp.asarray(g["xt"])
    sigma_at = get_schedule("loglinear").total_noise
    t = g[f"{step}_t"]
    sigma = sigma_at(jnp.full(len(xt), t))
    logits = g.lm.network.unembed(g.params, g.lm.network.apply(g.params, xt, 16, sigma=sigma))
    log_score = objectives.sedd_log_score(logits, xt, jnp.broadcast_to(sigma[:, None], xt.shape), mask)
    dsigma = sigma_at(t) - sigma_at(t - g["analytic_dt"]) if step == "analytic" else sigma_at(t)
    probs = analytic.step_probs(analytic.score(log_score, p), xt, dsigma, mask)
    if step == "denoiser":
        probs = probs.at[..., mask].set(0)
    assert_agree(probs, g[f"{step}_probs_nucleus{p}"])
