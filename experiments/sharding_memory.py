"""Memory of a training step for each of 8 simulated devices, as compiled, by how the mesh splits it.

    python experiments/sharding_memory.py

The recipe of configs/lm1b.py (139 M parameters, float32) with 64 rows, layers scanned as on
accelerators. Nothing of that size is allocated: only shapes are compiled, for the CPU. About two minutes on two cores.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from matplotlib.figure import Figure
from recording import RESULTS, Recording

from bd3_jax.command_line import exit_status
from bd3_jax.compiling.run import compile_for
from bd3_jax.config import Config, MeshConfig
from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import lm1b

DEVICES = 8
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1))
STRING = "bd3lm,block_size=16"


def settings(rows: int) -> Config:
    config = lm1b.get_config(STRING)
    config.training.batch_size = rows
    config.model.scan_unroll = 1
    return from_config_dict(config)


def measure(config: Config) -> dict[str, int]:
    """Bytes of one device."""
    memory = compile_for(config, f"cpu:{DEVICES}", "train").memory
    temporaries = memory["temporaries"]
    return {"state_and_batch": sum(memory.values()) - temporaries, "temporaries": temporaries}


def table(found: dict[str, dict[str, int]], rows: int) -> str:
    lines = [f"`configs/lm1b.py:{STRING}`, {rows} rows, on {DEVICES} simulated devices; MiB a device.", ""]
    lines += ["| data x fsdp x tensor | state and batch | temporaries | together |", "| --- | --- | --- | --- |"]
    for name, memory in found.items():
        values = (*memory.values(), sum(memory.values()))
        lines.append(f"| {name} | {' | '.join(f'{value / 2**20:,.0f}' for value in values)} |")
    return "\n".join(lines)


def plot(found: dict[str, dict[str, int]]) -> Figure:
    """Bars, a mesh each."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, bottom = figure.subplots(), [0.0] * len(found)
    for kind, label in (("state_and_batch", "state and batch"), ("temporaries", "temporaries")):
        sizes = [memory[kind] / 2**20 for memory in found.values()]
        axes.bar(list(found), sizes, bottom=bottom, label=label)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    axes.set(xlabel="data x fsdp x tensor", ylabel="MiB a device")
    axes.legend()
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="of a batch")
    parser.add_argument("--out", type=Path, default=RESULTS / "sharding_memory")
    own = parser.parse_args(argv)
    recording, found = Recording(own.out, on_devices=False), {}
    for shape in MESHES:
        config = dataclasses.replace(settings(own.rows), mesh=MeshConfig(*shape))
        name = "x".join(map(str, shape))
        figures = recording.cell(
            {"mesh": name, "rows": own.rows}, config.to_dict(), lambda config=config: measure(config)
        )
        found[name] = figures
        recording.write_table(table(found, own.rows))
        plot(found).savefig(own.out / "sharding_memory.png", dpi=150)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
