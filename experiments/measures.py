"""What several experiments measure of a model, and how they compare models."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import small_models
from etils import epath
from matplotlib.axes import Axes
from recording import Recording
from tqdm import tqdm

from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config
from bd3_jax.configs import quickstart
from bd3_jax.data.pipeline import Dataset, open_dataset, train_batches
from bd3_jax.errors import UserError
from bd3_jax.evaluation.perplexity import batches, open_run, sequence_losses
from bd3_jax.evaluation.result import pool
from bd3_jax.language_model import LanguageModel
from bd3_jax.metrics import read_metrics

Curves = dict[str, dict[int, dict[str, list[float]]]]
"""Name -> seed -> what `loss_curve` returns."""
CURVE_STEPS = 200  # of which a curve of training has the mean loss
BATCH = quickstart.get_config().eval.batch_size  # of the small models


def losses_by_row(
    config: Config, workdir: epath.Path, dataset: Dataset, rows: np.ndarray, draws: int
) -> dict[str, Any]:
    """Losses of these rows, summed over their counted tokens, in nats: means over draws of the noise."""
    step, lm, params, split = open_run(config, workdir, dataset)
    tokens = dataset.read(rows.tolist())
    sums = [
        sequence_losses(
            lm,
            params,
            batches(tokens, config.eval.batch_size),
            dataclasses.replace(config.eval, seed=draw),
            split,
        ).sum(1)
        for draw in tqdm(range(1 if lm.is_exact else draws), "draws of the noise", leave=False)
    ]
    counted, means = int(lm.counted(lm.length).sum()), np.mean(sums, 0)
    return {
        "step": step,
        "nll": means.mean() / counted,
        "estimator": "exact" if lm.is_exact else config.eval.estimator,
        "counted": counted,  # tokens in a row
        "rows": np.round(means, 3).tolist(),
    }


def by_model(cells: list[dict[str, Any]], steps: int) -> dict[str, dict[int, np.ndarray]]:
    """Name -> seed -> NLL per token of every row, for the models that are there."""
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in small_models.MODELS}
    for cell in cells:
        asked, figures = cell["settings"], cell["figures"]
        if "model" in asked and asked["steps"] == steps:  # no curve
            found[asked["model"]][asked["seed"]] = np.array(figures["rows"]) / figures["counted"]
    return {name: seeds for name, seeds in found.items() if seeds}


def record_curve(recording: Recording, name: str, seed: int, steps: int, place: epath.Path) -> None:
    """The training loss of a model, where it is trained and still there."""
    if config := small_models.finished_config(place):
        recording.cell({"curve": name, "seed": seed, "steps": steps}, config.to_dict(), lambda: loss_curve(place))


def loss_curve(place: epath.Path) -> dict[str, list[float]]:
    """Mean training losses of `CURVE_STEPS` steps each, and their last steps."""
    lines = [line for line in read_metrics(place) if line.get("train/loss") is not None]
    logged = {line["step"]: line["train/loss"] for line in lines}
    parts: dict[int, list[float]] = {}
    for step, loss in sorted(logged.items()):
        parts.setdefault(math.ceil(step / CURVE_STEPS) * CURVE_STEPS, []).append(loss)
    return {"step": list(parts), "loss": [round(float(np.mean(losses)), 4) for losses in parts.values()]}


def curves(cells: list[dict[str, Any]], steps: int) -> Curves:
    """What `record_curve` has recorded."""
    found: Curves = {}
    for cell in cells:
        asked = cell["settings"]
        if "curve" in asked and asked["steps"] == steps:
            found.setdefault(asked["curve"], {})[asked["seed"]] = cell["figures"]
    return found


def plot_curves(axes: Axes, found: Curves) -> None:
    """A colour for each model, a dash for each seed."""
    seeds = sorted({seed for each in found.values() for seed in each})
    styles = dict(zip(seeds, itertools.cycle(("-", "--", ":", "-.")), strict=False))
    for place, (name, each) in enumerate(found.items()):
        axes.plot([], [], color=f"C{place}", label=name)
        for seed, curve in each.items():
            axes.plot(curve["step"], curve["loss"], styles[seed], color=f"C{place}")
    for seed, style in styles.items():
        axes.plot([], [], style, color="gray", label=f"seed {seed}")
    axes.set(xlabel="step", ylabel=f"training loss, mean of {CURVE_STEPS} steps (nats)")
    axes.legend(loc="upper right")


def compare(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean difference of NLLs per token `[seeds, rows]`, second less first, and its standard error.

    That of rows, in batches of neighbours, which have one stratified draw of the noise and texts that are alike; and
    that of seeds.
    """
    by_row, by_seed = (second - first).mean(0), (second - first).mean(1)
    mean, error = pool(by_row, np.ones(len(by_row), int), BATCH)
    if len(by_seed) > 1:
        error = math.hypot(error, by_seed.std(ddof=1) / math.sqrt(len(by_seed)))
    return mean, error


def pooled(seeds: dict[int, np.ndarray]) -> tuple[float, float, str]:
    """NLL per token over rows and seeds, its standard error, and the perplexity with its own as text."""
    values = np.stack(list(seeds.values()))
    nll, error = compare(np.zeros_like(values), values)
    return nll, error, f"{math.exp(nll):.1f} +- {math.exp(nll) * error:.1f}"


def unread_rows(config: Config, batches: int) -> Iterator[np.ndarray]:
    """Batches of rows that the steps of this config have not read."""
    dataset = open_dataset(config.data, config.model.length, "train")
    rows_read, batch_size = config.training.num_steps * config.training.batch_size, config.training.batch_size
    if rows_read + batches * batch_size > len(dataset):
        raise UserError(f"--steps and --batches take more than the {len(dataset)} rows of the training split")
    with contextlib.closing(train_batches(dataset, batch_size, config.seed, rows_read, 0, 1)) as unread:
        yield from itertools.islice(unread, batches)


def loss_variances(
    config: Config, workdir: epath.Path, intervals: dict[str, tuple[float, float]], batches: Iterable[np.ndarray]
) -> dict[str, dict[str, float]]:
    """The training loss of batches `[b, L]` of rows, by interval: the same rows and keys for all, and no dropout."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    tokenizer = open_dataset(config.data, config.model.length, "train").tokenizer
    model = LanguageModel.from_config(config, tokenizer.ids)
    params, _ = orbax.restore_params(config, workdir, "ema")
    losses_of = jax.jit(lambda *args: model.training_loss(*args)[1])
    means: dict[str, list[float]] = {name: [] for name in intervals}
    variances: dict[str, list[float]] = {name: [] for name in intervals}
    for index, rows in enumerate(tqdm(batches, "drawing losses", disable=None)):
        key = jax.random.fold_in(jax.random.key(1), index)
        for name, (low, high) in intervals.items():
            losses = np.asarray(losses_of(params, rows, key, jnp.float32(low), jnp.float32(high)), np.float64)
            variances[name].append(losses.reshape(-1, config.block_size).mean(1).var(ddof=1))
            means[name].append(losses.mean())
    return {
        name: {
            "mean": np.mean(means[name]),
            "block_variance": np.mean(variances[name]),
            "standard_error": np.std(variances[name], ddof=1) / math.sqrt(len(variances[name])),
            "batch_variance": np.var(means[name], ddof=1),
        }
        for name in intervals
    }
