"""Memory and time of block-diffusion attention by length: decomposed beside the plain softmax over [2L, 2L].

    python experiments/attention_length.py

One sequence, 4 heads of width 64, B = 16, both streams, forward and backward. Memory is what the compiler plans beyond
operands and results; a program that would take more than half of this machine's is compiled and not run. About two
and a half minutes on two cores.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from matplotlib.figure import Figure
from recording import RESULTS, Recording

from bd3_jax import runtime
from bd3_jax.command_line import exit_status
from bd3_jax.config import ModelConfig
from bd3_jax.configs import base
from bd3_jax.models import attention
from bd3_jax.models.platform import settle

BACKENDS = ("dense", "decomposed")
HEADS, HEAD_DIM, BLOCK_SIZE = 4, 64, 16


def measure(name: str, length: int, runs: int) -> dict[str, Any]:
    """Temporary bytes; median seconds of a run, or None where it was not run."""
    settled = settle(ModelConfig(**base.get_config().model), jax.default_backend())
    backend = attention.get_backend(name, settled.attention_chunk, length)

    def gradients(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        loss = lambda *args: jnp.square(backend.block_diffusion(*args, BLOCK_SIZE).astype(jnp.float32)).sum()
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    operand = jax.ShapeDtypeStruct((1, HEADS, 2, length, HEAD_DIM), settled.dtype)
    compiled = jax.jit(gradients).lower(operand, operand, operand).compile()
    found = {"temporaries": compiled.memory_analysis().temp_size_in_bytes, "seconds": None}
    if found["temporaries"] < memory() / 2:
        q, k, v = (
            jax.random.normal(key, operand.shape, operand.dtype) for key in jax.random.split(jax.random.key(0), 3)
        )
        times = []
        for _ in range(runs + 1):  # the first warms up
            began = time.perf_counter()
            jax.block_until_ready(compiled(q, k, v))
            times.append(time.perf_counter() - began)
        found["seconds"] = statistics.median(times[1:])
    return found


def memory() -> int:
    """Bytes of the device that computes."""
    stats = jax.devices()[0].memory_stats()  # None on CPU
    return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    lengths = sorted({length for _, length in found})
    lines = ["MiB of temporaries, and seconds, of a forward and backward pass; not run beyond half of the memory.", ""]
    lines += [f"| L | {' | '.join(f'{name} MiB | {name} s' for name in BACKENDS)} |", "|" + " ---: |" * 5]
    for length in lengths:
        cells = []
        for name in BACKENDS:
            figures = found.get((name, length))
            seconds = figures and figures["seconds"]
            cells.append(f"{figures['temporaries'] / 2**20:,.0f}" if figures else "-")
            cells.append("-" if figures is None else "not run" if seconds is None else f"{seconds:.3f}")
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[tuple[str, int], dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in BACKENDS:
        own = sorted((length, figures) for (backend, length), figures in found.items() if backend == name)
        left.plot([n for n, _ in own], [f["temporaries"] / 2**20 for _, f in own], "o-", label=name)
        ran = [(n, f["seconds"]) for n, f in own if f["seconds"] is not None]
        right.plot([n for n, _ in ran], [seconds for _, seconds in ran], "o-", label=name)
    left.axhline(memory() / 2**20, color="gray", linestyle=":", label="this machine")
    left.set(ylabel="MiB of temporaries")
    right.set(ylabel="seconds, forward and backward")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="L")
        axes.legend()
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--lengths", type=numbers, default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_length")
    own = parser.parse_args(argv)
    runtime.start()
    recording, found = Recording(own.out), {}
    for length in own.lengths:
        for name in BACKENDS:
            cell = {"attention": name, "length": length, "block_size": BLOCK_SIZE, "heads": HEADS, "width": HEAD_DIM}
            found[name, length] = recording.cell(
                cell, {}, lambda name=name, length=length: measure(name, length, own.runs)
            )
            recording.write_table(table(found))
    plot(found).savefig(own.out / "attention_length.png", dpi=150)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
