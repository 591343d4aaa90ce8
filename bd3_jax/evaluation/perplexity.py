"""Likelihood of held-out rows, of parameters and of checkpoints; the figures: result.py."""

import dataclasses
import functools
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
from bd3_jax.errors import UserError
from bd3_jax.evaluation.result import POSITIONS, Result, describe
from bd3_jax.folders import require_writable
from bd3_jax.language_model import LanguageModel
from bd3_jax.metrics import EVALUATIONS, append_metrics
from bd3_jax.models.network import Params
from bd3_jax.sharding import batch_sharding, batch_shards, by_rows, make_mesh, param_shardings, place

Batch = tuple[Int[np.ndarray, "b L"], Bool[np.ndarray, "b"]]  # rows, and which are no mere padding


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
