"""Likelihood of held-out rows: nats per token, perplexity, and how sure the figures are."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tqdm import tqdm

from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config, Estimator, EvalConfig
from bd3_jax.data.pipeline import Dataset, count_batches, eval_batches, open_eval_data
from bd3_jax.data.streaming import Stream
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.diffusion.orders import ORDERS
from bd3_jax.errors import UserError
from bd3_jax.folders import require_writable
from bd3_jax.language_model import LanguageModel
from bd3_jax.metrics import EVALUATIONS, append_metrics
from bd3_jax.models.network import Params
from bd3_jax.sharding import batch_sharding, batch_shards, by_rows, make_mesh, param_shardings, place

Batch = tuple[Int[np.ndarray, "b L"], Bool[np.ndarray, "b"]]  # rows, and which are no mere padding

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


def estimates(lm: LanguageModel, config: EvalConfig) -> tuple[EvalConfig, ...]:
    """`config`, then the same with the other estimator of the NELBO, where it is wanted and there is another."""
    has_two = lm.objective in ("mdlm", "bd3lm") and not lm.is_exact and lm.noise.schedule != "scaled_loglinear"
    if not (config.both_estimators and has_two):
        return (config,)
    other: Estimator = "monte_carlo" if config.estimator == "low_variance" else "low_variance"
    return config, dataclasses.replace(config, estimator=other)


def evaluate_params(
    lm: LanguageModel,
    params: Params,
    dataset: Dataset | Stream,
    config: EvalConfig,
    num_batches: int = 0,
    sharding: jax.sharding.NamedSharding | None = None,
    progress: bool = False,
    watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Result:
    """Evaluates parameters on the first `num_batches` batches of a split (0: all of it), without dropout.

    Batch i draws its noise from fold_in(config.seed, i), so the figures repeat; rows that pad the last batch do not
    count.

    Args:
      lm: the model that `params` belong to.
      params: on one device or sharded over a mesh.
      dataset: an opened split.
      config: estimator, seed and batch size; and which weights `params` are.
      num_batches: 0 for the whole split.
      sharding: of the batches `[b, L]`, where params are spread over a mesh.
      progress: whether to show a bar.
      watch: gives the batches on, or raises to end the evaluation early.
    """
    losses = sequence_losses(
        lm,
        params,
        tqdm(
            watch(eval_batches(dataset, config.batch_size, num_batches)),
            "evaluating",
            count_batches(dataset, config.batch_size, num_batches),
            disable=not progress,
            leave=False,
        ),
        config,
        sharding,
    )
    return Result.of(
        lm,
        losses,
        lm.length,
        config,
        split=dataset.split,
        insert_special=dataset.settings.insert_special,
        insert_eos=dataset.settings.insert_eos,
    )


def sequence_losses(
    lm: LanguageModel,
    params: Params,
    batches: Iterable[Batch],
    config: EvalConfig,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Float[np.ndarray, "n P"]:
    """Summed losses of the counted tokens of every sequence at each (group of) position(s) in a block, nats, float64.

    Batch i draws its noise from fold_in(config.seed, i).
    """
    sum_losses = likelihood_program(lm, config.estimator, sharding)
    key = jax.random.key(config.seed)
    sums = []
    for index, (rows, is_real) in enumerate(batches):
        batch = jnp.asarray(rows) if sharding is None else place(rows, sharding)
        sums.append(np.asarray(sum_losses(params, batch, jax.random.fold_in(key, index)), np.float64)[is_real])
    return np.concatenate(sums)


def batches(rows: Int[np.ndarray, "n L"], batch_size: int) -> Iterator[Batch]:
    """All rows, in batches of one shape: the last row fills up the last batch."""
    size = min(batch_size, len(rows))
    for first in range(0, len(rows), size):
        indices = np.arange(first, first + size)
        yield rows[np.minimum(indices, len(rows) - 1)], indices < len(rows)


@functools.lru_cache(maxsize=16)
def likelihood_program(
    lm: LanguageModel, estimator: str, sharding: jax.sharding.NamedSharding | None
) -> jax.stages.Wrapped:
    """Summed losses of the counted tokens of every row, nats; on every host, where a mesh spans several."""
    groups = next(n for n in range(min(lm.block_size, POSITIONS), 0, -1) if lm.block_size % n == 0)

    def sum_losses(params: Params, rows: Int[Array, "b L"], key: PRNGKeyArray) -> Float[Array, "b P"]:
        with by_rows(sharding):
            losses = lm.eval_losses(params, rows, key, estimator)
        counted = jnp.where(lm.counted(rows.shape[1]), losses, 0)
        return counted.reshape(len(rows), -1, groups, lm.block_size // groups).sum((1, 3))

    if sharding is None:
        return jax.jit(sum_losses)
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(sum_losses, out_shardings=everywhere)


class OpenRun(NamedTuple):
    """A checkpoint on the devices, and how they split batches of `config.eval.batch_size` rows."""

    step: int
    lm: LanguageModel
    params: Params
    split: jax.sharding.NamedSharding


def open_run(config: Config, workdir: epath.Path, dataset: Dataset | Stream, step: int | None = None) -> OpenRun:
    """Opens the checkpoint of that step, the newest by default, for rows such as those of `dataset`.

    Raises:
      UserError: if there is none, or run, rows and settings do not fit each other.
    """
    mesh = make_mesh(config.mesh)
    split = batch_sharding(mesh, config.eval.batch_size, "config.eval.batch_size")
    check_tokenizer(dataset, workdir)
    lm = LanguageModel.from_config(config, dataset.tokenizer.ids, batch_shards(mesh))
    shardings = param_shardings(mesh, lm.network)
    params, found = orbax.restore_params(config, workdir, config.eval.weights, shardings, step)
    return OpenRun(found, lm, params, split)


def evaluate(config: Config, workdir: epath.Path, step: int | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint on the whole of `config.eval.split`, prints and records the figures.

    The record goes to WORKDIR/evaluations.jsonl.

    Args:
      config: settings of the run, and how to evaluate.
      workdir: the run.
      step: of the checkpoint; the newest by default.

    Returns:
      the record: `step`, `eval/nll`, `eval/perplexity` and the like.

    Raises:
      UserError: if there is no checkpoint or no such split, or they do not fit each other or the settings.
    """
    require_writable(workdir, "--workdir")
    dataset = open_eval_data(config, in_training=False)
    run, first = open_run(config, workdir, dataset, step), jax.process_index() == 0
    result, *others = (
        evaluate_params(run.lm, run.params, dataset, settings, sharding=run.split, progress=first)
        for settings in estimates(run.lm, config.eval)
    )
    record = {"step": run.step, **result.record()}
    for other in others:
        record |= other.beside()
    if first:
        print(f"{'checkpoint':<15} step {run.step} of {workdir}, {config.eval.weights} weights\n{result.table()}")
        for other in others:
            print(f"{'or':<15} {other.nll:.4f} +- {other.standard_error:.4f} ({describe(other.estimator)})")
        if result.nonfinite:
            print(f"warning: the loss of {result.nonfinite} of {result.sequences} rows is not finite", file=sys.stderr)
        if any(each.is_estimated for each in (result, *others)):
            print(f"{'noise':<15} seed {config.eval.seed}, batches of {config.eval.batch_size} rows")
        append_metrics(workdir, record, EVALUATIONS)
    return record


def check_tokenizer(dataset: Dataset | Stream, workdir: epath.Path) -> None:
    """Other tokens of the same number would give a figure all the same. Without its tokenizer, a run has its V."""
    folder = workdir / "tokenizer"
    if not (folder / TOKENIZER_FILE).exists():
        trained, given = orbax.summarize(workdir).vocab_size, dataset.tokenizer.ids.vocab_size
        if given != trained:
            raise UserError(f"{dataset.place} has V = {given} with the mask, but {workdir} was trained with {trained}")
    elif load_tokenizer(folder).fingerprint != dataset.tokenizer.fingerprint:
        raise UserError(
            f"{dataset.place} has another tokenizer than {workdir} was trained with; "
            f"prepare or stream it with --config.data.tokenizer={folder}"
        )
