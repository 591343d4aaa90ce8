"""A likelihood as figures: nats per token, perplexity, how sure they are, and of what."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bd3_jax.config import EvalConfig
from bd3_jax.diffusion.orders import ORDERS
from bd3_jax.language_model import LanguageModel

FEW = 10
"""Independent parts of a split, from which on its standard error is that of such parts."""

POSITIONS = 32
"""At most so many figures are kept of the positions in a block."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A likelihood with what is needed to obtain it again.

    Attributes:
      nll: nats per counted token, pooled: all losses over all counted tokens.
      standard_error: of `nll`, from the spread over sequences; it holds the noise of the estimator too.
      tokens: how many were counted.
      sequences: rows of L tokens they came from.
      nonfinite: how many of them have a loss that is not finite; the figures are not either, if any has.
      estimator: 'exact' for AR and for BD3-LM at B = 1; else the estimator of the NELBO, an upper bound of the NLL, or
        the order of unmasking for which the NLL is exact.
      split: of the prepared data.
      insert_special: whether rows begin with BOS and end with EOS.
      insert_eos: whether EOS follows every document.
      first_counted: whether the loss of position 0 counts.
      weights: ema or raw.
      seed: of the noise, where it is estimated.
      batch_size: rows that drew their noise together.
      by_position: nats per counted token at each position in a block, or at so many adjacent ones together that there
        are at most `POSITIONS`; empty where a block has one token.
    """

    nll: float
    standard_error: float
    tokens: int
    sequences: int
    nonfinite: int
    estimator: str
    split: str
    insert_special: bool
    insert_eos: bool
    first_counted: bool
    weights: str
    seed: int
    batch_size: int
    by_position: tuple[float, ...] = ()  # nan where nothing is counted

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        losses: Float[np.ndarray, "n P"],
        length: int,
        config: EvalConfig,
        split: str,
        insert_special: bool,
        insert_eos: bool,
    ) -> "Result":
        """Pools the losses of n sequences of `length` tokens, obtained with `config`; see `sequence_losses`."""
        counted = np.asarray(lm.counted(length))
        counts = np.full(len(losses), int(counted.sum()))
        estimator = "exact" if lm.is_exact else config.estimator
        nll, error = pool(losses.sum(1), counts, config.batch_size if _draws(estimator) else 1)
        groups = losses.shape[1]
        at_positions = counted.reshape(-1, groups, lm.block_size // groups).sum((0, 2)) * len(losses)
        means = np.where(at_positions, losses.sum(0) / np.maximum(at_positions, 1), math.nan)
        return cls(
            nll=nll,
            standard_error=error,
            tokens=int(counts.sum()),
            sequences=len(losses),
            nonfinite=int((~np.isfinite(losses)).any(1).sum()),
            estimator=estimator,
            split=split,
            insert_special=insert_special,
            insert_eos=insert_eos,
            first_counted=bool(counted[0]),
            weights=config.weights,
            seed=config.seed,
            batch_size=config.batch_size,
            by_position=tuple(means.tolist()) if groups > 1 else (),
        )

    @property
    def is_estimated(self) -> bool:
        """Whether noise is drawn for it."""
        return _draws(self.estimator)

    @property
    def bits_per_token(self) -> float:
        return self.nll / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where no float holds it."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll))

    @property
    def perplexity_standard_error(self) -> float:
        """By the delta method: perplexity * standard_error."""
        return self.perplexity * self.standard_error

    def record(self) -> dict[str, Any]:
        """Flat names for a line of `metrics.jsonl`."""
        derived = ("bits_per_token", "perplexity", "perplexity_standard_error")
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        values["nll_by_position"] = [nll if math.isfinite(nll) else None for nll in values.pop("by_position")]
        return {f"eval/{name}": value for name, value in values.items()}

    def beside(self) -> dict[str, Any]:
        """The same for a second estimate of what another result says, under names of its own."""
        names = ("nll", "standard_error", "perplexity", "perplexity_standard_error")
        return {f"eval/{self.estimator}/{name}": getattr(self, name) for name in names}

    def table(self) -> str:
        """For the terminal: a line for each figure."""
        rows = {
            "NLL": f"{self.nll:.4f} +- {self.standard_error:.4f} nats per token ({describe(self.estimator)})",
            "bits per token": f"{self.bits_per_token:.4f}",
            "perplexity": f"{self.perplexity:.3f} +- {self.perplexity_standard_error:.3f}",
            "tokens counted": f"{self.tokens:,} in {self.sequences:,} rows of the {self.split} split, "
            f"position 0 {'included' if self.first_counted else 'left out'}",
            "special tokens": f"BOS and EOS around rows: {_yes(self.insert_special)}; "
            f"EOS after documents: {_yes(self.insert_eos)}",
        }
        return "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def describe(estimator: str) -> str:
    """What a NLL is, by `Result.estimator`."""
    if estimator == "exact":
        return estimator
    return f"exact, unmasking {estimator}" if estimator in ORDERS else f"upper bound, {estimator} estimate"


def _draws(estimator: str) -> bool:
    """Whether noise is drawn for it; for `Result.estimator`."""
    return estimator != "exact" and estimator not in ORDERS


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def pool(losses: Float[np.ndarray, "n"], counts: Int[np.ndarray, "n"], together: int = 1) -> tuple[float, float]:
    """Ratio estimate sum(losses) / sum(counts) over n sequences, and its standard error (nan for one sequence).

    Of each `together` sequences the noise is one stratified draw, so that their errors cancel in part: their sums are
    what varies independently. Of fewer than `FEW` such sums one could not tell; there sequences are taken all the same,
    whose error is too large then.
    """
    if len(losses) >= FEW * together:
        begins = np.arange(0, len(losses), together)
        losses, counts = np.add.reduceat(losses, begins), np.add.reduceat(counts, begins)
    n, total = len(losses), counts.sum()
    mean = losses.sum() / total
    with np.errstate(invalid="ignore"):  # infinite losses
        residuals = losses - mean * counts
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / total if n > 1 else math.nan
    return float(mean), float(error)
