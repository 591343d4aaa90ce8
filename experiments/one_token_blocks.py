"""Blocks of one token beside AR: whether diffusion training is as good (paper: table 1, figure 2), in miniature.

    python experiments/one_token_blocks.py             # about two hours on two cores, if each has seeds of its own
    python experiments/one_token_blocks.py --seeds=0   # forty minutes, after likelihood.py has trained the AR

With B = 1 the NELBO with everything masked is the likelihood itself, so BD3-LM and AR model the same thing. Trained
with t ~ U[0, 1] half of the tokens, those that are not masked, teach nothing, and each of the others counts 1/t times;
with t = 1, the tuned schedule, all count alike, as in AR. Steps, tokens and layers are those of small_models.py;
perplexity is exact for all, over all rows of the held-out documents. Variances are of the training loss on those same
rows, without dropout: of a token's, and of the mean of 8 rows. The picture has the losses during training.
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
from measures import Curves, compare, curves, loss_variances, losses_by_row, plot_curves, pooled, record_curve
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset

AR, UNIFORM, MASKED = "AR", "B = 1, t ~ U[0, 1]", "B = 1, t = 1"
# Name -> low and high of `config.noise`.
INTERVALS = {UNIFORM: (1e-3, 1.0), MASKED: (1.0, 1.0)}
MODELS = (AR, *INTERVALS)
# Table 1: perplexity on LM1B after 16 B tokens. The last entry is the variance of the NELBO after 328 M tokens.
PUBLISHED = {
    AR: (22.88, None),
    "AR, random batch size": (24.37, None),  # not trained here
    UNIFORM: (25.56, 1.52),
    MASKED: (22.88, 0.11),
}


def settings(name: str, seed: int, steps: int) -> Config:
    if name == AR:
        return small_models.settings("ar", seed, steps)
    config = small_models.settings("bd3lm,block_size=1", seed, steps)
    low, high = INTERVALS[name]
    return dataclasses.replace(
        config,
        noise=dataclasses.replace(config.noise, low=low, high=high, resample=False),
        search=dataclasses.replace(config.search, enabled=False),
    )


def workdir(name: str, seed: int, steps: int, runs: epath.Path) -> epath.Path:
    if name == AR:
        return small_models.workdir("AR", seed, steps, runs)
    return runs / f"one-token-{list(INTERVALS).index(name)}-seed-{seed}-steps-{steps}"


def measure(config: Config, place: epath.Path) -> dict[str, Any]:
    """Trains; losses of every held-out row, and variances."""
    small_models.train_on(config, place)
    dataset = open_dataset(config.data, config.model.length, "validation")
    whole = len(dataset) // config.training.batch_size * config.training.batch_size
    batches = np.split(dataset.read(range(whole)), whole // config.training.batch_size)
    interval = (config.noise.low, config.noise.high)
    (variances,) = loss_variances(config, place, {"own": interval}, batches).values()
    return losses_by_row(config, place, dataset, np.arange(len(dataset)), draws=1) | {"variances": variances}


def table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    rows = {
        name: {seed: np.array(each["rows"]) / each["counted"] for seed, each in seeds.items()}
        for name, seeds in found.items()
    }
    lines = [
        "Perplexity, exact, with its standard error over rows and seeds; how much more than AR a token needs, row by",
        "row; variance of the training loss in squared nats.",
        "",
        "| | seeds | perplexity | nats more than AR | variance, a token | variance, the mean of 8 rows |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, seeds in rows.items():
        more = ""
        if name != AR and (shared := sorted(seeds.keys() & rows[AR].keys())):
            mean, error = compare(*(np.stack([each[seed] for seed in shared]) for each in (rows[AR], seeds)))
            more = f"{mean:+.4f} +- {error:.4f}"
        variances = [
            np.mean([each["variances"][key] for each in found[name].values()])
            for key in ("block_variance", "batch_variance")
        ]
        lines.append(
            f"| {name} | {len(seeds)} | {pooled(seeds)[2]} | {more} | {variances[0]:.2f} | {variances[1]:.4f} |"
        )
    lines += ["", "Published (table 1: LM1B; its variance is of the NELBO).", ""]
    lines += ["| | perplexity | variance |", "| --- | ---: | ---: |"]
    for name, (perplexity, variance) in PUBLISHED.items():
        lines.append(f"| {name} | {perplexity:.2f} | {'' if variance is None else f'{variance:.2f}'} |")
    return "\n".join(lines)


def plot(trained: Curves) -> Figure:
    """Training losses of the three, as in figure 2."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plot_curves(axes, {name: trained[name] for name in MODELS if name in trained})
    axes.set_title("Blocks of one token beside AR")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small_models.add_seeds(parser)
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "one_token_blocks")
    own = parser.parse_args(argv)
    runtime.start()
    recording = Recording(own.out)
    for seed in own.seeds:
        for name in MODELS:
            config, place = settings(name, seed, own.steps), workdir(name, seed, own.steps, own.runs)
            recording.cell(
                {"model": name, "seed": seed, "steps": own.steps},
                config.to_dict(),
                lambda config=config, place=place: measure(config, place),
            )
            record_curve(recording, name, seed, own.steps, place)
            found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in MODELS}
            for cell in recording.cells:
                asked = cell["settings"]
                if "model" in asked and asked["steps"] == own.steps:
                    found[asked["model"]][asked["seed"]] = cell["figures"]
            text = table({name: seeds for name, seeds in found.items() if seeds})
            recording.write_table(text)
            if trained := curves(recording.cells, own.steps):
                plot(trained).savefig(own.out / "one_token_blocks.png", dpi=150)
    print(text)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
