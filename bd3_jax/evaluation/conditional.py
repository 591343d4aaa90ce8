"""log p(continuation | context), or a bound of it, of texts of any length up to the training context; see `score`.

The mathematics is `LanguageModel.conditional`. Of a row, the context is given and clean, wherever in a block it ends;
the continuation is scored; what follows it is unknown and stays masked (AR does not see it). So a row may be padded:

| | a row of n tokens is padded to | what the padding changes |
| --- | --- | --- |
| AR, BD3-LM | the next of a few lengths | nothing: no token sees what follows it, or its block |
| MDLM, SEDD | L | they know rows of L tokens only; where nothing is known their samplers have the mask, too |
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from bd3_jax.config import EvalConfig
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params

SHORTEST = 32
"""Tokens: a length of so many or fewer is not halved once more."""


class Row(NamedTuple):
    """One continuation.

    given: tokens of the context, at least one.
    free: tokens of the continuation; both together up to L.
    noise: with the seed it determines what is drawn, so that rows of one `noise` can be compared.
    """

    given: Sequence[int]
    free: Sequence[int]
    noise: int

    @property
    def length(self) -> int:
        return len(self.given) + len(self.free)


class Score(NamedTuple):
    """Nats (a lower bound where the model has a NELBO only), and whether greedy decoding gives the continuation."""

    log_likelihood: float
    is_greedy: bool


def score(
    lm: LanguageModel, params: Params, rows: Sequence[Row], config: EvalConfig, draws: int, progress: bool = False
) -> list[Score]:
    """Scores every continuation.

    A row's score depends on its tokens, its `noise` and the seed, on nothing else that is scored with it.

    Args:
      lm: the model that `params` belong to.
      params: on one device.
      rows: see `Row`.
      config: estimator, seed, and how many rows go through the network at a time, each with all its draws.
      draws: see `LanguageModel.conditional`.
      progress: whether to show a bar.
    """
    scores = [Score(0.0, True)] * len(rows)  # as it is for nothing
    lengths = [padded_length(lm, row.length) for row in rows]
    wanted = sorted((index for index, row in enumerate(rows) if row.free), key=lambda index: -lengths[index])
    program, key = _program(lm, config.estimator, draws), jax.random.key(config.seed)
    with tqdm(total=len(wanted), desc="scoring", unit=" texts", disable=not progress) as bar:
        for length, group in itertools.groupby(wanted, lengths.__getitem__):
            indices = list(group)
            for first in range(0, len(indices), config.batch_size):
                batch = indices[first : first + config.batch_size]
                # All batches have one shape: the last row fills up the last.
                filled = [rows[index] for index in batch] + [rows[batch[-1]]] * (config.batch_size - len(batch))
                x0 = np.full((len(filled), length), lm.ids.mask, np.int32)
                free = np.zeros(x0.shape, bool)
                for tokens, place, row in zip(x0, free, filled, strict=True):
                    tokens[: row.length] = [*row.given, *row.free]
                    place[len(row.given) : row.length] = True
                noise = np.array([row.noise for row in filled], np.uint32)
                keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, noise)
                losses, greedy = jax.device_get(program(params, x0, free, keys))
                for index, loss, is_greedy in zip(batch, losses, greedy, strict=False):
                    scores[index] = Score(-float(loss), bool(is_greedy))
                bar.update(len(batch))
    return scores


def padded_length(lm: LanguageModel, length: int) -> int:
    """The shortest of L, L/2, L/4, ..., rounded up to whole blocks, that holds a row of `length`; see `SHORTEST`."""
    padded = lm.length
    while lm.block_size < lm.length and padded > SHORTEST:
        shorter = -(-(padded // 2) // lm.block_size) * lm.block_size
        if not length <= shorter < padded:
            break
        padded = shorter
    return padded


@functools.lru_cache(maxsize=16)
def _program(lm: LanguageModel, estimator: str, draws: int) -> jax.stages.Wrapped:
    return jax.jit(lambda params, x0, free, keys: lm.conditional(params, x0, free, keys, estimator, draws))
