"""Variance of the training loss under the interval that was searched for, beside that of U[0, 1] (tables 2 and 8).

python experiments/interval_variance.py --steps=600 > experiments/results/interval_variance.md

For B = 4, 8, 16 it trains a small BD3-LM on the quickstart's corpus, with a search at every validation; then it takes
the averaged weights and measures on rows of the training split that were not read before, for the chosen interval and
for U[0, 1], the variance of the mean loss of a block (as the search does, on other rows) and of the loss of a batch.
The same weights give the variance ratio of the two estimators of the NELBO at equal cost.
"""

import argparse
import sys
import time
from contextlib import redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bd3_jax import command_line
from bd3_jax.checkpoints import orbax
from bd3_jax.config import Config, from_config_dict
from bd3_jax.data.pipeline import Dataset, open_dataset, train_batches
from bd3_jax.data.prepare import prepare
from bd3_jax.evaluation.interval_search import block_variance
from bd3_jax.language_model import LanguageModel
from bd3_jax.training.loop import train

BLOCK_SIZES = (4, 8, 16)
ROWS, BATCHES = 16, 50


def settings(block_size: int, steps: int) -> Config:
    config = command_line.load(f"configs/quickstart.py:bd3lm,block_size={block_size}")
    config.noise.update(low=1e-3, high=1.0, resample=True)
    config.training.update(num_steps=steps, eval_every=steps // 2, checkpoint_every=steps, log_every=50)
    config.eval.update(num_batches=2)
    config.search.update(enabled=True, num_batches=8)
    return from_config_dict(config)


def measure(
    config: Config, dataset: Dataset, workdir: epath.Path
) -> tuple[dict[str, float], float, tuple[float, float]]:
    """Variances by name, the ratio of the estimators', and the chosen interval."""
    model = LanguageModel.from_config(config, dataset.tokenizer.ids)
    params, _ = orbax.restore_params(config, workdir, "ema")
    summary = orbax.summarize(workdir)
    chosen = (summary.low, summary.high)
    of_blocks = jax.jit(lambda *args: block_variance(model, *args))
    of_batch = jax.jit(lambda *args: model.training_loss(*args)[0])
    sequences = {
        name: jax.jit(lambda params, rows, key, name=name: model.eval_losses(params, rows, key, name).mean(-1))
        for name in ("monte_carlo", "low_variance")
    }
    unread = config.training.num_steps * config.training.batch_size
    batches = train_batches(dataset, ROWS, config.seed, unread, 0, 1)
    found: dict[str, list[float]] = {}
    estimates: dict[str, list[np.ndarray]] = {}
    everything = jnp.ones(ROWS, bool)
    for index in range(BATCHES):
        rows, key = next(batches), jax.random.fold_in(jax.random.key(1), index)
        for name, (low, high) in (("chosen", chosen), ("full", (1e-3, 1.0))):
            interval = (jnp.float32(low), jnp.float32(high))
            found.setdefault(f"{name}, blocks", []).append(float(of_blocks(params, rows, everything, key, *interval)))
            found.setdefault(f"{name}, batch", []).append(float(of_batch(params, rows, key, *interval)))
        if index < BATCHES // 5:  # twice on the same rows: their difference has the noise alone
            for name, estimate in sequences.items():
                pair = [np.asarray(estimate(params, rows, jax.random.fold_in(key, n)), np.float64) for n in range(2)]
                estimates.setdefault(name, []).append((pair[0] - pair[1]) ** 2 / 2)
    batches.close()
    values = {name: float(np.mean(each) if "blocks" in name else np.var(each, ddof=1)) for name, each in found.items()}
    ratio = float(np.mean(estimates["monte_carlo"]) / np.mean(estimates["low_variance"]))
    return values, ratio, chosen


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--workdir", default="runs/interval_variance")
    own = made.parse_args()
    print("# Variance of the training loss, chosen interval beside U[0, 1]\n")
    print(
        f"`experiments/interval_variance.py --steps={own.steps}`: the quickstart's model and corpus, {own.steps} steps;"
    )
    print(f"measured on {BATCHES} batches of {ROWS} rows, the batches' losses with dropout off as in that recipe.\n")
    print("| B | chosen | blocks: chosen | blocks: U[0, 1] | batch: chosen | batch: U[0, 1] | MC / low variance |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    began = time.perf_counter()
    for block_size in BLOCK_SIZES:
        config, workdir = settings(block_size, own.steps), epath.Path(own.workdir) / f"block-{block_size}"
        with redirect_stdout(sys.stderr):
            prepare(config.data, config.model.length)
            train(config, workdir)
        dataset = open_dataset(config.data, config.model.length, "train")
        values, ratio, (low, high) = measure(config, dataset, workdir)
        cells = [values[f"{name}, {of}"] for of in ("blocks", "batch") for name in ("chosen", "full")]
        numbers = " | ".join(f"{value:.4g}" for value in cells)
        print(f"| {block_size} | U[{low:g}, {high:g}] | {numbers} | {ratio:.2f} |", flush=True)
    print(f"\n{(time.perf_counter() - began) / 60:.0f} minutes on {jax.devices()[0].device_kind}, {jax.__version__}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
