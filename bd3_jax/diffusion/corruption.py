"""The forward process: one time per block, then masks (Block Diffusion, sections 3 and 5; MDLM, section 3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax.config import lies_within


def draw_times(
    key: PRNGKeyArray, batch: int, num_blocks: int, low: Float[Array, ""] | float, high: Float[Array, ""] | float
) -> Float[Array, "b N"]:
    """One t ~ U[low, high] per block, stratified over all b * N blocks.

    Stratum i is [i, i+1) / (b N). The strata are dealt out at random: in a fixed order early blocks would always get
    little noise, and the estimate of the likelihood would be biased.
    """
    key_strata, key_within = jax.random.split(key)
    count = batch * num_blocks
    strata = jax.random.permutation(key_strata, count)
    unit = (strata + jax.random.uniform(key_within, (count,))) / count
    return (low + unit * (high - low)).reshape(batch, num_blocks)


def draw_mask(key: PRNGKeyArray, move_chance: Float[Array, "b N"], block_size: int) -> Bool[Array, "b L"]:
    """Masks each token of a block with the block's probability, independently."""
    chance = jnp.repeat(move_chance, block_size, axis=1)
    return jax.random.uniform(key, chance.shape) < chance


def draw_clipped_mask(
    key: PRNGKeyArray,
    move_chance: Float[Array, "b N"],
    block_size: int,
    low: Float[Array, ""] | float,
    high: Float[Array, ""] | float,
) -> Bool[Array, "b L"]:
    """`draw_mask` conditioned on every block's masked fraction lying in [low, high].

    The bounds are inclusive; the lower is waived at low = 1e-3 and the upper at high = 1. Drawing the number of masked
    tokens from Binomial(B, p) truncated to that range, and then a uniform subset of that size, has the distribution of
    redrawing until the fraction fits, without the loop. The range must hold k/B for some k.
    """
    key_count, key_subset = jax.random.split(key)
    chance = move_chance[..., None]
    count = jnp.arange(block_size + 1)
    of = math.lgamma(block_size + 1)
    choose = [of - math.lgamma(k + 1) - math.lgamma(block_size - k + 1) for k in range(block_size + 1)]
    log_choose = np.array(choose, np.float32)
    log_pmf = log_choose + _xlogy(count, chance) + _xlogy(block_size - count, 1 - chance)
    fits = lies_within(count / block_size, low, high)
    masked = jax.random.categorical(key_count, jnp.where(fits, log_pmf, -jnp.inf), mode="high")
    return draw_subset(key_subset, masked, block_size)


def _xlogy(x: Array, y: Array) -> Array:
    """x log y, with 0 log 0 = 0, so that a chance of 1 masks everything."""
    return jnp.where(x == 0, 0.0, x * jnp.log(jnp.maximum(y, 0)))


def draw_subset(
    key: PRNGKeyArray, size: Int[Array, "b N"], block_size: int, free: Bool[Array, "b L"] | None = None
) -> Bool[Array, "b L"]:
    """A uniform subset of `size` positions of every block; of its `free` positions, where these are given."""
    shape = (*size.shape, block_size)
    rank = jax.random.uniform(key, shape)
    if free is not None:
        rank = jnp.where(free.reshape(shape), rank, 1.0)  # after all others
    order = rank.argsort(axis=-1)
    return (order.argsort(axis=-1) < size[..., None]).reshape(size.shape[0], -1)


def corrupt(x0: Int[Array, "b L"], mask: Bool[Array, "b L"], mask_id: int, ignore_bos: bool) -> Int[Array, "b L"]:
    """x_t: the mask id where `mask` holds, x0 elsewhere. `ignore_bos` keeps position 0 clean."""
    if ignore_bos:
        mask = mask.at[:, 0].set(False)
    return jnp.where(mask, mask_id, x0)
