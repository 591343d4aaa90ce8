"""Variance of the training loss in the interval that was searched for, beside that in others (paper: tables 2 and 8).

    python experiments/interval_variance.py

For B = 4, 8, 16 it trains a small BD3-LM on the quickstart's corpus, with a search at every validation. With the
averaged weights in the end it draws the training loss of rows that training has not read, in every interval for the
same rows and keys: the variance of the mean loss of a block, which the search makes small and the paper's tables have,
and that of the loss of a batch, over rows and noise. About half an hour on two cores. Exit status 1 where the chosen
interval does not vary less than U[0, 1].
"""

import argparse
import math
import sys
from pathlib import Path

from etils import epath
from matplotlib.figure import Figure
from measures import loss_variances, unread_rows
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.checkpoints import orbax
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import quickstart
from bd3_jax.data.prepare import prepare
from bd3_jax.training.loop import train

BLOCK_SIZES = (4, 8, 16)
FULL = "U[0, 1]"
INTERVALS = {"U[0, .5]": (1e-3, 0.5), "U[.3, .8]": (0.3, 0.8), "U[.5, 1]": (0.5, 1.0), FULL: (1e-3, 1.0)}
# Table 2: LM1B, rows of 128 tokens, a model trained in each interval. B -> (perplexity, variance) by interval.
PUBLISHED = {
    128: ((31.72, 1.03), (31.78, 1.35), (31.92, 1.83), (31.78, 3.80)),
    16: ((31.27, 7.90), (31.19, 3.62), (31.29, 3.63), (31.33, 7.39)),
    4: ((29.23, 32.68), (29.37, 10.39), (29.16, 8.28), (29.23, 23.65)),
}


def settings(block_size: int, steps: int) -> Config:
    config = quickstart.get_config(f"bd3lm,block_size={block_size}")
    config.noise.update(low=1e-3, high=1.0, resample=True)
    config.training.update(num_steps=steps, eval_every=math.ceil(steps / 2), checkpoint_every=steps)
    config.eval.update(num_batches=2)
    config.search.update(enabled=True, num_batches=4)
    return from_config_dict(config)


def measure(config: Config, workdir: epath.Path, batches: int) -> dict[str, object]:
    """Trains, then draws losses: figures by interval. Variances are in squared nats per token."""
    prepare(config.data, config.model.length)
    train(config, workdir)
    summary = orbax.summarize(workdir)
    intervals = {"chosen": (summary.low, summary.high), **INTERVALS}
    found = loss_variances(config, workdir, intervals, unread_rows(config, batches))
    return {
        "low": summary.low,
        "high": summary.high,
        "rows": batches * config.training.batch_size,
        "intervals": found,
    }


def table(found: dict[int, dict]) -> str:
    names = ["chosen", *INTERVALS]
    lines = ["Variance of the mean loss of a block, squared nats per token, +- its standard error over batches.", ""]
    lines += [f"| B | interval chosen | {' | '.join(names)} |", "|" + " --- |" * (2 + len(names))]
    for block_size, figures in found.items():
        cells = [figures["intervals"][name] for name in names]
        values = " | ".join(f"{cell['block_variance']:.3f} +- {cell['standard_error']:.3f}" for cell in cells)
        lines.append(f"| {block_size} | U[{figures['low']:g}, {figures['high']:g}] | {values} |")
    lines += ["", "Variance of the loss of a batch of 8 rows, and (mean of the loss).", ""]
    lines += [f"| B | {' | '.join(names)} |", "|" + " --- |" * (1 + len(names))]
    for block_size, figures in found.items():
        cells = [figures["intervals"][name] for name in names]
        values = " | ".join(f"{cell['batch_variance']:.4f} ({cell['mean']:.2f})" for cell in cells)
        lines.append(f"| {block_size} | {values} |")
    lines += ["", "Published (table 2: LM1B, a model trained in each interval), perplexity / variance.", ""]
    lines += [f"| B | {' | '.join(INTERVALS)} |", "|" + " --- |" * (1 + len(INTERVALS))]
    for size, row in PUBLISHED.items():
        cells = [f"{perplexity:.2f} / {variance:.2f}" for perplexity, variance in row]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[int, dict]) -> Figure:
    """Bars by block size, logarithmic."""
    names = ["chosen", *INTERVALS]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        cells = [figures["intervals"][name] for figures in found.values()]
        at = [index + (place - 2) * 0.17 for index in range(len(found))]
        errors = [cell["standard_error"] for cell in cells]
        axes.bar(at, [cell["block_variance"] for cell in cells], 0.16, yerr=errors, label=name)
    axes.set(yscale="log", ylabel="variance of a block's mean loss (nats²)")
    axes.set_xticks(range(len(found)), [f"B = {block_size}" for block_size in found])
    axes.legend(title="t drawn from")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of training, for each block size")
    parser.add_argument("--batches", type=int, default=200, help="of rows whose losses are drawn")
    parser.add_argument("--workdir", default="runs/interval_variance")
    parser.add_argument("--out", type=Path, default=RESULTS / "interval_variance")
    own = parser.parse_args(argv)
    runtime.start()
    recording, found = Recording(own.out), {}
    for block_size in BLOCK_SIZES:
        config = settings(block_size, own.steps)
        workdir = epath.Path(own.workdir) / f"block-{block_size}-steps-{own.steps}"
        cell = {"block_size": block_size, "steps": own.steps, "batches": own.batches}
        found[block_size] = recording.cell(
            cell, config.to_dict(), lambda config=config, workdir=workdir: measure(config, workdir, own.batches)
        )
        recording.write_table(table(found))
        plot(found).savefig(own.out / "interval_variance.png", dpi=150)
    of_blocks = lambda figures, name: figures["intervals"][name]["block_variance"]
    if not all(of_blocks(figures, "chosen") < of_blocks(figures, FULL) for figures in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
