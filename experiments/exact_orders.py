"""Exact likelihood by the order of unmasking, beside the NELBO (DUEL, arXiv 2603.01367), in miniature.

    python experiments/exact_orders.py             # about five minutes on one idle core
    python experiments/exact_orders.py --rows=636  # all held-out rows: seven times as long

The NELBO of a masked model is a mean over all orders in which a block may be unmasked. Where one rule fixes the order,
the likelihood is exact: that of a sampler with this rule (bd3_jax/diffusion/orders.py). Of the BD3-LMs and the MDLM of
small_models.py (likelihood.py trains them), on rows evenly spread over the held-out documents, the same for all: the
bound as in likelihood.py, and both orders. An exact figure takes as many calls as a block has tokens, 128 for MDLM.
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
from measures import compare, losses_by_row, pooled
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.diffusion.orders import ORDERS
from bd3_jax.errors import UserError

MODELS = ("BD3-LM B = 4", "BD3-LM B = 8", "BD3-LM B = 16", "MDLM")
BOUND = "low_variance"
DRAWS = {BOUND: 8} | dict.fromkeys(ORDERS, 1)  # of the noise, for every row; the exact orders draw none
TITLES = {BOUND: "NELBO", "left_to_right": "left to right", "most_confident": "by confidence"}
# DUEL: a BD3-LM with B = 4 trained on OpenWebText, zero-shot on AG News.
PUBLISHED = {BOUND: 61.67, "left_to_right": 54.94}


def measure(config: Config, place: epath.Path, count: int) -> dict[str, Any]:
    """The losses of held-out rows by the estimator of `config`."""
    dataset = open_dataset(config.data, config.model.length, "validation")
    rows = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    return losses_by_row(config, place, dataset, rows, DRAWS[config.eval.estimator])


def table(found: dict[str, dict[str, np.ndarray]]) -> str:
    """`found`: model -> estimator -> NLL per token of every row."""
    differences = [f"{TITLES[order]}, nats more" for order in ORDERS]
    lines = ["Perplexity by the bound and by each order; how much more than by the bound a token needs, row by row."]
    lines += ["One seed: errors are those of rows and noise.", ""]
    lines += [f"| model | {' | '.join([*TITLES.values(), *differences])} |", "| --- |" + " ---: |" * 5]
    for name, rows in found.items():
        cells = [pooled({0: rows[estimator]})[2] for estimator in TITLES]
        cells += ["{:+.4f} +- {:.4f}".format(*compare(rows[BOUND][None], rows[order][None])) for order in ORDERS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Published (DUEL: a BD3-LM with B = 4 trained on OpenWebText, on AG News).", ""]
    lines += [f"| {' | '.join(TITLES[name] for name in PUBLISHED)} |", "|" + " ---: |" * len(PUBLISHED)]
    lines.append(f"| {' | '.join(f'{value:.2f}' for value in PUBLISHED.values())} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, np.ndarray]]) -> Figure:
    """How far each order lies from the bound, by model."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for place, order in enumerate(ORDERS):
        pairs = [compare(rows[BOUND][None], rows[order][None]) for rows in found.values()]
        means, errors = zip(*pairs, strict=True)
        at = [index + (place - 0.5) * 0.15 for index in range(len(found))]
        axes.errorbar(at, means, [2 * error for error in errors], fmt="o", capsize=4, label=TITLES[order])
    axes.axhline(0, color="gray", linestyle=":", label="the bound")
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel="nats per token more than the bound", title="Exact orders (+- two standard errors)")
    axes.legend(title="unmasked")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="of the held-out documents, at most")
    parser.add_argument("--seed", type=int, default=small_models.SEEDS[0], help="of the models' training")
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "exact_orders")
    own = parser.parse_args(argv)
    runtime.start()
    trained = small_models.of_seed(own.seed, own.steps, own.runs)
    models = {name: trained[name] for name in MODELS if name in trained}
    if not models:
        raise UserError(
            f"--runs is {str(own.runs)!r}, which has no such model of {own.steps} steps; train with likelihood.py"
        )
    recording, found = Recording(own.out), {}
    for name, (config, place) in models.items():
        figures: dict[str, dict[str, Any]] = {}
        for estimator, draws in DRAWS.items():
            settings = dataclasses.replace(config, eval=dataclasses.replace(config.eval, estimator=estimator))
            asked = {"model": name, "seed": own.seed, "steps": own.steps, "rows": own.rows, "draws": draws}
            figures[estimator] = recording.cell(
                asked | {"estimator": estimator},
                settings.to_dict(),
                lambda settings=settings, place=place: measure(settings, place, own.rows),
            )
        found[name] = {key: np.array(each["rows"]) / each["counted"] for key, each in figures.items()}
        recording.write_table(table(found))
        plot(found).savefig(own.out / "exact_orders.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
