"""Lengths of generated documents beside those of the training set (paper: table 6), in miniature.

    python experiments/lengths.py                      # 500 documents of each model, about ten minutes on two cores
    python experiments/lengths.py --num_samples=100

AR, SEDD and a BD3-LM of small_models.py (likelihood.py trains them) know no BOS and EOS around rows: where a document
ends they have learnt from the EOS between documents, in rows that are shorter than most. Each draws documents of
variable length; SEDD, which cannot go beyond its rows, fills one, and what has an EOS within is rejected, as by the
authors. A length counts tokens that are not EOS.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import small_models
from etils import epath
from matplotlib.figure import Figure
from recording import RESULTS, Recording

import bd3_jax
from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.errors import UserError

MODELS = ("AR", "SEDD", "BD3-LM B = 16")
TRAINING_SET = "training set"
# Table 6: median and maximum of 500 documents, OpenWebText, rows of 1024.
PUBLISHED = {TRAINING_SET: (717, "131 K"), "AR": (4008, "131 K"), "SEDD": (1021, 1024), "BD3-LM B = 16": (798, 9982)}


def of_training_set(config: Config) -> dict[str, Any]:
    """Lengths of all its documents but the last, from its rows laid end to end."""
    dataset = open_dataset(config.data, config.model.length, "train")
    tokens = dataset.read(range(len(dataset))).reshape(-1)
    ends = np.flatnonzero(tokens == dataset.tokenizer.ids.eos)
    return {"lengths": np.diff(ends, prepend=-1) - 1}


def drawn(workdir: epath.Path, count: int, max_length: int) -> dict[str, Any]:
    """Lengths of samples, how they ended, and how many were discarded."""
    model = bd3_jax.load_pretrained(str(workdir))
    limit = model.model.length if model.objective == "sedd" else max_length
    # SEDD: as many steps as tokens. The others' samplers have one call a token.
    samples = model.sample(num_samples=count, batch_size=32, max_length=limit, num_steps=limit, variable_length=True)
    kept = samples
    if model.objective == "sedd":
        # The sampler's own stops are looked at beyond 256 tokens, which these rows do not have.
        kept = [sample for sample in samples if model.model.ids.eos not in sample.tokens[1:]]
        if not kept:
            raise UserError(f"--num_samples is {count}, all of which SEDD drew with an EOS within; allowed: more")
    return {
        "lengths": np.array([sample.length for sample in kept]),
        "ended_by_eos": sum(sample.stopped == "eos" for sample in kept),
        "rejected": sum(sample.rejected for sample in samples) + len(samples) - len(kept),
        "limit": limit,
    }


def figures(found: dict[str, Any]) -> dict[str, Any]:
    lengths = found["lengths"]
    return found | {"lengths": lengths.tolist(), "median": float(np.median(lengths)), "maximum": int(lengths.max())}


def table(found: dict[str, dict[str, Any]]) -> str:
    heads = ["", "documents", "median", "maximum", "ended by EOS", "at most", "rejected"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, each in found.items():
        cells = [f"{len(each['lengths']):,}", f"{each['median']:.0f}", f"{each['maximum']:,}"]
        cells += [f"{each[key]:,}" if key in each else "" for key in ("ended_by_eos", "limit", "rejected")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Published (table 6), rows of 1024.", "", "| | median | maximum |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {median} | {maximum} |" for name, (median, maximum) in PUBLISHED.items()]
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]]) -> Figure:
    """Shares of documents by length."""
    figure = Figure(figsize=(8, 2 * len(found)), layout="constrained")
    top = max(each["maximum"] for each in found.values()) + 1
    bins = np.geomspace(8, max(top, 16), 40)
    for axes, (name, each) in zip(
        figure.subplots(len(found), sharex=True, squeeze=False)[:, 0], found.items(), strict=True
    ):
        lengths = np.maximum(each["lengths"], bins[0])
        axes.hist(lengths, bins, weights=np.full(len(lengths), 100 / len(lengths)), color="C0")
        axes.axvline(each["median"], color="C1", label=f"median {each['median']:.0f}")
        axes.set(xscale="log", title=name, ylabel="% of documents")
        axes.legend()
    figure.axes[-1].set_xlabel("tokens")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=500, help="documents of each model")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of a document that does not end")
    parser.add_argument("--seed", type=int, default=small_models.SEEDS[0], help="of the models' training")
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths")
    own = parser.parse_args(argv)
    runtime.start()
    models = small_models.of_seed(own.seed, own.steps, own.runs)
    if missing := [name for name in MODELS if name not in models]:
        raise UserError(f"--runs is {str(own.runs)!r}, which lacks {', '.join(missing)}; train with likelihood.py")
    recording, found = Recording(own.out), {}
    config, _ = models[MODELS[0]]
    found[TRAINING_SET] = recording.cell(
        {"of": TRAINING_SET}, config.to_dict(), lambda: figures(of_training_set(config))
    )
    for name in MODELS:
        config, place = models[name]
        asked = {
            "of": name,
            "seed": own.seed,
            "steps": own.steps,
            "max_length": own.max_length,
            "documents": own.num_samples,
        }
        found[name] = recording.cell(
            asked, config.to_dict(), lambda place=place: figures(drawn(place, own.num_samples, own.max_length))
        )
        recording.write_table(table(found))
        plot(found).savefig(own.out / "lengths.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
