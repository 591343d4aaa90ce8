"""Noise schedules for blocks: perplexity and variance of the loss of models that are tuned with each (paper: table 8).

    python experiments/schedules.py            # about two hours and a quarter on two busy cores

From the MDLM that small_models.py trains for the first half of its BD3-LMs (seed 0), each row goes on for 1,000 steps
with blocks of 4 or 16 and one schedule, kept throughout. Then it is evaluated on all held-out documents by the
low-variance bound, which does not depend on the schedule, and its training loss is drawn for rows that these steps have
not read: the variance of the mean loss of a block, as in interval_variance.py, which has the U[0, .5] of table 2 too.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import small_models
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from measures import compare, loss_variances, losses_by_row, pooled, unread_rows
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset

SEED = 0
BLOCK_SIZES = (4, 16)
UNIFORM = "linear, U[0, 1]"
# Name in the table -> settings of `config.noise`.
SCHEDULES: dict[str, dict[str, Any]] = {
    "U[.45, .95]": dict(low=0.45, high=0.95, resample=True),
    "U[.5, 1]": dict(low=0.5, high=1.0, resample=True),
    "U[.3, .8]": dict(low=0.3, high=0.8, resample=True),
    UNIFORM: {},
    "log": dict(schedule="log"),
    "square root": dict(schedule="square_root"),
    "square": dict(schedule="square"),
    "cosine": dict(schedule="cosine"),
}
# Table 8, LM1B: (perplexity, variance).
PUBLISHED = {
    4: {
        "U[.45, .95]": (29.21, 6.24),
        "U[.3, .8]": (29.38, 10.33),
        UNIFORM: (30.18, 23.45),
        "log": (30.36, 23.53),
        "square root": (31.41, 26.43),
    },
    16: {
        "U[.45, .95]": (31.42, 3.60),
        "U[.3, .8]": (31.12, 3.58),
        UNIFORM: (31.72, 7.62),
        "square": (31.43, 13.03),
        "cosine": (31.41, 13.00),
    },
}


def settings(block_size: int, schedule: str, steps: int, first: epath.Path) -> Config:
    config = small_models.settings(f"bd3lm,block_size={block_size}", SEED, steps)
    return dataclasses.replace(
        config,
        init_from=str(first),
        noise=dataclasses.replace(config.noise, **{"resample": False} | SCHEDULES[schedule]),
        search=dataclasses.replace(config.search, enabled=False),
    )


def measure(config: Config, place: epath.Path, batches: int) -> dict[str, Any]:
    """Trains; perplexity and variances."""
    small_models.train_on(config, place)
    dataset = open_dataset(config.data, config.model.length, "validation")
    found = losses_by_row(config, place, dataset, np.arange(len(dataset)), draws=4)
    interval = {"own": (config.noise.low, config.noise.high)}
    (variances,) = loss_variances(config, place, interval, unread_rows(config, batches)).values()
    return found | variances


def table(found: dict[tuple[int, str], dict[str, Any]]) -> str:
    """All rows that there are, each beside that of U[0, 1] with its block size."""
    lines = ["Test perplexity (a bound); how much more than with U[0, 1] a token needs, row by row; variance of a"]
    lines += ["block's mean loss in squared nats. One seed: errors are those of rows and noise.", ""]
    lines += ["| B | schedule | perplexity | nats more | variance |", "| ---: | --- | ---: | ---: | ---: |"]
    rows_of = {key: np.array(figures["rows"])[None] / figures["counted"] for key, figures in found.items()}
    for (block_size, name), figures in found.items():
        rows, usual = rows_of[block_size, name], rows_of.get((block_size, UNIFORM))
        more = "" if usual is None or name == UNIFORM else "{:+.4f} +- {:.4f}".format(*compare(usual, rows))
        cells = [pooled({SEED: rows[0]})[2], more]
        cells += [f"{figures['block_variance']:.2f} +- {figures['standard_error']:.2f}"]
        lines.append(f"| {block_size} | {name} | {' | '.join(cells)} |")
    lines += ["", "Published (table 8, LM1B, fine-tuned for 3 B tokens).", ""]
    lines += ["| B | schedule | perplexity | variance |", "| ---: | --- | ---: | ---: |"]
    for block_size, rows in PUBLISHED.items():
        lines += [
            f"| {block_size} | {name} | {perplexity:.2f} | {variance:.2f} |"
            for name, (perplexity, variance) in rows.items()
        ]
    return "\n".join(lines)


def plot(found: dict[tuple[int, str], dict[str, Any]]) -> Figure:
    """Perplexity against variance, block sizes side by side."""
    sizes = sorted({block_size for block_size, _ in found})
    figure = Figure(figsize=(4 * len(sizes) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, block_size in zip(panels, sizes, strict=True):
        for place, name in enumerate(SCHEDULES):
            if figures := found.get((block_size, name)):
                variance, error = figures["block_variance"], figures["standard_error"]
                axes.errorbar(
                    variance, np.exp(figures["nll"]), xerr=error, fmt="o", color=f"C{place}", capsize=3, label=name
                )
        axes.set(xscale="log", xlabel="variance of a block's mean loss (nats²)", title=f"B = {block_size}")
        axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
    panels[0].set_ylabel("test perplexity (a bound)")
    figure.legend(*panels[0].get_legend_handles_labels(), title="trained with", loc="outside right upper")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="with each schedule")
    parser.add_argument("--batches", type=int, default=200, help="of rows whose losses are drawn")
    parser.add_argument("--first_steps", type=int, default=small_models.STEPS, help="as small_models.py counts them")
    parser.add_argument("--runs", type=epath.Path, default=small_models.RUNS, help="folder of all models")
    parser.add_argument("--out", type=Path, default=RESULTS / "schedules")
    own = parser.parse_args(argv)
    runtime.start()
    recording, found = Recording(own.out), {}
    first = small_models.first_half(SEED, own.first_steps, own.runs)
    for block_size in BLOCK_SIZES:
        for name in SCHEDULES:
            config = settings(block_size, name, own.steps, first)
            place = own.runs / f"schedule-{block_size}-{list(SCHEDULES).index(name)}-steps-{own.steps}"
            found[block_size, name] = recording.cell(
                {"block_size": block_size, "schedule": name, "steps": own.steps, "batches": own.batches},
                config.to_dict(),
                lambda config=config, place=place: measure(config, place, own.batches),
            )
            recording.write_table(table(found))
            plot(found).savefig(own.out / "schedules.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
