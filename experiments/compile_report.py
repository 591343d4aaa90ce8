"""Memory, work and communication of the paper's models on chips that are not at hand, from what their compilers say.

    python experiments/compile_report.py                        # every recipe, for the machine that it names
    python experiments/compile_report.py --configs='configs/text8.py:ar;configs/lm1b.py:mdlm'
    python experiments/compile_report.py --chips=v5e,v5p,v6e    # configs/owt.py, small and medium, 4 rows a chip
    python experiments/compile_report.py --chips=h100
    python experiments/compile_report.py --mode=eval    # or sample; without it, training
    python experiments/compile_report.py --configs=configs/lm1b.py:mdlm --topology=2xv5e:4x4    # two slices

TPUs take the extra `tpu`, H100s the extra `cuda`. Each cell is compiled in a process of its own, some minutes each, and
is kept in OUT/results.json, so that an interrupted report goes on (one that failed is not tried again: remove it
there); OUT/table.md shows all. Exit status 1 where a recipe does not fit its machine. H100s are the one and the eight
of a machine: the links between machines are whatever the buyer chose.

--baseline compiles the yardstick: dense [2L, 2L] attention and whole logits. Further --config.GROUP.NAME=VALUE hold for
every cell.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl.flags import FlagValues
from recording import RESULTS, Recording

from bd3_jax import command_line
from bd3_jax.compiling import targets
from bd3_jax.compiling.report import GROUPS, Report, amount
from bd3_jax.compiling.run import compile_for
from bd3_jax.config import Config
from bd3_jax.configs import lm1b, owt, text8
from bd3_jax.errors import UserError

RECIPES = {"configs/owt.py": owt, "configs/lm1b.py": lm1b, "configs/text8.py": text8}
MODELS = ("ar", "mdlm", "sedd", "bd3lm,block_size=4", "bd3lm,block_size=8", "bd3lm,block_size=16")
# Of --chips: the smallest machine of each kind, and one of (up to) 256 chips.
MACHINES = {
    "v5e": ("v5e:2x2", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:4x8x8"),
    "v6e": ("v6e:2x2", "v6e:16x16"),
    "h100": ("h100:1", "h100:8"),
}
SIZES = ("small", "medium")
ROWS = 4  # sequences a chip


CAPTION = """\
Per chip and step; of sample, the next blocks of a batch. Nothing was run. Memory is what the compiler plans; TFLOP are
the matrix products of the program, and GB of HBM what its operations read and write, with every token masked, which is
the most. Estimates: cycles, which the TPU compiler has of its fusions and not of kernels; the roofline, the longest of
the times that products, HBM and links take at their published peaks; and the tokens/s that follow."""


class Cell(NamedTuple):
    """What to compile: a program of FILE:STRING, for a machine, with flags as `bd3 train` takes them."""

    config: str
    mode: str
    topology: str
    flags: list[str]

    def settings(self) -> Config:
        return command_line.parse([f"--config={self.config}", *self.flags], FlagValues(), "")


def cells(options: argparse.Namespace, flags: list[str]) -> list[Cell]:
    if options.chips:
        machines = [topology for chip in options.chips for topology in MACHINES[chip]]
        models = [f"configs/owt.py:{model},size={size}" for size in SIZES for model in MODELS]
        found = [Cell(model, options.mode, topology, flags) for topology, model in itertools.product(machines, models)]
        batch = f"{GROUPS[options.mode]}.batch_size"
        found = [with_flag(cell, batch, ROWS * targets.parse(cell.topology).size) for cell in found]
    else:
        strings = options.configs or [f"{file}:{model}" for file in RECIPES for model in (*MODELS, _pretraining(file))]
        found = [Cell(string, options.mode, options.topology or _named(string), flags) for string in strings]
    if options.baseline:
        found = [with_flag(cell, "model.attention", "dense") for cell in found]
        found = [with_flag(cell, "model.max_logits", 2**31 - 1) for cell in found]
    return found


def with_flag(cell: Cell, name: str, value: object) -> Cell:
    return cell._replace(flags=[*cell.flags, f"--config.{name}={value}"])


def _pretraining(file: str) -> str:
    """Of a BD3-LM: rows of one block."""
    return f"bd3lm,block_size={RECIPES[file].get_config().model.length}"


def _named(string: str) -> str:
    file = string.split(":")[0]
    if file not in RECIPES:
        raise UserError(f"--configs has {file}, which names no machine; allowed: {', '.join(RECIPES)}, or --topology")
    return RECIPES[file].TOPOLOGY


def describe(config: Config, cell: Cell) -> dict[str, Any]:
    """The report's figures, or the compiler's complaint."""
    try:
        return {"report": compile_for(config, cell.topology, cell.mode).record()}
    except RuntimeError as error:
        return {"failure": str(error)[-500:]}


def fits(figures: dict[str, Any]) -> bool:
    return "report" in figures and figures["report"]["fits"]


def table(recorded: list[dict[str, Any]]) -> str:
    """Markdown, a row a cell."""
    heads = ["config", "program", "machine", "rows a chip", "flags", "fits", "memory", "temporaries"]
    heads += ["TFLOP", "GB of HBM", "M cycles", "sent", "roofline ms", "links' share", "tokens/s a chip, all masked"]
    heads += ["compile s"]
    lines = [CAPTION, "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for cell in recorded:
        asked, figures = cell["settings"], cell["figures"]
        batch = cell["config"][GROUPS[asked["mode"]]]["batch_size"]
        if "report" in figures:
            batch = figures["report"]["rows"]  # samples fill up the chips
        rows = batch / targets.parse(asked["topology"]).size
        cells = [asked["config"], asked["mode"], asked["topology"], f"{rows:g}", " ".join(asked["flags"]) or "-"]
        if "failure" in figures:
            lines.append(f"| {' | '.join(cells)} | failed: {figures['failure'].splitlines()[-1]} |")
            continue
        report = Report.from_record(figures["report"])
        times, moved = report.roofline(targets.parse(report.topology).chip), report.moved_bytes
        bound = max(times.values()) if moved is not None else math.nan  # without traffic of HBM there is no bound
        cells += ["yes" if report.fits else "NO", "-" if report.needed is None else amount(report.needed)]
        cells += [amount(report.memory["temporaries"]) if report.fits else "-", f"{report.program_flops / 1e12:.2f}"]
        cells += [
            "-" if moved is None else f"{moved / 1e9:.1f}",
            f"{report.cycles / 1e6:.1f}" if report.cycles else "-",
        ]
        tokens = rows * cell["config"]["model"]["length"]
        per_second = "-" if report.mode == "sample" else f"{tokens / bound:,.0f}"
        bounds = [f"{1e3 * bound:.1f}", f"{times['links'] / bound:.0%}", per_second]
        cells += [amount(report.traffic), *(["-"] * 3 if moved is None else bounds), f"{report.compile_seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--configs", type=lambda text: text.split(";"), help="FILE:STRING, ';' between them")
    parser.add_argument("--topology", help="in place of the one that each config names")
    parser.add_argument("--chips", type=lambda text: text.split(","), default=[], help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--mode", choices=GROUPS, default="train", help="the program that is compiled")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile")
    options, flags = parser.parse_known_args(argv)
    if unknown := set(options.chips) - set(MACHINES):
        raise UserError(f"--chips has {', '.join(sorted(unknown))}; allowed: {', '.join(MACHINES)}")
    if options.chips and (options.configs or options.topology):
        raise UserError("--chips has configs and machines of its own; allowed: without --configs and --topology")

    recording, asked = Recording(options.out, on_devices=False), cells(options, flags)
    parsed = [cell.settings() for cell in asked]  # so that a mistake is told before anything is compiled
    found = []
    for number, (cell, config) in enumerate(zip(asked, parsed, strict=True), start=1):
        print(f"{number} of {len(asked)}: {cell.mode} of {cell.config} for {cell.topology}", flush=True)
        measure = lambda config=config, cell=cell: describe(config, cell)
        found.append(recording.cell(cell._asdict(), config.to_dict(), measure))
        recording.write_table(table(recording.cells))
    print(table(recording.cells))
    if not options.chips and not all(map(fits, found)):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(command_line.exit_status(lambda: main(sys.argv[1:])))
