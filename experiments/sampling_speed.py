"""Tokens a second of BD3-LM and AR with a cache, by batch and context: when block diffusion pays.

    python experiments/sampling_speed.py [--batches=1,16,64] [--lengths=64,512,2048]

Random weights, 'tiny' size (256 wide, 8 layers, 8 heads), GPT-2's vocabulary, nucleus 0.9. Caches have fixed shapes, so
a call costs the same wherever in the text it is: after a device call of some tokens to warm up, the best of a few is
taken. About six minutes on two cores; goes on where it was interrupted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import Config
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import base
from bd3_jax.language_model import LanguageModel
from bd3_jax.sampling.drawing import Slots
from bd3_jax.sampling.sampler import Sampler
from bd3_jax.special_ids import SpecialIds

# Name -> config string, settings of `config.sampling`.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "AR": ("ar", {}),
    "BD3-LM, B = 16, first-hitting": ("bd3lm,block_size=16", {}),
    "BD3-LM, B = 16, the 4 likeliest a call": (
        "bd3lm,block_size=16",
        dict(sampler="confidence", tokens_per_step=4),
    ),
}
SECONDS, REPEATS = 4.0, 5
"""A cell is measured for so long or so often, whichever is reached first."""


def configure(string: str, settings: dict[str, Any], length: int) -> Config:
    config = base.get_config(string)
    config.model.update(length=length, width=256, num_layers=8, num_heads=8, cond_dim=64)
    config.sampling.update(max_length=length * 100, min_entropy=0.0, **settings)
    return from_config_dict(config)


def measure(config: Config, batch: int) -> dict[str, float]:
    """Network calls of a sequence for each of its tokens, and tokens a second of the whole batch."""
    model = LanguageModel.from_config(config, SpecialIds(bos=50256, eos=50256, mask=50257, vocab_size=50258))
    params = jax.jit(model.network.init)(jax.random.key(0))
    sampler = Sampler.from_config(model, config.sampling)
    slots = Slots(sampler, params, sampler.canvas([[]])[0], batch)
    slots.begin({slot: slots.new(slot) for slot in range(batch)})
    slots.step()
    best, calls, spent = 0.0, 0.0, 0.0
    for _ in range(REPEATS):
        tokens, nfe = _progress(slots)
        began = time.perf_counter()
        slots.step()
        seconds = time.perf_counter() - began
        new_tokens, new_nfe = (after - before for after, before in zip(_progress(slots), (tokens, nfe), strict=True))
        calls, best, spent = new_nfe / new_tokens, max(best, new_tokens / seconds), spent + seconds
        if spent > SECONDS:
            break
    return {"calls_per_token": calls, "tokens_per_second": best}


def _progress(slots: Slots) -> tuple[int, int]:
    """Tokens and network calls so far, of all samples."""
    drawn = [each for each in slots.drawing if each]
    return sum(each.length for each in drawn), sum(each.nfe for each in drawn)


def table(found: dict[tuple[str, int, int], dict[str, float]]) -> str:
    lines = [
        "| model and sampler | context | batch | network calls a token | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for (case, length, batch), figures in found.items():
        cells = f"{figures['calls_per_token']:.2f} | {figures['tokens_per_second']:,.0f}"
        lines.append(f"| {case} | {length} | {batch} | {cells} |")
    return "\n".join(lines)


def plot(found: dict[tuple[str, int, int], dict[str, float]]) -> Figure:
    """Tokens a second by context, one picture a batch size."""
    batches = sorted({batch for _, _, batch in found})
    figure = Figure(figsize=(4 * len(batches), 4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for case in CASES:
            points = [
                (length, figures["tokens_per_second"])
                for (name, length, size), figures in found.items()
                if (name, size) == (case, batch)
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=case)
        axes.set(title=f"batch {batch}", xlabel="context, tokens", xscale="log", yscale="log")
        lengths = sorted({length for _, length, _ in found})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xticks([], minor=True)
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:,.0f}")
    figure.axes[0].set_ylabel("tokens/s")
    figure.axes[0].legend(fontsize=7)
    return figure


def main(argv: Sequence[str]) -> None:
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64], help="sequences at a time")
    parser.add_argument("--lengths", type=numbers, default=[64, 512, 2048], help="context in tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling_speed")
    own = parser.parse_args(argv)
    runtime.start()
    recording, found = Recording(own.out), {}
    for length in own.lengths:
        for batch in own.batches:
            for case, (string, settings) in CASES.items():
                config = configure(string, settings, length)
                found[case, length, batch] = recording.cell(
                    {"case": case, "context": length, "batch": batch},
                    config.to_dict(),
                    lambda config=config, batch=batch: measure(config, batch),
                )
            recording.write_table(table(found))
            plot(found).savefig(own.out / "sampling_speed.png", dpi=150)
    print(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
