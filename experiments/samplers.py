"""The samplers side by side on one model: network calls, generative perplexity, entropy and speed.

    python experiments/samplers.py --workdir=runs/quickstart
    python experiments/samplers.py --judge=FILE.gguf   # where the extra torch is; see `bd3 judge`

The first command draws from a run with every sampler, 16 texts at a time, and reads as much held-out text; about two
minutes on two cores. The second, six minutes with a model of 135 million parameters, scores the texts that are there.
Each goes on where it was interrupted, and writes the table anew.
"""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from recording import RESULTS, Recording

import bd3_jax
from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.data.pipeline import open_dataset
from bd3_jax.errors import UserError
from bd3_jax.evaluation.generative import TransformersJudge, score
from bd3_jax.pretrained import Pretrained

HELD_OUT = "held-out text"
BATCH = 16
# Settings that texts of one table share, as far as an experiment has them.
COMMON = ("seed", "steps", "step", "num_samples")


def samplers(block_size: int) -> dict[str, dict[str, Any]]:
    """Name -> settings of `config.sampling`."""
    return {
        "first-hitting": dict(sampler="first_hitting"),
        "first-hitting, P = 1": dict(sampler="first_hitting", nucleus=1.0),
        "first-hitting, no cache": dict(sampler="first_hitting", kv_cache=False),
        "ancestral, T = B": dict(sampler="ancestral", num_steps=block_size),
        "ancestral, T = 1000": dict(sampler="ancestral", num_steps=1000),
        "confidence, 1 a call": dict(sampler="confidence", tokens_per_step=1),
        "confidence, 2 a call": dict(sampler="confidence", tokens_per_step=2),
        "confidence, 4 a call": dict(sampler="confidence", tokens_per_step=4),
        "threshold 0.9": dict(sampler="threshold", threshold=0.9),
        "threshold 0.3": dict(sampler="threshold", threshold=0.3),
        "entropy-bounded 0.1": dict(sampler="entropy_bounded", entropy_bound=0.1),
        "entropy-bounded 4": dict(sampler="entropy_bounded", entropy_bound=4.0),
        "remasking, T = 2B": dict(sampler="remasking", num_steps=2 * block_size),
    }


def draw(model: Pretrained, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Means over `count` texts, of the context's length unless `settings` say else, and the texts."""
    settings = {"max_length": model.model.length} | settings
    samples = model.sample(num_samples=count, batch_size=BATCH, **settings)
    mean = lambda name: sum(getattr(each, name) for each in samples) / count
    # Compilation is not timed.
    drawn, seconds = sum(each.drawn for each in samples), sum(each.seconds for each in samples)
    figures = {name: mean(name) for name in ("nfe", "cache_calls", "entropy", "distinct_2")}
    return figures | {"tokens_per_second": drawn / seconds, "texts": [each.text for each in samples]}


def held_out(model: Pretrained, count: int) -> dict[str, Any]:
    """The first rows of the validation split, but for the first token, in whose place samples have BOS."""
    rows = open_dataset(model.config.data, model.model.length, "validation").read(range(count))
    return {"texts": [model.text_tokenizer().decode(row[1:].tolist()) for row in rows]}


def draw_all(recording: Recording, workdir: str, only: list[str], count: int) -> None:
    model = bd3_jax.load_pretrained(workdir)
    config, common = model.config.to_dict(), {"num_samples": count, "step": model.step}
    every = samplers(model.model.block_size)
    if unknown := set(only) - set(every):
        raise UserError(f"--only={unknown.pop()}: no such sampler; allowed: {'; '.join(every)}")
    for name, settings in every.items():
        if only and name not in only:
            continue
        recording.cell(
            {"text": name, **common, **settings}, config, lambda settings=settings: draw(model, count, settings)
        )
    recording.cell({"text": HELD_OUT, **common}, config, lambda: held_out(model, count))


def judge_all(recording: Recording, name: str) -> None:
    drawn = [cell for cell in recording.cells if "text" in cell["settings"]]
    if not drawn:
        raise UserError(f"{recording.folder} has no texts; allowed: after --workdir=DIR")
    judge = TransformersJudge(name)
    for cell in drawn:
        texts = [f"{judge.bos}{text}" for text in cell["figures"]["texts"]]
        asked = {"judge": Path(name).name, "of": cell["settings"]}
        recording.cell(asked, cell["config"], lambda texts=texts: dataclasses.asdict(score(texts, judge)[1]))


def rows(recording: Recording) -> dict[str, dict[str, Any]]:
    """Name -> figures, those of the newest judge included, of all texts that are of one seed, length and number."""
    found = {}
    drawn = [cell for cell in recording.cells if "text" in cell["settings"]]
    for cell in drawn:
        if all(cell["settings"].get(name) == drawn[-1]["settings"].get(name) for name in COMMON):
            judged = [
                each
                for each in recording.cells
                if each["settings"].get("of") == cell["settings"] and each["config"] == cell["config"]
            ]
            scores = judged[-1]["figures"] | judged[-1]["settings"] if judged else {}
            # The judge tokenises anew, and counts n-grams of its own.
            found[cell["settings"]["text"]] = scores | cell["figures"]
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    judges = {figures["judge"] for figures in found.values() if "judge" in figures}
    lines = [
        f"Perplexity of the texts by {', '.join(sorted(judges)) or 'no judge yet'}: mean over texts, and pooled.",
        "",
        "| texts | network calls | perplexity | pooled | entropy, nats | distinct-2 | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in found.items():
        drawn = "nfe" in figures
        cells = [
            f"{figures['nfe']:.1f}" if drawn else "",
            *(f"{figures[key]:,.1f}" if key in figures else "" for key in ("mean_perplexity", "pooled_perplexity")),
            *(f"{figures[key]:.3f}" if drawn else "" for key in ("entropy", "distinct_2")),
            f"{figures['tokens_per_second']:,.0f}" if drawn else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]]) -> Figure:
    """Pooled perplexity by network calls; the entropy stands in the legend, since a low one buys a low perplexity."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes, markers = figure.subplots(), itertools.cycle("osD^v<>pX*P")
    for name, figures in found.items():
        if "pooled_perplexity" not in figures:
            continue
        perplexity = figures["pooled_perplexity"]
        if "nfe" in figures:
            label = f"{name}: {figures['entropy']:.2f} nats"
            axes.plot(figures["nfe"], perplexity, next(markers), markersize=9, alpha=0.7, label=label)
        else:
            axes.axhline(perplexity, color="grey", linestyle="--", label=name)
    axes.set(xlabel="network calls per text", ylabel="perplexity, pooled over texts", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if axes.has_data():
        figure.legend(loc="outside right upper")
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="a run to draw from")
    parser.add_argument("--judge", help="a causal language model")
    parser.add_argument("--num_samples", type=int, default=32, help="texts for each sampler")
    parser.add_argument("--only", action="append", default=[], metavar="SAMPLER", help="as it stands in the table")
    parser.add_argument("--out", type=Path, default=RESULTS / "samplers")
    own = parser.parse_args(argv)
    if not (own.workdir or own.judge):
        raise UserError("nothing to do; allowed: --workdir=DIR, --judge=MODEL or both")
    runtime.start()
    recording = Recording(own.out)
    try:
        if own.workdir:
            draw_all(recording, own.workdir, own.only, own.num_samples)
        if own.judge:
            judge_all(recording, own.judge)
    finally:
        found = rows(recording)
        if found:
            recording.write_table(table(found))
            plot(found).savefig(own.out / "samplers.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
