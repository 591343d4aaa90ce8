"""The objectives: from logits to what the model says of x0, and to its loss per token in nats.

| objective | parameterisation | loss |
| --- | --- | --- |
| AR | `log_probs_without_mask` | `ar_loss` |
| MDLM, BD3-LM | SUBS: `subs_log_probs` | `subs_loss` |
| SEDD (absorbing) | score entropy: `sedd_log_score` | `sedd_loss` |

Each works on any leading shape `*n` of positions, so that callers may go through a sequence in chunks.
`weight` is -s(t) >= 0 in the Monte Carlo NELBO, or whatever a lower-variance estimator puts in its place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_probs_without_mask(logits: Float[Array, "*n V"], mask_id: int) -> Float[Array, "*n V"]:
    """Log-softmax in which the mask, which no model predicts, has -inf.

    It is log p(x_{i+1} | x_{<=i}) of AR, and log p(x0 | x_t) of SUBS at masked positions.
    """
    return jax.nn.log_softmax(_without_mask(logits, mask_id), axis=-1)


def _without_mask(logits: Float[Array, "*n V"], mask_id: int) -> Float[Array, "*n V"]:
    return jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)


def _pick(values: Float[Array, "*n V"], ids: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """values[id], as a sum over V: so its gradient is part of one pass over V and no scatter."""
    return jnp.where(jnp.arange(values.shape[-1]) == ids[..., None], values, 0).sum(-1)


def ar_loss(logits: Float[Array, "*n V"], targets: Int[Array, "*n"], mask_id: int) -> Float[Array, "*n"]:
    """-log p(target)."""
    return jax.nn.logsumexp(_without_mask(logits, mask_id), axis=-1) - _pick(logits, targets)


def doubt(logits: Float[Array, "*n V"], mask_id: int) -> Float[Array, "*n"]:
    """-(the highest probability of a token), rounded as samplers round it, so that both rank alike."""
    return -jnp.exp(jax.nn.log_softmax(_without_mask(logits, mask_id), axis=-1).max(-1))


def shortfall(logits: Float[Array, "*n V"], targets: Int[Array, "*n"], mask_id: int) -> Float[Array, "*n"]:
    """log of the highest probability of a token over that of the target; 0 where the target is the likeliest."""
    return _without_mask(logits, mask_id).max(-1) - _pick(logits, targets)


def subs_log_probs(logits: Float[Array, "*n V"], xt: Int[Array, "*n"], mask_id: int) -> Float[Array, "*n V"]:
    """log p(x0 | x_t) under SUBS (MDLM, section 3.2.3): zero masking probability, and unmasked tokens carried over."""
    log_probs = log_probs_without_mask(logits, mask_id)
    carried = jnp.where(jnp.arange(logits.shape[-1]) == xt[..., None], 0.0, -jnp.inf)
    return jnp.where((xt == mask_id)[..., None], log_probs, carried)


def subs_loss(
    logits: Float[Array, "*n V"], x0: Int[Array, "*n"], xt: Int[Array, "*n"], weight: Float[Array, "*n"], mask_id: int
) -> Float[Array, "*n"]:
    """weight * -log p(x0) at masked positions, 0 at the others (Block Diffusion, eq. 8; MDLM, eq. 10)."""
    return jnp.where(xt == mask_id, weight * ar_loss(logits, x0, mask_id), 0.0)


def sedd_log_score(
    logits: Float[Array, "*n V"], xt: Int[Array, "*n"], sigma: Float[Array, "*n"], mask_id: int
) -> Float[Array, "*n V"]:
    """log s(x_t)_y = log p_t(y) / p_t(x_t): scaled by the noise, 0 at the current token (SEDD, section 5.1)."""
    vocab_size = logits.shape[-1]
    log_score = logits - jnp.log(jnp.expm1(sigma))[..., None] - jnp.log(vocab_size - 1)
    return jnp.where(jnp.arange(vocab_size) == xt[..., None], 0.0, log_score)


def sedd_loss(
    logits: Float[Array, "*n V"],
    x0: Int[Array, "*n"],
    xt: Int[Array, "*n"],
    sigma: Float[Array, "*n"],
    weight: Float[Array, "*n"],
    mask_id: int,
) -> Float[Array, "*n"]:
    """Denoising score entropy of the absorbing process (SEDD, eq. 9) at masked positions, 0 at the others.

    With r = 1 / expm1(sigma) the ratio at the clean token, and the rate weight * expm1(sigma):
    rate * (sum_{y != mask} score_y - r * log score_{x0} + r (ln r - 1)).
    """
    log_score = sedd_log_score(logits, xt, sigma, mask_id)
    is_mask = jnp.arange(logits.shape[-1]) == mask_id
    positive = jnp.where(is_mask, 0.0, jnp.exp(log_score)).sum(-1)
    noise = jnp.expm1(sigma)
    ratio = 1 / noise
    entropy = positive - ratio * _pick(log_score, x0) + ratio * (jnp.log(ratio) - 1)
    return jnp.where(xt == mask_id, weight * noise * entropy, 0.0)
