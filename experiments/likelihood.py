"""Test perplexity of AR, BD3-LM, MDLM and SEDD, alike in all but the objective (paper: tables 3 and 4), in miniature.

    python experiments/likelihood.py                # about three hours on two cores, if each has seeds of its own
    python experiments/likelihood.py --seeds=1      # two of these at once, for different seeds, may share a machine

Trains the models of small_models.py, several seeds of each, and evaluates every one on all rows of the held-out
documents: exactly for AR, else by the NELBO, an upper bound, with the low-variance estimator where there is one. The
bound of a row is the mean of some draws. Interrupted, it goes on where it was.

Two models are compared row by row, over the same rows: the standard error of the difference is that of rows (of means
over seeds) and that of seeds together. Rows count in batches of neighbours, which have one draw of the noise and texts
that are alike. Where the error is less than half of the difference, the table says which is lower.

What training itself showed is recorded too: how long the models that begin from nothing stay on a plateau, on which
they know how frequent each token is and little more (with that alone, a token of this corpus takes 6.44 nats).
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import small_models
from etils import epath
from matplotlib.figure import Figure
from measures import CURVE_STEPS, Curves, by_model, compare, curves, losses_by_row, plot_curves, pooled, record_curve
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.data.pipeline import open_dataset

DRAWS = 8  # of the noise, for every row
# Models that begin from nothing -> their name in the table.
FROM_NOTHING = {"AR": "AR", small_models.FIRST_HALF: "first half of BD3-LMs", "MDLM": "MDLM", "SEDD": "SEDD"}
PLATEAU = 6.0  # nats: between the plateau, which is at 6.4, and what follows
# Tables 3 and 4, test perplexity on LM1B (65 B tokens) and OpenWebText (524 B tokens).
PUBLISHED = {
    "AR": (22.83, 17.54),
    "BD3-LM B = 4": (28.23, 20.73),
    "BD3-LM B = 8": (29.83, 21.68),
    "BD3-LM B = 16": (30.60, 22.27),
    "MDLM": (31.78, 22.98),
    "SEDD": (32.68, 24.10),
}


def measure(name: str, seed: int, steps: int, runs: epath.Path) -> dict[str, Any]:
    """Trains; the losses of every held-out row."""
    config, place = small_models.trained(name, seed, steps, runs)
    dataset = open_dataset(config.data, config.model.length, "validation")
    return losses_by_row(config, place, dataset, np.arange(len(dataset)), DRAWS)


def table(found: dict[str, dict[int, np.ndarray]], trained: Curves) -> str:
    lines = ["Test perplexity; of ours, with the standard error over batches of neighbouring rows (of means over"]
    lines += ["seeds) and seeds together.", ""]
    lines += ["| model | by seed | perplexity | NLL, nats per token |", "| --- | --- | ---: | ---: |"]
    for name, seeds in found.items():
        nll, error, perplexity = pooled(seeds)
        each = ", ".join(f"{math.exp(rows.mean()):.1f}" for _, rows in sorted(seeds.items()))
        lines.append(f"| {name} | {each} | {perplexity} | {nll:.4f} +- {error:.4f} |")
    lines += ["", "Neighbours in the published order, row by row: how much more the second needs, nats per token.", ""]
    lines += ["| | | by seed | difference | lower |", "| --- | --- | --- | ---: | --- |"]
    names = list(found)
    for first, second in itertools.pairwise(names):
        seeds = sorted(found[first].keys() & found[second].keys())
        if seeds:
            stacked = [np.stack([found[name][seed] for seed in seeds]) for name in (first, second)]
            mean, error = compare(*stacked)
            said = "not told apart" if abs(mean) < 2 * error else first if mean > 0 else second
            said += " (rows of one seed)" if len(seeds) == 1 else ""
            each = ", ".join(f"{difference:+.3f}" for difference in (stacked[1] - stacked[0]).mean(1))
            lines.append(f"| {first} | {second} | {each} | {mean:+.4f} +- {error:.4f} | {said} |")
    if trained:
        lines += ["", *left_plateau(trained)]
    lines += ["", "Published (tables 3 and 4).", "", "| model | LM1B | OpenWebText |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {lm1b:.2f} | {owt:.2f} |" for name, (lm1b, owt) in PUBLISHED.items()]
    return "\n".join(lines)


def left_plateau(trained: Curves) -> list[str]:
    """When, by `measures.curves`."""
    seeds = sorted({seed for each in trained.values() for seed in each})
    lines = [f"Steps until the training loss, a mean of {CURVE_STEPS} steps, was below {PLATEAU:g} nats; and that loss"]
    lines += ["after half of the steps of the whole training.", ""]
    heads = [f"seed {seed}: {what}" for seed in seeds for what in ("steps", "nats after half")]
    lines += [f"| model | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    half = max(curve["step"][-1] for each in trained.values() for curve in each.values()) / 2
    for name, each in trained.items():
        cells = []
        for seed in seeds:
            points = list(zip(*each[seed].values(), strict=True)) if seed in each else []
            left = next((f"{step:,}" for step, loss in points if loss < PLATEAU), "never" if points else "")
            cells += [left, next((f"{loss:.2f}" for step, loss in points if step >= half), "")]
        lines.append(f"| {FROM_NOTHING[name]} | {' | '.join(cells)} |")
    return lines


def plot(found: dict[str, dict[int, np.ndarray]]) -> Figure:
    """A line for each seed, beside the published perplexities."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ours, *published = figure.subplots(1, 3)
    for seed in sorted({seed for seeds in found.values() for seed in seeds}):
        own = [(place, math.exp(seeds[seed].mean())) for place, seeds in enumerate(found.values()) if seed in seeds]
        ours.plot(*zip(*own, strict=True), "o-", alpha=0.7, label=f"seed {seed}")
    ours.set_xticks(range(len(found)), list(found), rotation=60)
    ours.set(title="here", ylabel="test perplexity")
    ours.legend()
    for index, (axes, corpus) in enumerate(zip(published, ("LM1B", "OpenWebText"), strict=True)):
        axes.plot([values[index] for values in PUBLISHED.values()], "ks-")
        axes.set_xticks(range(len(PUBLISHED)), list(PUBLISHED), rotation=60)
        axes.set_title(f"published, {corpus}")
    return figure


def plot_training(trained: Curves) -> Figure:
    """The curves of the models that begin from nothing, and the threshold of the table."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plot_curves(axes, {FROM_NOTHING[name]: each for name, each in trained.items()})
    axes.axhline(PLATEAU, color="gray", linewidth=0.8)
    axes.set_title("Diffusion begins on a plateau")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small_models.add_seeds(parser)
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "likelihood")
    own = parser.parse_args(argv)
    runtime.start()
    recording = Recording(own.out)
    for seed in own.seeds:
        for name in small_models.MODELS:
            recording.cell(
                {"model": name, "seed": seed, "steps": own.steps, "draws": DRAWS},
                small_models.config_of(name, seed, own.steps, own.runs).to_dict(),
                lambda name=name, seed=seed: measure(name, seed, own.steps, own.runs),
            )
            found = by_model(recording.cells, own.steps)
            recording.write_table(table(found, curves(recording.cells, own.steps)))
            plot(found).savefig(own.out / "likelihood.png", dpi=150)
        for name in FROM_NOTHING:
            record_curve(recording, name, seed, own.steps, small_models.workdir(name, seed, own.steps, own.runs))
        if trained := curves(recording.cells, own.steps):
            recording.write_table(table(found, trained))
            plot_training(trained).savefig(own.out / "training.png", dpi=150)
    print(table(found, curves(recording.cells, own.steps)))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
