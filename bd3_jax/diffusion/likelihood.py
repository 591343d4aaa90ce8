"""Noised inputs with their weights, and the loss per token of a network's hidden states.

An estimate of the NELBO goes: draw (`draw_training`, `draw_monte_carlo`, `draw_low_variance` or `draw_all_masked`),
run the network on `Draw.xt`, and weigh (`token_losses`). The loss is per token, in nats; callers sum it over tokens
and divide by how many were counted.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from bd3_jax.config import NoiseConfig, ScheduleName
from bd3_jax.diffusion import corruption, objectives
from bd3_jax.diffusion.schedules import EPS, get_schedule

MAX_LOGITS = 2**26
"""Logits that a device holds at once (256 MiB); beyond it they are computed in chunks of positions, and again in the
backward pass."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """A noised batch. `sigma` is the total noise of each block, `weight` >= 0 multiplies -log p at masked tokens."""

    xt: Int[Array, "b L"]
    weight: Float[Array, "b L"]
    sigma: Float[Array, "b N"]


def draw_training(
    key: PRNGKeyArray,
    x0: Int[Array, "b L"],
    block_size: int,
    noise: NoiseConfig,
    low: Float[Array, ""] | float,
    high: Float[Array, ""] | float,
    mask_id: int,
) -> Draw:
    """t ~ U[low, high] per block under the training schedule (Block Diffusion, section 5.3).

    The interval is an argument of its own, since it may have been searched for. Where low > 0.5 the weight is 1 in
    place of 1/t; that is for SUBS. SEDD's rate would become expm1(sigma), so `config` refuses it.
    """
    key_t, key_mask = jax.random.split(key)
    schedule = get_schedule(noise.schedule)
    t = corruption.draw_times(key_t, x0.shape[0], x0.shape[1] // block_size, low, high)
    if noise.resample:
        mask = corruption.draw_clipped_mask(key_mask, schedule.move_chance(t), block_size, low, high)
    else:
        mask = corruption.draw_mask(key_mask, schedule.move_chance(t), block_size)
    weight = jnp.where(jnp.asarray(low) > 0.5, 1.0, -schedule.loss_scale(t))
    return _draw(x0, mask, weight, schedule.total_noise(t), block_size, mask_id, noise.ignore_bos)


def draw_monte_carlo(
    key: PRNGKeyArray, x0: Int[Array, "b L"], block_size: int, noise: NoiseConfig, mask_id: int
) -> Draw:
    """t ~ U[1e-3, 1], loglinear whatever the training schedule was: the published test perplexities."""
    name: ScheduleName = "scaled_loglinear" if noise.schedule == "scaled_loglinear" else "loglinear"
    plain = dataclasses.replace(noise, schedule=name, resample=False)
    return draw_training(key, x0, block_size, plain, EPS, 1.0, mask_id)


def draw_low_variance(
    key: PRNGKeyArray, x0: Int[Array, "b L"], block_size: int, noise: NoiseConfig, mask_id: int
) -> Draw:
    """Draws the number of masked tokens instead of the time.

    For the loglinear schedule E_t[(1/t) sum over masked] = sum over k = 1..B of (1/k) E[sum over a uniform subset of
    size k], so k ~ U{1..B} with weight B/k has the same mean up to the cut-off at 1e-3, and a smaller variance. k is
    stratified over the blocks of the batch. For models that are not conditioned on time.
    """
    key_k, key_subset = jax.random.split(key)
    unit = corruption.draw_times(key_k, x0.shape[0], x0.shape[1] // block_size, 0.0, 1.0)
    masked = 1 + jnp.minimum((unit * block_size).astype(jnp.int32), block_size - 1)
    mask = corruption.draw_subset(key_subset, masked, block_size)
    return _draw(x0, mask, block_size / masked, jnp.zeros_like(unit), block_size, mask_id, noise.ignore_bos)


def draw_all_masked(x0: Int[Array, "b L"], block_size: int, noise: NoiseConfig, mask_id: int) -> Draw:
    """Everything masked, t = 1: at B = 1 the loss is the exact autoregressive likelihood, not a bound."""
    ones = jnp.ones((x0.shape[0], x0.shape[1] // block_size))
    sigma = get_schedule("loglinear").total_noise(ones)
    return _draw(x0, jnp.ones(x0.shape, bool), ones, sigma, block_size, mask_id, noise.ignore_bos)


def _draw(
    x0: Array, mask: Array, weight: Float[Array, "b N"], sigma: Array, block_size: int, mask_id: int, ignore_bos: bool
) -> Draw:
    xt = corruption.corrupt(x0, mask, mask_id, ignore_bos)
    return Draw(xt, jnp.repeat(weight, block_size, axis=1), sigma)


def token_losses(
    objective: str,
    hidden: Float[Array, "b L d"],
    unembed: Callable[[Array], Float[Array, "*n V"]],
    x0: Int[Array, "b L"],
    draw: Draw | None,
    mask_id: int,
    vocab_size: int,
    batch_shards: int = 1,
) -> Float[Array, "b L"]:
    """Loss of every token of x0, nats. For AR (no draw) position 0, which nothing predicts, has 0.

    `batch_shards`: into how many parts the batch is split over devices; it bounds memory and changes no number.
    """
    max_chunk = max(1, MAX_LOGITS // (-(-x0.shape[0] // batch_shards) * vocab_size))
    if objective == "ar":
        targets = jnp.roll(x0, -1, axis=1)  # the last has no target and is dropped below
        losses = _in_chunks(
            lambda h, target: objectives.ar_loss(unembed(h), target, mask_id), max_chunk, hidden, targets
        )
        return jnp.pad(losses[:, :-1], ((0, 0), (1, 0)))
    if draw is None:
        raise ValueError(f"objective {objective} needs a draw")
    if objective == "sedd":
        sigma = jnp.repeat(draw.sigma, x0.shape[1] // draw.sigma.shape[1], axis=1)
        return _in_chunks(
            lambda h, x0, xt, sigma, weight: objectives.sedd_loss(unembed(h), x0, xt, sigma, weight, mask_id),
            max_chunk, hidden, x0, draw.xt, sigma, draw.weight,
        )  # fmt: skip
    return _in_chunks(
        lambda h, x0, xt, weight: objectives.subs_loss(unembed(h), x0, xt, weight, mask_id),
        max_chunk, hidden, x0, draw.xt, draw.weight,
    )  # fmt: skip


def _in_chunks(loss: Callable[..., Float[Array, "b C"]], max_chunk: int, *args: Array) -> Float[Array, "b L"]:
    """loss(*args) along the length, at most `max_chunk` positions at a time, in chunks of one size.

    Chunks cut the length, not the batch: the batch stays split over devices.
    """
    batch, length = args[0].shape[:2]
    count = -(-length // max_chunk)
    if count == 1:
        return loss(*args)
    chunk = -(-length // count)
    surplus = count * chunk - length

    def split(x: Array) -> Array:
        # Padded with the last position and not with 0, where a loss may be infinite and its gradient NaN.
        x = jnp.pad(x, [(0, 0), (0, surplus)] + [(0, 0)] * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    losses = jax.lax.map(lambda chunk_args: jax.checkpoint(loss)(*chunk_args), tuple(split(x) for x in args))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, count * chunk)[:, :length]
