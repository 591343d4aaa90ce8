"""Exact likelihoods of masked models that unmask in a deterministic order (DUEL, arXiv 2603.01367).

The NELBO averages over all orders in which a block may be unmasked. Where one rule fixes the order, a text is reached
in one way only, and its probability is the product of what the model says of each token just before it is unmasked.
The rule may look at what is there already and at the model, never at the text to come, so that all texts together have
probability 1. It costs B passes of the network: one token of every block each.

| order | unmasked next in a block |
| --- | --- |
| `left_to_right` | its first masked position |
| `most_confident` | the masked position whose likeliest token has the highest probability; of equals the first |
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bd3_jax.diffusion import objectives, output_loss
from bd3_jax.diffusion.likelihood import Draw
from bd3_jax.diffusion.output_loss import Chunks, Output

ORDERS = ("left_to_right", "most_confident")


def token_losses(
    order: str,
    hidden_of: Callable[[Draw], Float[Array, "b L d"]],
    output: Output,
    x0: Int[Array, "b L"],
    block_size: int,
    mask_id: int,
    ignore_bos: bool,
    chunks: Chunks,
) -> Float[Array, "b L"]:
    """-log p of every token given what is unmasked before it, nats; earlier blocks are clean.

    Args:
      order: see above.
      hidden_of: the network's pass over a noised batch; it may not be conditioned on time.
      output: the output layer.
      x0: the texts.
      block_size: B.
      mask_id: of the mask.
      ignore_bos: position 0 is given, and has loss 0.
      chunks: of positions whose logits are there at once.
    """
    ones, sigma = jnp.ones(x0.shape), jnp.zeros((x0.shape[0], x0.shape[1] // block_size))
    negative_log = functools.partial(objectives.ar_loss, mask_id=mask_id)
    doubt = functools.partial(objectives.doubt, mask_id=mask_id)

    def unmask(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        shown, losses = carry
        hidden = hidden_of(Draw(jnp.where(shown, x0, mask_id), ones, sigma))
        if order == "left_to_right":
            rank = jnp.broadcast_to(jnp.arange(x0.shape[1]), x0.shape).astype(jnp.float32)
        else:
            _, rank = output_loss.summed(doubt, chunks, hidden, output, (), ~shown)
        chosen = _first_of_blocks(jnp.where(shown, jnp.inf, rank), block_size) & ~shown
        _, new = output_loss.summed(negative_log, chunks, hidden, output, (x0,), chosen)
        return shown | chosen, losses + new

    given = jnp.zeros(x0.shape, bool).at[:, 0].set(ignore_bos)
    return jax.lax.fori_loop(0, block_size, unmask, (given, jnp.zeros(x0.shape)))[1]


def _first_of_blocks(rank: Float[Array, "b L"], block_size: int) -> Bool[Array, "b L"]:
    """Where each block has its lowest value for the first time."""
    blocks = rank.reshape(rank.shape[0], -1, block_size)
    return (jnp.arange(block_size) == blocks.argmin(-1)[..., None]).reshape(rank.shape)
