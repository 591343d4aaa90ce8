"""Likelihood of held-out rows: nats per token, perplexity, and how sure the figures are."""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from tqdm import tqdm

from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config, EvalConfig
from bd3_jax.data.pipeline import Dataset, count_batches, eval_batches, open_data
from bd3_jax.data.streaming import Stream
from bd3_jax.data.tokenizers import FILE_NAME as TOKENIZER_FILE
from bd3_jax.data.tokenizers import load_tokenizer
from bd3_jax.errors import UserError
from bd3_jax.folders import require_writable
from bd3_jax.language_model import LanguageModel
from bd3_jax.metrics import append_metrics
from bd3_jax.models.transformer import Params
from bd3_jax.sharding import batch_sharding, batch_shards, make_mesh, param_shardings


@dataclasses.dataclass(frozen=True)
class Result:
    """A likelihood with what is needed to obtain it again.

    Attributes:
      nll: nats per counted token, pooled: all losses over all counted tokens.
      standard_error: of `nll`, from the spread over sequences; it holds the noise of the estimator too.
      tokens: how many were counted.
      sequences: rows of L tokens they came from.
      nonfinite: how many of them have a loss that is not finite; the figures are not either, if any has.
      estimator: 'exact' for AR and for BD3-LM at B = 1; else the estimator of the NELBO, an upper bound of the NLL.
      split: of the prepared data.
      insert_special: whether rows begin with BOS and end with EOS.
      insert_eos: whether EOS follows every document.
      first_counted: whether the loss of position 0 counts.
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

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        losses: Float[np.ndarray, "n"],
        length: int,
        estimator: str,
        split: str,
        insert_special: bool,
        insert_eos: bool,
    ) -> "Result":
        """Pools the summed losses of n sequences of `length` tokens."""
        counted = lm.counted(length)
        counts = np.full(losses.shape, int(counted.sum()))
        nll, error = pool(losses, counts)
        return cls(
            nll=nll,
            standard_error=error,
            tokens=int(counts.sum()),
            sequences=len(losses),
            nonfinite=int((~np.isfinite(losses)).sum()),
            estimator="exact" if lm.is_exact else estimator,
            split=split,
            insert_special=insert_special,
            insert_eos=insert_eos,
            first_counted=bool(counted[0]),
        )

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
        return {f"eval/{name}": value for name, value in values.items()}

    def table(self) -> str:
        """For the terminal: a line for each figure."""
        bound = "exact" if self.estimator == "exact" else f"upper bound, {self.estimator} estimate"
        rows = {
            "NLL": f"{self.nll:.4f} +- {self.standard_error:.4f} nats per token ({bound})",
            "bits per token": f"{self.bits_per_token:.4f}",
            "perplexity": f"{self.perplexity:.3f} +- {self.perplexity_standard_error:.3f}",
            "tokens counted": f"{self.tokens:,} in {self.sequences:,} rows of the {self.split} split, "
            f"position 0 {'included' if self.first_counted else 'left out'}",
            "special tokens": f"BOS and EOS around rows: {_yes(self.insert_special)}; "
            f"EOS after documents: {_yes(self.insert_eos)}",
        }
        return "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def pool(losses: Float[np.ndarray, "n"], counts: Int[np.ndarray, "n"]) -> tuple[float, float]:
    """Ratio estimate sum(losses) / sum(counts) over n sequences, and its standard error (nan for one sequence)."""
    n, total = len(losses), counts.sum()
    mean = losses.sum() / total
    with np.errstate(invalid="ignore"):  # infinite losses
        residuals = losses - mean * counts
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / total if n > 1 else math.nan
    return float(mean), float(error)


def evaluate_params(
    lm: LanguageModel,
    params: Params,
    dataset: Dataset | Stream,
    config: EvalConfig,
    num_batches: int = 0,
    sharding: jax.sharding.NamedSharding | None = None,
    progress: bool = False,
) -> Result:
    """Evaluates parameters on the first `num_batches` batches of a split (0: all of it), without dropout.

    Batch i draws its noise from fold_in(config.seed, i), so the figures repeat; rows that pad the last batch do not
    count.

    Args:
      lm: the model that `params` belong to.
      params: on one device or sharded over a mesh.
      dataset: an opened split.
      config: estimator, seed and batch size.
      num_batches: 0 for the whole split.
      sharding: of the batches `[b, L]`, where params are spread over a mesh.
      progress: whether to show a bar.
    """
    losses = sequence_losses(
        lm,
        params,
        tqdm(
            eval_batches(dataset, config.batch_size, num_batches),
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
        config.estimator,
        split=dataset.split,
        insert_special=dataset.settings.insert_special,
        insert_eos=dataset.settings.insert_eos,
    )


def sequence_losses(
    lm: LanguageModel,
    params: Params,
    batches: Iterable[tuple[Int[np.ndarray, "b L"], Bool[np.ndarray, "b"]]],
    config: EvalConfig,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Float[np.ndarray, "n"]:
    """Summed losses of the counted tokens of every sequence, nats, float64.

    Batch i draws its noise from fold_in(config.seed, i). `batches` gives rows, and which of them are no mere padding.
    """
    sum_losses = likelihood_program(lm, config.estimator, sharding)
    key = jax.random.key(config.seed)
    sums = []
    for index, (rows, is_real) in enumerate(batches):
        batch = jnp.asarray(rows) if sharding is None else jax.device_put(rows, sharding)
        sums.append(np.asarray(sum_losses(params, batch, jax.random.fold_in(key, index)), np.float64)[is_real])
    return np.concatenate(sums)


@functools.cache
def likelihood_program(
    lm: LanguageModel, estimator: str, sharding: jax.sharding.NamedSharding | None
) -> jax.stages.Wrapped:
    """Summed losses of the counted tokens of every row, nats; on every host, where a mesh spans several."""

    def sum_losses(params: Params, rows: Int[Array, "b L"], key: PRNGKeyArray) -> Float[Array, "b"]:
        losses = lm.eval_losses(params, rows, key, estimator)
        return jnp.where(lm.counted(rows.shape[1]), losses, 0).sum(-1)

    if sharding is None:
        return jax.jit(sum_losses)
    everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(sum_losses, out_shardings=everywhere)


def evaluate(config: Config, workdir: epath.Path) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run on the whole of `config.eval.split`, prints and records the figures.

    Returns:
      the record that was appended to `workdir/metrics.jsonl`: `step`, `eval/nll`, `eval/perplexity` and the like.

    Raises:
      UserError: if there is no checkpoint or no such split, or they do not fit each other or the settings.
    """
    require_writable(workdir, "--workdir")
    mesh = make_mesh(config.mesh)
    split_rows = batch_sharding(mesh, config.eval.batch_size, "config.eval.batch_size")
    dataset = open_data(config.data, config.model.length, config.eval.split)
    _check_tokenizer(dataset, workdir)
    lm = LanguageModel.from_config(config, dataset.tokenizer.ids, batch_shards(mesh))
    shardings = param_shardings(mesh, lm.network)
    params, step = orbax.restore_params(config, workdir, config.eval.weights, shardings)

    first = jax.process_index() == 0
    result = evaluate_params(lm, params, dataset, config.eval, sharding=split_rows, progress=first)
    record = {"step": step, **result.record()}
    if first:
        print(f"{'checkpoint':<15} step {step} of {workdir}, {config.eval.weights} weights\n{result.table()}")
        if result.nonfinite:
            print(f"warning: the loss of {result.nonfinite} of {result.sequences} rows is not finite", file=sys.stderr)
        if not lm.is_exact:
            print(f"{'noise':<15} seed {config.eval.seed}, batches of {config.eval.batch_size} rows")
        append_metrics(workdir, record)
    return record


def _check_tokenizer(dataset: Dataset | Stream, workdir: epath.Path) -> None:
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
