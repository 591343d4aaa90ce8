"""Noised inputs with their weights, and the loss per token of a network's hidden states.

An estimate of the NELBO goes: draw (`draw_training`, `draw_monte_carlo`, `draw_low_variance` or `draw_all_masked`),
run the network on `Draw.xt`, and weigh (`token_losses`). The loss is per token, in nats; callers sum it over tokens
and divide by how many were counted.

Where `free` positions are given, they alone are masked and weighed: the estimate is of -log p(free | the others), the
other tokens as they stand in x0. Without, all positions are free, but for position 0 where the noise ignores BOS.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.config import EPS, NoiseConfig, ScheduleName
from bd3_jax.diffusion import corruption, objectives, output_loss
from bd3_jax.diffusion.output_loss import Chunks, Output
from bd3_jax.diffusion.schedules import get_schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """A noised batch. `sigma` is the total noise of each block, `weight` >= 0 multiplies -log p at masked tokens.

    Where the weight is 0 a masked token stands for one that is not known and not asked for.
    """

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
    free: Bool[Array, "b L"] | None = None,
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
    return _draw(x0, mask, weight, schedule.total_noise(t), block_size, mask_id, noise.ignore_bos, free)


def masked_share(noise: NoiseConfig) -> float:
    """Expected share of masked tokens in `draw_training` with the interval of the settings."""
    t = jnp.linspace(noise.low, noise.high, 1001)
    return float(get_schedule(noise.schedule).move_chance((t[1:] + t[:-1]) / 2).mean())


def draw_monte_carlo(
    key: PRNGKeyArray,
    x0: Int[Array, "b L"],
    block_size: int,
    noise: NoiseConfig,
    mask_id: int,
    free: Bool[Array, "b L"] | None = None,
) -> Draw:
    """t ~ U[1e-3, 1], loglinear whatever the training schedule was: the published test perplexities."""
    name: ScheduleName = "scaled_loglinear" if noise.schedule == "scaled_loglinear" else "loglinear"
    plain = dataclasses.replace(noise, schedule=name, resample=False)
    return draw_training(key, x0, block_size, plain, EPS, 1.0, mask_id, free)


def draw_low_variance(
    key: PRNGKeyArray,
    x0: Int[Array, "b L"],
    block_size: int,
    noise: NoiseConfig,
    mask_id: int,
    free: Bool[Array, "b L"] | None = None,
) -> Draw:
    """Draws the number of masked tokens instead of the time.

    For the loglinear schedule E_t[(1/t) sum over masked] = sum over k = 1..B of (1/k) E[sum over a uniform subset of
    size k], so k ~ U{1..B} with weight B/k has the same mean up to the cut-off at 1e-3, and a smaller variance. k is
    stratified over the blocks of the batch. For models that are not conditioned on time.

    Of a block with m free positions, k ~ U{1..m} with weight m/k: of m independent tokens, each masked with chance t,
    the integral of (1/t) binom(m, k) t^k (1-t)^(m-k) over t is 1/k, whatever else the block holds.
    """
    key_k, key_subset = jax.random.split(key)
    unit = corruption.draw_times(key_k, x0.shape[0], x0.shape[1] // block_size, 0.0, 1.0)
    size = jnp.full(unit.shape, block_size) if free is None else free.reshape(*unit.shape, block_size).sum(-1)
    masked = 1 + jnp.minimum((unit * size).astype(jnp.int32), size - 1)  # 0 where nothing is free
    mask = corruption.draw_subset(key_subset, masked, block_size, free)
    weight = size / jnp.maximum(masked, 1)
    return _draw(x0, mask, weight, jnp.zeros_like(unit), block_size, mask_id, noise.ignore_bos, free)


def draw_all_masked(x0: Int[Array, "b L"], block_size: int, noise: NoiseConfig, mask_id: int) -> Draw:
    """Everything masked, t = 1: at B = 1 the loss is the exact autoregressive likelihood, not a bound."""
    ones = jnp.ones((x0.shape[0], x0.shape[1] // block_size))
    nothing = jnp.zeros_like(ones)  # sigma, for a network that is not conditioned on time
    return _draw(x0, jnp.ones(x0.shape, bool), ones, nothing, block_size, mask_id, noise.ignore_bos)


def draw_copies(
    draw: Callable[..., Draw],
    keys: PRNGKeyArray,
    x0: Int[Array, "b L"],
    block_size: int,
    noise: NoiseConfig,
    mask_id: int,
    free: Bool[Array, "b L"],
    copies: int,
) -> Draw:
    """`copies` draws of every row, which follow each other: each block's are stratified among themselves.

    Every row has its own key, and every block of it another: what is drawn of a row depends on nothing else, neither
    on the batch nor on how far the row is padded.
    """
    batch, num_blocks = x0.shape[0], x0.shape[1] // block_size
    keys = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(num_blocks)))(keys)

    def of_block(key: PRNGKeyArray, tokens: Int[Array, "B"], free: Bool[Array, "B"]) -> Draw:
        tile = lambda x: jnp.tile(x, (copies, 1))
        return draw(key, tile(tokens), block_size, noise, mask_id, tile(free))

    in_blocks = lambda x: x.reshape(batch, num_blocks, block_size)
    drawn = jax.vmap(jax.vmap(of_block))(keys, in_blocks(x0), in_blocks(free))
    # [b, N, copies, B or 1] -> [b copies, N B or N]
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(batch * copies, -1), drawn)


def _draw(
    x0: Array,
    mask: Array,
    weight: Float[Array, "b N"],
    sigma: Array,
    block_size: int,
    mask_id: int,
    ignore_bos: bool,
    free: Array | None = None,
) -> Draw:
    weight = jnp.repeat(weight, block_size, axis=1)
    if free is not None:
        mask, weight, ignore_bos = mask & free, jnp.where(free, weight, 0.0), False
    return Draw(corruption.corrupt(x0, mask, mask_id, ignore_bos), weight, sigma)


def token_losses(
    objective: str,
    hidden: Float[Array, "b L d"],
    output: Output,
    x0: Int[Array, "b L"],
    draw: Draw | None,
    mask_id: int,
    chunks: Chunks,
) -> tuple[Float[Array, ""], Float[Array, "b L"]]:
    """The summed loss of x0, through which gradients flow, and that of every token, nats.

    For AR (no draw) position 0, which nothing predicts, has 0.
    """
    if objective == "ar":
        targets = jnp.roll(x0, -1, axis=1)  # the last position has no target
        counted = jnp.broadcast_to(jnp.arange(x0.shape[1]) < x0.shape[1] - 1, x0.shape)
        loss = functools.partial(objectives.ar_loss, mask_id=mask_id)
        total, losses = output_loss.summed(loss, chunks, hidden, output, (targets,), counted)
        return total, jnp.roll(losses, 1, axis=1)
    if draw is None:
        raise ValueError(f"objective {objective} needs a draw")
    masked = (draw.xt == mask_id) & (draw.weight > 0)
    if objective == "sedd":
        sigma = jnp.repeat(draw.sigma, x0.shape[1] // draw.sigma.shape[1], axis=1)
        loss = functools.partial(objectives.sedd_loss, mask_id=mask_id)
        return output_loss.summed(loss, chunks, hidden, output, (x0, draw.xt, sigma, draw.weight), masked)
    loss = functools.partial(objectives.subs_loss, mask_id=mask_id)
    return output_loss.summed(loss, chunks, hidden, output, (x0, draw.xt, draw.weight), masked)
