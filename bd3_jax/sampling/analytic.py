"""Analytic sampling of SEDD's absorbing process (Lou et al., 2024, section 4.2 and algorithm 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.diffusion.schedules import get_schedule
from bd3_jax.sampling import categorical
from bd3_jax.sampling.block import Filled
from bd3_jax.sampling.nucleus import nucleus
from bd3_jax.sampling.updates import Denoiser, Filling, fill

END = 1e-5
"""The time at which the steps end and the denoising step begins."""

MAX_SCORES = 2**24
"""A device holds scores of at most so many entries at once, beyond one position of every sequence."""


def score(log_score: Float[Array, "*n V"], p: float) -> Float[Array, "*n V"]:
    """The ratios p_t(y) / p_t(x_t); with nucleus P < 1 all V of them are normalised and filtered like probabilities.

    So P = 1 is not the limit of P < 1: there the ratios keep their scale, which the steps depend on. That is how the
    authors' implementation drew the published samples.
    """
    if p == 1:
        return jnp.exp(log_score)
    return jnp.exp(nucleus(jax.nn.log_softmax(log_score, axis=-1), p))


def step_probs(
    score: Float[Array, "*n V"], tokens: Int[Array, "*n"], dsigma: Float[Array, ""] | float, mask: int
) -> Float[Array, "*n V"]:
    """Unnormalised probabilities of x at the noise level sigma - dsigma, given x_t and the ratios there.

    Staggered score times transition. The mask's entry may come out below 0, which stands for 0.
    """
    vocab = jnp.arange(score.shape[-1])
    is_mask, is_current = vocab == mask, vocab == tokens[..., None]
    staggered = score * jnp.exp(dsigma)
    staggered = jnp.where(is_mask, staggered - jnp.expm1(dsigma) * score.sum(axis=-1, keepdims=True), staggered)
    transition = jnp.where(is_current, jnp.exp(-dsigma), 0)
    transition = jnp.where((tokens == mask)[..., None], transition - jnp.expm1(-dsigma), transition)
    return staggered * transition


def sample(
    hidden: Callable[[Int[Array, "b L"], Float[Array, "b"]], Float[Array, "b L d"]],
    log_score: Callable[[Float[Array, "*n d"], Float[Array, ""]], Float[Array, "*n V"]],
    num_steps: int,
    p: float,
    mask: int,
    keys: PRNGKeyArray,
    canvas: Int[Array, "b L"],
    batch_shards: int = 1,
) -> Filled:
    """T steps from t = 1 to 1e-5, then one that removes what noise is left: T + 1 network calls.

    Unmasked tokens never change under the absorbing process, so only masked positions are looked at: first whether
    each is unmasked, then, where it is, which token it becomes. The vocabulary is gone through in chunks of positions.

    Args:
      hidden: (tokens, sigma) -> hidden states; one network call.
      log_score: (hidden states at masked positions, sigma) -> log-ratios, 0 at the mask.
      num_steps: T.
      p: nucleus P.
      mask: the mask's id.
      keys: one for each sequence, `[b]`.
      canvas: given tokens, and the mask's id elsewhere.
      batch_shards: into how many parts devices split the batch; no number depends on it.
    """
    batch = canvas.shape[0]
    sigma_at = get_schedule("loglinear").total_noise
    dt = (1 - END) / num_steps

    def probs_at(states: Array, sigma: Array, dsigma: Array) -> Array:
        ratios = score(log_score(states, sigma), p)
        return step_probs(ratios, jnp.full(ratios.shape[:-1], mask), dsigma, mask)

    def advance(
        step: Array | int, state: tuple[Filling, Array], sigma: Array, dsigma: Array, *, final: bool
    ) -> tuple[Filling, Array]:
        filling, drawn_at = state
        tokens = filling.tokens
        key_leave, key_token = categorical.split(categorical.fold_in(keys, step))
        states = hidden(tokens, jnp.broadcast_to(sigma, (batch,)))
        leaving = tokens == mask
        if not final:

            def log_odds(at_position: Float[Array, "b d"]) -> Float[Array, "b 2"]:
                probs = probs_at(at_position, sigma, dsigma)
                leave = probs.at[..., mask].set(0).sum(axis=-1)
                return jnp.log(jnp.stack([jnp.maximum(probs[..., mask], 0), leave], axis=-1))

            vocab_size = jax.eval_shape(log_score, states, sigma).shape[-1]
            chunk = max(1, MAX_SCORES * batch_shards // (batch * vocab_size))
            odds = jax.lax.map(log_odds, jnp.moveaxis(states, 1, 0), batch_size=min(chunk, states.shape[1]))
            choose = jax.vmap(lambda key, odds: jax.random.categorical(key, odds, mode="high"))
            leaving &= choose(key_leave, jnp.moveaxis(odds, 1, 0)) == 1

        def log_probs(at_position: Float[Array, "b d"]) -> Float[Array, "b V"]:
            log_probs = jnp.log(probs_at(at_position, sigma, dsigma).at[..., mask].set(0))
            # A nucleus that holds the mask alone leaves the denoising step nothing to draw from but all the tokens.
            unfiltered = log_score(at_position, sigma).at[..., mask].set(-jnp.inf)
            nothing = jnp.isneginf(log_probs).all(axis=-1, keepdims=True)
            return jax.nn.log_softmax(jnp.where(nothing, unfiltered, log_probs), axis=-1)

        filling = fill(Denoiser(log_probs, categorical.draw, mask), key_token, filling, states, leaving)
        return filling, jnp.where(leaving, step + 1, drawn_at)

    def one_step(step: Array, state: tuple[Filling, Array]) -> tuple[Filling, Array]:
        t = 1 - step * dt
        sigma = sigma_at(t)
        return advance(step, state, sigma, sigma - sigma_at(t - dt), final=False)

    state = Filling(canvas, jnp.zeros(canvas.shape, jnp.float32)), jnp.zeros_like(canvas)
    state = jax.lax.fori_loop(0, num_steps, one_step, state)
    sigma = sigma_at(jnp.asarray(END))
    filling, drawn_at = advance(num_steps, state, sigma, sigma, final=True)
    calls = jnp.full((batch, 1), num_steps + 1)
    return Filled(filling.tokens, filling.confidence, drawn_at, calls, jnp.zeros((batch, 1), jnp.int32))
