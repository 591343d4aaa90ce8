"""What the authors' implementation stored of a model, computed by this package from the same inputs.

tests/golden/README.md lists the arrays. Sizes, vocabulary and block size come from the model.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bd3_jax.diffusion import likelihood, objectives
from bd3_jax.diffusion.schedules import get_schedule
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params
from bd3_jax.sampling import analytic
from bd3_jax.sampling.nucleus import nucleus

Outputs = Mapping[str, Any]


class Unusable(Exception):
    """An input that cannot be used; the message says why."""


class _Inputs:
    """The stored arrays, checked as they are asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], lm: LanguageModel):
        self._arrays, self._lm = arrays, lm

    def tokens(self, name: str) -> Int[Array, "b L"]:
        rows = self._get(name)
        if rows.ndim != 2 or rows.shape[1] != self._lm.length or not np.issubdtype(rows.dtype, np.integer):
            raise Unusable(f"{name} is {rows.dtype} {list(rows.shape)}, expected integers [b, {self._lm.length}]")
        if rows.size == 0 or rows.min() < 0 or rows.max() >= self._lm.ids.vocab_size:
            raise Unusable(f"{name} must hold ids from 0 to {self._lm.ids.vocab_size - 1}")
        return jnp.asarray(rows, jnp.int32)

    def times(self, name: str, batch: int) -> Float[Array, "b N"]:
        """One t a block, from one a block or one a token."""
        t, length = self._get(name), self._lm.length
        blocks = length // self._lm.block_size
        if t.ndim == 2 and t.shape == (batch, length):
            t = t[:, :: self._lm.block_size]
        if t.shape != (batch, blocks) or not (t > 0).all() or not (t <= 1).all():
            raise Unusable(f"{name} {list(t.shape)} is no time in (0, 1] for every block or token")
        return jnp.asarray(t, jnp.float32)

    def number(self, name: str) -> float:
        value = self._get(name)
        if value.size != 1:
            raise Unusable(f"{name} has shape {list(value.shape)}, expected a scalar")
        return float(value.reshape(()))

    def _get(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise Unusable(f"{name} is missing")
        return self._arrays[name]


def groups(
    lm: LanguageModel, params: Params, stored: Mapping[str, np.ndarray]
) -> list[tuple[list[str], Callable[[], Outputs]]]:
    """Names of arrays that must be there for the objective, and the function that computes them from the others.

    The function raises `Unusable` where what it needs is not there.
    """
    inputs = _Inputs(stored, lm)
    if lm.objective == "ar":
        return [(["logits", "log_probs", "nlls", "loss"], lambda: _autoregressive(lm, params, inputs))]
    noised = ["sigma", "logits", "model_output", "nll_per_token"]
    groups: list[tuple[list[str], Callable[[], Outputs]]] = [(noised, lambda: _noised(lm, params, inputs))]
    if lm.objective == "sedd":
        found = [re.fullmatch(r"(?:analytic|denoiser)_probs_nucleus(.+)", name) for name in stored]
        # Where none is stored, the missing ones are named after the P of SEDD's samples.
        suffixes = sorted({match[1] for match in found if match}) or ["0.99"]
        for suffix in suffixes:
            for step in ("analytic", "denoiser"):
                array = f"{step}_probs_nucleus{suffix}"
                groups.append(([array], lambda array=array: _analytic(lm, params, inputs, array)))  # type: ignore[misc]
        return groups
    ddpm = ["ddpm_p_x0", "ddpm_p_x0_nucleus", "ddpm_q_xs"]
    if lm.objective == "bd3lm":
        groups.append((["sample_model_output"], lambda: _sampling_mode(lm, params, inputs)))
        ddpm = [name for name in ddpm if name in stored or name == "ddpm_q_xs"]
    groups.append((ddpm, lambda: _ancestral(lm, params, inputs)))
    return groups


@functools.partial(jax.jit, static_argnums=0)
def _likelihood_pass(
    lm: LanguageModel, params: Params, x0: Int[Array, "b L"], draw: likelihood.Draw | None
) -> tuple[Float[Array, "b L V"], Float[Array, "b L V"], Float[Array, "b L"]]:
    """Logits, what the objective makes of them, and the loss of every token."""
    logits, mask = lm.network.unembed(params, lm.hidden(params, x0, draw)), lm.ids.mask
    if draw is None:
        output = objectives.log_probs_without_mask(logits, mask)
    elif lm.objective == "sedd":
        sigma = jnp.broadcast_to(draw.sigma, draw.xt.shape)
        output = objectives.sedd_log_score(logits, draw.xt, sigma, mask)
    else:
        output = objectives.subs_log_probs(logits, draw.xt, mask)
    return logits, output, lm.token_losses(params, x0, draw)[1]


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(lm: LanguageModel, params: Params, x: Int[Array, "b L"]) -> Float[Array, "b L V"]:
    """log p(x0 | x_t) of a SUBS model in sampling mode."""
    logits = lm.network.unembed(params, lm.network.apply(params, x, lm.block_size))
    return objectives.subs_log_probs(logits, x, lm.ids.mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step_probs(
    lm: LanguageModel, p: float, params: Params, xt: Int[Array, "b L"], sigma: Float[Array, "b"], dsigma: Array
) -> Float[Array, "b L V"]:
    """Unnormalised probabilities of SEDD's step from the noise sigma to sigma - dsigma."""
    logits, mask = lm.network.unembed(params, lm.network.apply(params, xt, lm.block_size, sigma=sigma)), lm.ids.mask
    log_score = objectives.sedd_log_score(logits, xt, jnp.broadcast_to(sigma[:, None], xt.shape), mask)
    return analytic.step_probs(analytic.score(log_score, p), xt, dsigma, mask)


def _autoregressive(lm: LanguageModel, params: Params, inputs: _Inputs) -> Outputs:
    logits, log_probs, losses = _likelihood_pass(lm, params, inputs.tokens("x0"), None)
    return {"logits": logits, "log_probs": log_probs, "nlls": losses[:, 1:], "loss": losses[:, 1:].mean()}


def _noised(lm: LanguageModel, params: Params, inputs: _Inputs) -> Outputs:
    """The pass of the likelihood, at the stored times and noised tokens."""
    x0, xt = inputs.tokens("x0"), inputs.tokens("xt")
    t = inputs.times("t", len(xt))
    if x0.shape != xt.shape:
        raise Unusable(f"x0 has shape {list(x0.shape)}, xt {list(xt.shape)}")
    schedule = get_schedule(lm.noise.schedule)
    weight = jnp.repeat(-schedule.loss_scale(t), lm.block_size, axis=1)
    draw = likelihood.Draw(xt, weight, schedule.total_noise(t))
    logits, output, losses = _likelihood_pass(lm, params, x0, draw)
    # One sigma is stored for a sequence: that of its first block.
    return {"sigma": draw.sigma[:, :1], "logits": logits, "model_output": output, "nll_per_token": losses}


def _sampling_mode(lm: LanguageModel, params: Params, inputs: _Inputs) -> Outputs:
    return {"sample_model_output": _log_probs(lm, params, inputs.tokens("sample_x"))}


def _ancestral(lm: LanguageModel, params: Params, inputs: _Inputs) -> Outputs:
    """One step from t to t - dt, of BD3-LM in the last block."""
    x, p = inputs.tokens("ddpm_x"), inputs.number("nucleus_p")
    t, dt = inputs.number("ddpm_t"), inputs.number("ddpm_dt")
    if not (0 < dt <= t <= 1 and 0 < p <= 1):
        raise Unusable(f"ddpm_t, ddpm_dt, nucleus_p are {t}, {dt}, {p}; expected 0 < dt <= t <= 1, 0 < P <= 1")
    log_probs = _log_probs(lm, params, x)[:, -lm.block_size :]
    chance = get_schedule("loglinear").move_chance
    stay = chance(jnp.float32(t - dt)) / chance(jnp.float32(t))
    filtered = jnp.exp(nucleus(log_probs, p))
    is_mask = jnp.arange(lm.ids.vocab_size) == lm.ids.mask
    return {
        "ddpm_p_x0": jnp.exp(log_probs),
        "ddpm_p_x0_nucleus": filtered,
        "ddpm_q_xs": jnp.where(is_mask, stay, (1 - stay) * filtered),
    }


def _analytic(lm: LanguageModel, params: Params, inputs: _Inputs, array: str) -> Outputs:
    """The analytic step from t to t - dt, or the denoising step at t; P is at the end of the array's name."""
    step, _, suffix = array.partition("_probs_nucleus")
    try:
        p = float(suffix)
    except ValueError:
        p = 0.0
    xt, t = inputs.tokens("xt"), inputs.number(f"{step}_t")
    rest = t - inputs.number("analytic_dt") if step == "analytic" else 0.0
    if not (0 <= rest <= t <= 1 and t > 0 and 0 < p <= 1):
        raise Unusable(
            f"the name says P = {suffix}, t is {t}, t - dt {rest}; expected 0 <= t - dt <= t <= 1, t > 0, 0 < P <= 1"
        )
    sigma_at = get_schedule("loglinear").total_noise
    dsigma = sigma_at(jnp.float32(t)) - sigma_at(jnp.float32(rest))
    probs = _step_probs(lm, p, params, xt, sigma_at(jnp.full((len(xt),), t)), dsigma)
    return {array: probs if step == "analytic" else probs.at[..., lm.ids.mask].set(0)}
