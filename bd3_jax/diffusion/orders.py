"""Exact likelihoods of masked models that unmask in a deterministic order (DUEL, arXiv 2603.01367).

The NELBO averages over all orders in which a block may be unmasked. Where one rule fixes the order, a text is reached
in one way only, and its probability is the product of what the model says of each token just before it is unmasked.
The rule may look at what is there already and at the model, never at the text to come, so that all texts together have
probability 1. It costs B passes of the network: one token of every block each.

Where a part of a text is given, it stands there from the beginning, and the rule goes through the rest: what a sampler
draws that is given this part. All fillings together then have probability 1 again. Left to right, where the given part
comes first, this is the conditional probability of the whole text's; by confidence it is one of its own.

| order | unmasked next in a block |
| --- | --- |
| `left_to_right` | its first masked position |
| `most_confident` | the masked position whose likeliest token has the highest probability; of equals the first |
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bd3_jax.diffusion import objectives, output_loss
from bd3_jax.diffusion.likelihood import Draw
from bd3_jax.diffusion.output_loss import Chunks, Output

ORDERS = ("left_to_right", "most_confident")


class Unmasking(NamedTuple):
    """Of texts on their way.

    shown: what is unmasked by now, or is not to be.
    losses: -log p of every token given what was unmasked before it, nats; 0 where none is asked for.
    shortfalls: by how much it was less likely than the likeliest token there, nats; 0: it was the likeliest.
    """

    shown: Bool[Array, "b L"]
    losses: Float[Array, "b L"]
    shortfalls: Float[Array, "b L"]


Step = Callable[[Unmasking], Unmasking]


def token_losses(step: Step, free: Bool[Array, "b L"], block_size: int) -> Unmasking:
    """All free positions unmasked: -log p of these tokens given the others, which stand there from the beginning."""
    count = free.reshape(-1, block_size).sum(-1).max()
    return jax.lax.fori_loop(0, count, lambda _, state: step(state), _begin(free))


def is_greedy(step: Step, free: Bool[Array, "b L"]) -> Bool[Array, "b"]:
    """Whether a text is what comes of always taking the likeliest token; it ends as soon as that is known of all."""
    so_far = lambda state: (state.shortfalls == 0).all(1)
    unknown = lambda state: (~state.shown & so_far(state)[:, None]).any()
    return so_far(jax.lax.while_loop(unknown, step, _begin(free)))


def _begin(free: Bool[Array, "b L"]) -> Unmasking:
    return Unmasking(~free, jnp.zeros(free.shape), jnp.zeros(free.shape))


def unmasking(
    order: str,
    hidden_of: Callable[[Draw], Float[Array, "b L d"]],
    output: Output,
    x0: Int[Array, "b L"],
    block_size: int,
    mask_id: int,
    chunks: Chunks,
) -> Step:
    """The step that unmasks the next token of every block; earlier blocks are clean.

    Args:
      order: see above.
      hidden_of: the network's pass over a noised batch; it may not be conditioned on time.
      output: the output layer.
      x0: the texts; where the mask itself stands, it stays.
      block_size: B.
      mask_id: of the mask.
      chunks: of positions whose logits are there at once.
    """
    ones, sigma = jnp.ones(x0.shape), jnp.zeros((x0.shape[0], x0.shape[1] // block_size))
    negative_log, shortfall, doubt = (
        functools.partial(loss, mask_id=mask_id)
        for loss in (objectives.ar_loss, objectives.shortfall, objectives.doubt)
    )

    def step(state: Unmasking) -> Unmasking:
        shown, losses, shortfalls = state
        hidden = hidden_of(Draw(jnp.where(shown, x0, mask_id), ones, sigma))
        if order == "left_to_right":
            rank = jnp.broadcast_to(jnp.arange(x0.shape[1]), x0.shape).astype(jnp.float32)
        else:
            _, rank = output_loss.summed(doubt, chunks, hidden, output, (), ~shown)
        chosen = _first_of_blocks(jnp.where(shown, jnp.inf, rank), block_size) & ~shown
        _, new = output_loss.summed(negative_log, chunks, hidden, output, (x0,), chosen)
        _, short = output_loss.summed(shortfall, chunks, hidden, output, (x0,), chosen)
        return Unmasking(shown | chosen, losses + new, shortfalls + short)

    return step


def _first_of_blocks(rank: Float[Array, "b L"], block_size: int) -> Bool[Array, "b L"]:
    """Where each block has its lowest value for the first time."""
    blocks = rank.reshape(rank.shape[0], -1, block_size)
    return (jnp.arange(block_size) == blocks.argmin(-1)[..., None]).reshape(rank.shape)
