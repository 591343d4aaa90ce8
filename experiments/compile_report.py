"""Memory, work and communication of the paper's models on chips that are not at hand, from what their compilers say.

    python experiments/compile_report.py --chips=v5e,v5p,v6e --json=experiments/results/compile/tpu.json
    python experiments/compile_report.py --chips=h100 --json=experiments/results/compile/h100.json

TPUs take the extra `tpu`, H100s the extra `cuda`; the settings are those of configs/owt.py. Each cell is compiled in a
process of its own, some minutes each, and is kept in the JSON file, so that an interrupted report goes on; a table is
written beside it (.md). Figures are per chip and step. Nothing was run: the compiler's figures, FLOPs of the matrix
products counted in the program, and times that follow from published peaks are estimates.

--unroll compiles with all layers unrolled, so that the compiler's bytes and time count every layer (slow to compile);
--baseline does so for the yardstick: dense [2L, 2L] attention and whole logits.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bd3_jax import config as settings
from bd3_jax.command_line import exit_status
from bd3_jax.compiling import targets
from bd3_jax.compiling.report import Report, amount
from bd3_jax.compiling.run import compile_for
from bd3_jax.config import Config
from bd3_jax.configs import owt
from bd3_jax.errors import UserError

# The smallest machine of each kind, and one of (up to) 256 chips.
MACHINES = {
    "v5e": ("v5e:2x2", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:4x8x8"),
    "v6e": ("v6e:2x2", "v6e:16x16"),
    "h100": ("h100:1", "h100:8"),
}
MODELS = ("ar", "mdlm", "sedd", "bd3lm,block_size=4", "bd3lm,block_size=8", "bd3lm,block_size=16")


def configure(model: str, size: str, rows: int, topology: str, overrides: dict[str, Any]) -> Config:
    """configs/owt.py with `rows` sequences a chip, and GROUP.NAME: value overrides."""
    config = owt.get_config(f"{model},size={size}")
    for path, value in overrides.items():
        group, _, name = path.partition(".")
        if group not in config or not isinstance(config[group], ConfigDict) or name not in config[group]:
            raise UserError(f"--set={path}: no such setting; allowed: GROUP.NAME=VALUE as in configs/base.py")
        config[group][name] = value
    config.training.batch_size = rows * targets.parse(topology).size // config.mesh.tensor
    return settings.from_config_dict(config)


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What to compile; a cell is recognised again by these values."""
    own = dict(pair.split("=", 1) for pair in options.set)
    overrides: dict[str, Any] = {path: _literal(value) for path, value in own.items()}
    if options.baseline:
        overrides |= {"model.attention": "dense", "model.max_logits": 2**31 - 1}
    machines = options.topologies or [topology for chip in options.chips for topology in MACHINES[chip]]
    found = []
    for topology, size, model in itertools.product(machines, options.sizes, options.models):
        unrolled = {"model.scan_unroll": owt.SIZES[size][1]} if options.unroll or options.baseline else {}
        cell = dict(topology=topology, size=size, model=model, rows_per_chip=options.rows)
        found.append(cell | {"overrides": overrides | unrolled})
    return found


def describe(cell: dict[str, Any]) -> dict[str, Any]:
    """Compiles a cell and adds the report's figures, or the compiler's complaint."""
    config = configure(cell["model"], cell["size"], cell["rows_per_chip"], cell["topology"], cell["overrides"])
    try:
        return cell | {"report": compile_for(config, cell["topology"], "train").record()}
    except RuntimeError as error:
        return cell | {"failure": str(error)[-500:]}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, a row a cell."""
    heads = [
        "machine",
        "size",
        "model",
        "rows a chip",
        "settings",
        "fits",
        "memory",
        "temporaries",
        "TFLOP",
        "GB moved",
    ]
    heads += ["compiler's estimate ms", "sent", "roofline ms", "links' share", "tokens/s a chip at most", "compile s"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for record in records:
        changed = ", ".join(f"{path}={value}" for path, value in record["overrides"].items()) or "-"
        cells = [record["topology"], record["size"], record["model"], str(record["rows_per_chip"]), changed]
        if "failure" in record:
            lines.append(f"| {' | '.join(cells)} | failed: {record['failure'].splitlines()[-1]} |")
            continue
        report = Report.from_record(record["report"])
        times = report.roofline(targets.parse(record["topology"]).chip)
        bound = max((seconds for seconds in times.values() if not math.isnan(seconds)), default=math.nan)
        moved, estimate = report.compiler_bytes, report.compiler_seconds
        cells += ["yes" if report.fits else "no", "-" if report.needed is None else amount(report.needed)]
        cells += [amount(report.memory["temporaries"]) if report.fits else "-", f"{report.program_flops / 1e12:.2f}"]
        cells += ["-" if moved is None else f"{moved / 1e9:.1f}", "-" if estimate is None else f"{1e3 * estimate:.1f}"]
        cells += [amount(report.traffic), f"{1e3 * bound:.1f}", f"{times['links'] / bound:.0%}"]
        cells += [f"{record['rows_per_chip'] * 1024 / bound:,.0f}", f"{report.compile_seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = lambda text: text.split(";" if ";" in text or "block_size" in text else ",")
    parser.add_argument("--chips", type=several, default=["v5e", "v5p", "v6e"], help=f"of {', '.join(MACHINES)}")
    parser.add_argument("--topologies", type=several, default=None, help="in place of each chip's two machines")
    parser.add_argument("--sizes", type=several, default=["small", "medium"])
    parser.add_argument("--models", type=several, default=list(MODELS), help="config strings, ';' between them")
    parser.add_argument("--rows", type=int, default=4, help="sequences a chip")
    parser.add_argument("--set", action="append", default=[], metavar="GROUP.NAME=VALUE")
    parser.add_argument("--unroll", action="store_true")
    parser.add_argument("--baseline", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    if unknown := set(options.chips) - set(MACHINES):
        raise UserError(f"--chips has {', '.join(sorted(unknown))}; allowed: {', '.join(MACHINES)}")

    records = json.loads(options.json.read_text()) if options.json.exists() else []
    done = [{name: value for name, value in record.items() if name not in ("report", "failure")} for record in records]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(options):
        if cell in done:
            continue
        print(f"compiling {cell}", flush=True)
        records.append(describe(cell))
        options.json.write_text(json.dumps(records, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(table(records) + "\n")
    print(table(records))


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
