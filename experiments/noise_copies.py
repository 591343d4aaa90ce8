"""Does a clean half that several noised copies share pay? Variance of the gradient for the same work.

    python experiments/noise_copies.py --workdir=runs/quickstart

At the parameters of a trained BD3-LM, for K = 1, 2, 4 copies of each of 8 training rows (training.noise_copies): the
variance of the gradient, summed over all parameters, from batch to batch with fresh rows and noise; seconds of forward
and backward pass; their product beside that of K = 1, below 1 where copies pay. Rows of a K are those of the others.
About three minutes on two cores.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jaxtyping import Array
from matplotlib.figure import Figure
from recording import RESULTS, Recording
from tqdm import tqdm

from bd3_jax import runtime
from bd3_jax.checkpoints import orbax
from bd3_jax.checkpoints.run_folder import read_config
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset, train_batches
from bd3_jax.evaluation.perplexity import open_run
from bd3_jax.models.network import Params

COPIES = (1, 2, 4)


def measure(config: Config, workdir: epath.Path, batches: int) -> dict[str, dict[str, float]]:
    """By K: variance of the gradient, its standard error, seconds of a pass."""
    dataset = open_dataset(config.data, config.model.length, "train")
    lm, params = open_run(config, workdir, dataset)[1:3]
    summary = orbax.summarize(workdir)  # the interval that the run trains in by now

    def program(copies: int) -> jax.stages.Wrapped:
        model = dataclasses.replace(lm, noise_copies=copies)

        @jax.jit
        def half_squared_difference(params: Params, rows: Array, keys: Array) -> Array:
            """Of the gradients of two batches: its mean is their variance."""
            of_batch = lambda index: jax.grad(
                lambda p: model.training_loss(p, rows[index], keys[index], summary.low, summary.high)[0]
            )
            return (
                optax.tree.norm(jax.tree.map(jnp.subtract, of_batch(0)(params), of_batch(1)(params)), squared=True) / 2
            )

        return half_squared_difference

    programs = {copies: program(copies) for copies in COPIES}
    unread = train_batches(dataset, 2 * config.training.batch_size, config.seed + 1, 0, 0, 1)
    variances: dict[int, list[float]] = {copies: [] for copies in COPIES}
    seconds: dict[int, list[float]] = {copies: [] for copies in COPIES}
    for index in tqdm(range(batches + 1), "gradients", disable=None):
        rows = next(unread).reshape(2, config.training.batch_size, -1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), index))
        for copies, run in programs.items():
            began = time.perf_counter()
            variance = float(run(params, jax.device_put(rows), keys))
            if index:  # the first is compiled
                seconds[copies].append((time.perf_counter() - began) / 2)
                variances[copies].append(variance)
    return {
        str(copies): {
            "variance": float(np.mean(variances[copies])),
            "standard_error": float(np.std(variances[copies], ddof=1) / np.sqrt(batches)),
            "seconds": statistics.median(seconds[copies]),
        }
        for copies in COPIES
    }


def cost(figures: dict[str, dict[str, float]], copies: int) -> tuple[float, float]:
    """Variance times seconds beside those of one copy, and the standard error of that."""
    one, own = figures["1"], figures[str(copies)]
    ratio = own["variance"] * own["seconds"] / one["variance"] / one["seconds"]
    relative = [each["standard_error"] / each["variance"] for each in (one, own)]
    return ratio, 0.0 if copies == 1 else ratio * math.hypot(*relative)


def table(figures: dict[str, dict[str, float]]) -> str:
    lines = ["| K | variance of the gradient | ms a pass | variance x time, of that of K = 1 |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for copies in COPIES:
        own = figures[str(copies)]
        variance = f"{own['variance']:.4g} ± {own['standard_error']:.2g}"
        ratio, error = cost(figures, copies)
        lines.append(f"| {copies} | {variance} | {1e3 * own['seconds']:.0f} | {ratio:.2f} ± {error:.2f} |")
    return "\n".join(lines)


def plot(figures: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    ratios, errors = zip(*(cost(figures, copies) for copies in COPIES), strict=True)
    axes.bar([f"K = {copies}" for copies in COPIES], ratios, yerr=errors)
    axes.axhline(1, color="gray", linestyle=":")
    axes.set(ylabel="gradient variance x time, of that of K = 1")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--batches", type=int, default=60, help="pairs of batches")
    parser.add_argument("--out", type=Path, default=RESULTS / "noise_copies")
    own = parser.parse_args(argv)
    runtime.start()
    workdir = epath.Path(own.workdir)
    config, recording = read_config(workdir), Recording(own.out)
    cell = {"run": workdir.name, "batches": own.batches}
    figures = recording.cell(cell, config.to_dict(), lambda: measure(config, workdir, own.batches))
    recording.write_table(table(figures))
    plot(figures).savefig(own.out / "noise_copies.png", dpi=150)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
