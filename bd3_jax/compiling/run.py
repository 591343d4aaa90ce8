"""`bd3 compile`: each compilation in a process of its own, and the search for the largest batch that fits."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

from etils import epath

from bd3_jax.compiling import targets
from bd3_jax.compiling.advice import changed
from bd3_jax.compiling.report import GROUPS, Report
from bd3_jax.config import Config, ModelConfig
from bd3_jax.errors import UserError
from bd3_jax.folders import writing
from bd3_jax.sharding import mesh_shape


def compile_for(config: Config, topology: str, mode: str, vocab_size: int = 0) -> Report:
    """Compiles the program of `mode` for a machine that is not at hand.

    Raises:
      UserError: settings that do not fit the machine, an unknown machine, or its compiler is not installed.
      RuntimeError: the compiler failed in another way than for want of memory.
    """
    from bd3_jax.compiling.child import MARK

    target = targets.parse(topology)
    needs = targets.NEEDS.get(target.chip.platform)
    if needs and importlib.util.find_spec(needs) is None:
        raise UserError(
            f"--topology={topology} takes the compiler of {needs}, which is not installed; "
            f"run: pip install 'bd3_jax[{target.chip.platform}]'"
        )
    print(f"compiling {mode} for {topology}, {config.to_dict()[GROUPS[mode]]['batch_size']} rows", file=sys.stderr)
    request = {"config": config.to_dict(), "topology": topology, "mode": mode, "vocab_size": vocab_size}
    done = subprocess.run(
        [sys.executable, "-m", "bd3_jax.compiling.child"],
        input=json.dumps(request),
        env=os.environ | target.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"compiling for {topology} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    found = json.loads(lines[-1].removeprefix(MARK))
    if "error" in found:
        raise UserError(found["error"])
    return Report.from_record(found)


def search(
    config: Config, topology: str, mode: str, vocab_size: int = 0, compile_one: Callable[..., Report] = compile_for
) -> Iterator[tuple[str, int, Report]]:
    """(policy, rows a chip, its report) for each rematerialisation policy: the largest power of two that fits.

    "A chip" is here all the chips of `config.mesh.tensor` that share rows. In training it is a power of two for each
    microbatch; without gradients no policy but the settings' own is tried, since it changes nothing. 0 rows and the
    report of the fewest where not even they fit. Compilations begin at the settings' own batch and go up or down from
    there.
    """
    data, fsdp, _ = mesh_shape(config.mesh, targets.parse(topology).size)
    shards = data * fsdp
    fewest = config.training.microbatches if mode == "train" else 1
    own = config.to_dict()[GROUPS[mode]]["batch_size"]
    begin = fewest << max(0, (own // (shards * fewest)).bit_length() - 1)
    for policy in policies() if mode == "train" else (config.model.remat,):
        rows, best = begin, None
        found = compile_one(_with(config, mode, policy, rows * shards), topology, mode, vocab_size)
        while found.fits:
            best = rows, found
            try:
                larger = _with(config, mode, policy, 2 * rows * shards)
            except UserError:  # more tokens than a batch may have
                break
            rows *= 2
            found = compile_one(larger, topology, mode, vocab_size)
        while best is None and rows > fewest:
            rows //= 2
            found = compile_one(_with(config, mode, policy, rows * shards), topology, mode, vocab_size)
            best = (rows, found) if found.fits else None
        yield (policy, *best) if best else (policy, 0, found)


def policies() -> tuple[str, ...]:
    """Of rematerialisation, as `config.model.remat` has them."""
    return get_args(next(field.type for field in dataclasses.fields(ModelConfig) if field.name == "remat"))


def _with(config: Config, mode: str, policy: str, batch_size: int) -> Config:
    """These settings with another batch size and rematerialisation policy."""
    return changed(config, {("model", "remat"): policy, (GROUPS[mode], "batch_size"): batch_size})


def main(config: Config, topology: str, mode: str, vocab_size: int, searching: bool, json_path: str | None) -> bool:
    """Compiles or searches, prints what was found, and returns whether it fits."""
    chip = targets.parse(topology).chip
    records: list[dict[str, Any]] = []
    if searching:
        fits = False
        for policy, rows, report in search(config, topology, mode, vocab_size):
            a_chip = report.rows / report.chips if rows else 0  # a row may be split over several
            verdict = f"{a_chip:g} rows a chip" if rows else f"not even {report.rows} rows in all"
            print(f"=== config.model.remat={policy}: {verdict}\n{report.table(chip)}\n", flush=True)
            records.append({"remat": policy, "rows_per_chip": a_chip, **report.record()})
            fits = fits or rows > 0
    else:
        report = compile_for(config, topology, mode, vocab_size)
        print(report.table(chip))
        records, fits = [report.record()], report.fits
    if json_path:
        path = epath.Path(json_path)
        with writing(path):
            path.write_text(json.dumps(records, indent=1) + "\n")
    return fits
