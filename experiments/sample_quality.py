"""Generative perplexity of AR, SEDD, MDLM and BD3-LM at about equal network calls (paper: table 7), in miniature.

    python experiments/sample_quality.py
    python experiments/sample_quality.py --judge=FILE.gguf   # where the extra torch is; see `bd3 judge`

The first command draws from models of small_models.py (likelihood.py trains them), texts as long as the training
context and twice as long, with about one network call a token; about ten minutes on two cores. The second scores them.
Beyond the context MDLM sees a window of the newest tokens, and SEDD, conditioned on the time of a whole row, cannot go.
Held-out rows are scored beside them, and entropy is printed, since a text that repeats itself is likely.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import small_models
from etils import epath
from recording import RESULTS, Recording
from samplers import HELD_OUT, draw, held_out, judge_all, plot, rows, table

import bd3_jax
from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.errors import UserError

# Settings of `config.sampling`: nucleus as published, and the samplers.
SAMPLERS: dict[str, dict[str, Any]] = {
    "AR": dict(nucleus=0.9),
    "BD3-LM B = 4": dict(nucleus=0.9, sampler="first_hitting"),
    "BD3-LM B = 8": dict(nucleus=0.9, sampler="first_hitting"),
    "BD3-LM B = 16": dict(nucleus=0.9, sampler="first_hitting"),
    "MDLM": dict(nucleus=0.9, sampler="ancestral"),
    "SEDD": dict(nucleus=0.99, sampler="analytic"),
}
# Table 7, OpenWebText, L = 1024 and 2048, judged by GPT-2 Large.
PUBLISHED = {
    "AR": (14.1, 13.2),
    "BD3-LM B = 4": (25.7, 23.6),
    "BD3-LM B = 8": (30.4, 28.2),
    "BD3-LM B = 16": (33.4, 31.5),
    "MDLM": (46.8, 41.3),
    "SEDD": (52.0, None),
}


def draw_all(recording: Recording, seed: int, steps: int, runs: epath.Path, count: int) -> None:
    models = small_models.of_seed(seed, steps, runs)
    if not models:
        raise UserError(f"--runs is {str(runs)!r}, which has no models of that seed; train them with likelihood.py")
    for name, (_, place) in models.items():
        model = bd3_jax.load_pretrained(str(place))
        config, length = model.config.to_dict(), model.model.length
        common = {"seed": seed, "steps": steps, "num_samples": count}
        for max_length in (length, 2 * length)[: 1 if name == "SEDD" else 2]:
            settings = SAMPLERS[name] | {"num_steps": length, "max_length": max_length}
            recording.cell(
                {"text": f"{name}, {max_length} tokens", **common, **settings},
                config,
                lambda model=model, settings=settings: draw(model, count, settings),
            )
    recording.cell({"text": HELD_OUT, **common}, config, lambda: held_out(model, count))


def with_published(text: str) -> str:
    lines = [text, "", "Published (table 7: OpenWebText, GPT-2 Large, 300 texts).", ""]
    lines += ["| | 1,024 tokens | 2,048 tokens |", "| --- | ---: | ---: |"]
    for name, values in PUBLISHED.items():
        lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:.1f}' for value in values)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", help="a causal language model that scores what is drawn; else texts are drawn")
    parser.add_argument("--num_samples", type=int, default=64, help="texts of each kind")
    parser.add_argument("--seed", type=int, default=small_models.SEEDS[0], help="of the models' training")
    small_models.add_flags(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "sample_quality")
    own = parser.parse_args(argv)
    runtime.start()
    recording = Recording(own.out)
    try:
        if own.judge:
            judge_all(recording, own.judge)
        else:
            draw_all(recording, own.seed, own.steps, own.runs, own.num_samples)
    finally:
        if found := rows(recording):
            recording.write_table(with_published(table(found)))
            plot(found).savefig(own.out / "sample_quality.png", dpi=150)
    print(with_published(table(found)))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
