"""The clipped interval of noise under which the training loss varies least (Block Diffusion, section 5.3).

Every candidate is scored on the same rows: the unbiased variance of the mean loss of a block over all blocks of a
global batch, averaged over batches of more than one block. Noise is drawn and weighed as in training; there is no
dropout.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bd3_jax import sharding
from bd3_jax.config import EPS
from bd3_jax.diffusion import likelihood
from bd3_jax.evaluation.perplexity import Batch
from bd3_jax.language_model import LanguageModel
from bd3_jax.models.network import Params

Interval = tuple[float, float]

STEP = 0.05
"""Between the lower bounds of the candidates of one width."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The variance of every candidate, and what it cost.

    Attributes:
      intervals: the candidates.
      variances: of the mean loss of a block, in squared nats per token, one for each.
      blocks: how many blocks each was scored on.
      seconds: the whole search took.
    """

    intervals: tuple[Interval, ...]
    variances: tuple[float, ...]
    blocks: int
    seconds: float

    @property
    def best(self) -> Interval | None:
        """The first of those with the smallest variance; None where none is finite."""
        finite = np.isfinite(self.variances)
        return self.intervals[int(np.argmin(np.where(finite, self.variances, np.inf)))] if finite.any() else None

    def record(self) -> dict[str, Any]:
        """Flat names for a line of `metrics.jsonl`."""
        table = [[*interval, variance] for interval, variance in zip(self.intervals, self.variances, strict=True)]
        low, high = self.best or (None, None)
        best, full = self.variances[self.intervals.index(self.best)] if self.best else None, self.variances[0]
        return {
            "search/low": low, "search/high": high, "search/variance": best, "search/variance_unclipped": full,
            "search/candidates": table, "search/blocks": self.blocks, "search/seconds": self.seconds,
        }  # fmt: skip

    def table(self) -> str:
        """For the terminal: a line for each candidate."""
        lines = ["   low   high  variance of a block's mean loss"]
        for interval, variance in zip(self.intervals, self.variances, strict=True):
            mark = "  <- chosen" if interval == self.best else ""
            lines.append(f"{interval[0]:6.3f} {interval[1]:6.3f}  {variance:.6g}{mark}")
        return "\n".join(lines)


def candidates(block_size: int, widths: Iterable[float]) -> tuple[Interval, ...]:
    """The unclipped interval, then for every width w those that begin at 0 (in fact 1e-3), 0.05, ..., 1 - w.

    One token a block has two: unclipped, and everything masked.
    """
    if block_size == 1:
        return (EPS, 1.0), (1.0, 1.0)
    clipped = [
        (max(round(STEP * n, 9), EPS), round(STEP * n + width, 9))
        for width in widths
        for n in range(int((1 - width) / STEP + 1e-6) + 1)
    ]
    return (EPS, 1.0), *clipped


def search_interval(
    lm: LanguageModel,
    params: Params,
    intervals: tuple[Interval, ...],
    batches: Iterable[Batch],
    key: PRNGKeyArray,
    split: jax.sharding.NamedSharding | None = None,
) -> SearchResult:
    """Scores the candidates.

    Args:
      lm: the model that `params` belong to; SUBS under the loglinear schedule.
      params: the averaged weights, on one device or sharded over a mesh.
      intervals: see `candidates`.
      batches: rows, and which of them are no mere padding.
      key: candidate j draws times and masks for batch i from fold_in(fold_in(key, i), j).
      split: sharding of the batches `[b, L]`, where params are spread over a mesh.
    """
    began, score, scores, blocks = time.perf_counter(), _compiled(lm, split), [], 0
    for index, (rows, is_real) in enumerate(batches):
        count = int(is_real.sum()) * (lm.length // lm.block_size)
        if count < 2:
            continue
        of_batch = jax.random.fold_in(key, index)
        placed = (jnp.asarray(rows), jnp.asarray(is_real))
        if split is not None:
            placed = (sharding.place(rows, split), sharding.place(is_real, split))
        scores.append(
            [
                score(params, *placed, jax.random.fold_in(of_batch, number), jnp.float32(low), jnp.float32(high))
                for number, (low, high) in enumerate(intervals)
            ]
        )
        jax.block_until_ready(scores[-1])  # so that a batch more is a batch done
        blocks += count
    nothing = [[np.nan] * len(intervals)]
    variances = np.asarray(jax.device_get(scores or nothing), np.float64).mean(axis=0)
    return SearchResult(intervals, tuple(variances.tolist()), blocks, time.perf_counter() - began)


@functools.lru_cache(maxsize=16)
def _compiled(lm: LanguageModel, split: jax.sharding.NamedSharding | None) -> Callable[..., Float[Array, ""]]:
    """`block_variance` of a model for any interval; one program for all candidates."""

    def variance(*args: Any) -> Float[Array, ""]:
        with sharding.by_rows(split):
            return block_variance(lm, *args)

    return jax.jit(variance)


def block_variance(
    lm: LanguageModel,
    params: Params,
    x0: Int[Array, "b L"],
    is_real: Bool[Array, "b"],
    key: PRNGKeyArray,
    low: Float[Array, ""],
    high: Float[Array, ""],
) -> Float[Array, ""]:
    """Unbiased variance of the mean loss of a block, t ~ U[low, high], over all blocks of the rows that are real."""
    draw = likelihood.draw_training(key, x0, lm.block_size, lm.noise, low, high, lm.ids.mask)
    means = lm.token_losses(params, x0, draw)[1].reshape(x0.shape[0], -1, lm.block_size).mean(-1)
    weight = jnp.broadcast_to(is_real[:, None], means.shape)
    count = weight.sum()
    mean = jnp.where(weight, means, 0).sum() / count
    return jnp.where(weight, (means - mean) ** 2, 0).sum() / (count - 1)
