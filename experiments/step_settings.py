"""Memory and time of a training step by what saves memory: accumulation, rematerialisation, scanned layers, bfloat16.

    python experiments/step_settings.py
    python experiments/step_settings.py --set=model.width=768 --set=training.batch_size=64     # on an accelerator

Each row changes one setting of the first, the last several: BD3-LM, d = 256, 8 layers, L = 256, B = 16, 8 rows,
V = 2,001. Memory is what the compiler plans for the step; temporaries are what of it is neither state nor batch. Times
are medians of a few steps; of ratios, those to steps of the first row, with which every row takes turns. On CPUs, XLA
computes layers that are not scanned (scan_unroll=8, all of them) again as soon as it can, so that rematerialisation
saves nothing; and they compute bfloat16 by converting, so its time says nothing there. About five minutes on two cores,
which should be idle.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import benchmark
from recording import RESULTS, Recording

from bd3_jax.command_line import exit_status
from bd3_jax.config import Config

ROWS = (
    {},
    {"training.microbatches": 2},
    {"training.microbatches": 4},
    {"training.microbatches": 8},
    {"model.remat": "block"},
    {"model.remat": "full"},
    {"model.scan_unroll": 4},
    {"model.scan_unroll": 8},
    {"model.scan_unroll": 8, "model.remat": "block"},
    {"model.scan_unroll": 8, "model.remat": "full"},
    {"model.dtype": "bfloat16"},
    {"training.microbatches": 8, "model.remat": "full"},
)


def compiled(config: Config, vocab_size: int) -> benchmark.Program:
    program = benchmark.ours(config, "train", vocab_size)
    program.run(1)
    return program


kept = functools.lru_cache(maxsize=1)(compiled)  # of the first row


def measure(config: Config, first: Config, vocab_size: int, steps: int) -> dict[str, float | None]:
    """Bytes, seconds, and their ratio to those of the settings `first`."""
    beside = kept(first, vocab_size)
    program = beside if config == first else compiled(config, vocab_size)
    turns = [(benchmark.timed(beside, 1), benchmark.timed(program, 1)) for _ in range(steps)]
    return {
        "memory": program.memory,
        "temporaries": program.temporaries,
        "step_seconds": statistics.median(own for _, own in turns),
        "time_ratio": statistics.median(own / other for other, own in turns),
        "compile_seconds": program.compile_seconds,
        "flops": program.flops,
    }


def table(found: dict[str, dict]) -> str:
    heads = ["changed", "memory MiB", "temporaries MiB", "of the first", "s a step", "of the first", "products TFLOP"]
    heads.append("compiled in s")
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    first = next(iter(found.values()))
    for name, figures in found.items():
        cells = [name, f"{figures['memory'] / 2**20:,.0f}", f"{figures['temporaries'] / 2**20:,.0f}"]
        cells += [f"{figures['temporaries'] / first['temporaries']:.2f}", f"{figures['step_seconds']:.2f}"]
        cells += [f"{figures['time_ratio']:.2f}", f"{figures['flops'] / 1e12:.3f}"]
        cells.append(f"{figures['compile_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--vocab_size", type=int, default=2001)
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.NAME=VALUE", help="in every row")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_settings")
    own = parser.parse_args(argv)
    recording, found, first = Recording(own.out), {}, benchmark.configure("bd3lm", own.set)
    for row in ROWS:
        config = benchmark.configure("bd3lm", [*own.set, *(f"{name}={value}" for name, value in row.items())])
        cell = {"changed": row, "vocab_size": own.vocab_size, "steps": own.steps}
        name = ", ".join(f"{setting}={value}" for setting, value in row.items()) or "none"
        found[name] = recording.cell(
            cell, config.to_dict(), lambda config=config: measure(config, first, own.vocab_size, own.steps)
        )
        recording.write_table(table(found))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
