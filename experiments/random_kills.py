"""A run that is killed outright (SIGKILL) at random moments ends as one that was not.

    python experiments/random_kills.py --kills=30

Saves every third step of a tiny model, so that many kills fall into a save; two of three come within a second of a new
checkpoint, the third anywhere between the start of the process and then. After each, every checkpoint that is there
must be readable, and no step before the last save lost. In the end every record and every parameter must be those of a
run without a break. About four minutes on two cores; exit status 1 where something does not hold.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl.flags import FlagValues
from etils import epath
from recording import RESULTS, Recording
from tqdm import tqdm

from bd3_jax import command_line
from bd3_jax.checkpoints.orbax import latest_step, restore_params, steps
from bd3_jax.config import Config
from bd3_jax.data.prepare import prepare
from bd3_jax.errors import UserError
from bd3_jax.metrics import read_metrics

EVERY = 3
SETTINGS = {
    "model.length": 16, "model.width": 32, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8,
    "data.directory": "data/random_kills", "training.log_every": 1, "training.eval_every": 50,
    "training.checkpoint_every": EVERY, "training.microbatches": 2, "eval.num_batches": 1,
    "optimizer.decay": "constant", "search.enabled": True, "search.num_batches": 1, "search.widths": "(0.9,)",
}  # fmt: skip
FOREVER = 1_000_000  # steps


def flags(num_steps: int) -> list[str]:
    settings = SETTINGS | {"training.num_steps": num_steps}
    return [
        "--config=configs/quickstart.py:bd3lm,block_size=4",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def start(workdir: epath.Path, num_steps: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bd3_jax.cli", "train", f"--workdir={workdir}", *flags(num_steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_once(config: Config, workdir: epath.Path, number: int) -> dict[str, object]:
    """Starts or continues the run, kills it, and looks at what is left."""
    draw, before, unfinished = random.Random(number), latest_step(workdir) or 0, partial_saves(workdir)
    began, process = time.monotonic(), start(workdir, FOREVER)
    # Every third kill may come while the process starts, restores, compiles or validates.
    moment = began + draw.uniform(0, 15) if number % 3 == 0 else None
    try:
        while process.poll() is None and (latest_step(workdir) or 0) <= before:
            if moment and time.monotonic() > moment:
                break
            time.sleep(0.02)
        else:
            time.sleep(draw.uniform(0, 1))
        alive, seconds = process.poll() is None, time.monotonic() - began
    finally:
        process.kill()
        _, errors = process.communicate()
    if not alive:
        raise RuntimeError(f"the run ended by itself: {errors.decode()[-2000:]}")
    found, newest = steps(workdir), latest_step(workdir) or 0
    for step in found:
        restore_params(config, workdir, "raw", step=step)
    last = max((record["step"] for record in read_metrics(workdir)), default=0)
    return {
        "seconds_alive": round(seconds, 2),
        "checkpoint_before": before,
        "checkpoint_after": newest,
        "readable": len(found),
        "last_record": last,
        "within_save": bool(partial_saves(workdir) - unfinished),
        # A save is written while the next steps are done, and the next save waits for it.
        "holds": newest >= before and last - newest <= 2 * EVERY,
    }


def partial_saves(workdir: epath.Path) -> set[str]:
    """Names of the folders that saves did not finish; the next process removes them."""
    folder = workdir / "checkpoints"
    return {path.name for path in folder.iterdir() if not path.name.isdigit()} if folder.exists() else set()


def compare(config: Config, folder: epath.Path) -> dict[str, object]:
    """Both runs to the same step: the killed one, and one without a break."""
    final = (latest_step(folder / "killed") or 0) + 2 * EVERY
    names = ("killed", f"whole-{final}")
    for name in names:
        process = start(folder / name, final)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the run {name} did not end well: {errors.decode()[-2000:]}")
    ours, theirs = (restore_params(config, folder / name, "raw")[0] for name in names)
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), ours, theirs)
    records = [timeless(folder / name) for name in names]
    return {
        "steps": final,
        "records": len(records[0]),
        "records_equal": records[0] == records[1],
        "parameters_equal": all(jax.tree.leaves(equal)),
    }


def timeless(workdir: epath.Path) -> list[dict[str, object]]:
    """Records without what depends on the speed."""
    records = read_metrics(workdir)
    return [{k: v for k, v in record.items() if not k.endswith(("per_second", "seconds"))} for record in records]


def table(kills: list[dict], end: dict | None) -> str:
    heads = ["kill", "after s", "newest checkpoint before", "after", "all readable", "last record", "within a save"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for number, kill in enumerate(kills, start=1):
        cells = [number, kill["seconds_alive"], kill["checkpoint_before"], kill["checkpoint_after"], kill["readable"]]
        cells += [kill["last_record"], "yes" if kill["within_save"] else ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    within = sum(kill["within_save"] for kill in kills)
    early = sum(kill["checkpoint_after"] == kill["checkpoint_before"] for kill in kills)
    lost = max(kill["last_record"] - kill["checkpoint_after"] for kill in kills)
    lines += ["", f"{len(kills)} kills, {within} within a save, {early} before the first save of their process."]
    lines += [f"At most {lost} recorded steps had to be done again; saves are {EVERY} steps apart."]
    if end:
        same = {True: "the same", False: "NOT the same"}
        lines += [f"After {end['steps']} steps, beside a run without a break: {end['records']} records"]
        lines[-1] += f" are {same[end['records_equal']]}; parameters, to the last bit, {same[end['parameters_equal']]}."
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workdir", default="runs/random_kills")
    parser.add_argument("--out", type=Path, default=RESULTS / "random_kills")
    own = parser.parse_args(argv)
    if own.kills < 1:
        raise UserError(f"--kills is {own.kills}; allowed: 1 or more")
    folder, recording, kills = epath.Path(own.workdir), Recording(own.out), []
    config = command_line.parse(flags(FOREVER), FlagValues(), "")
    prepare(config.data, config.model.length)
    for number in tqdm(range(1, own.kills + 1), "kills", disable=None):
        cell = {"kill": number}
        kill = lambda number=number: kill_once(config, folder / "killed", number)
        kills.append(recording.cell(cell, config.to_dict(), kill))
    end = recording.cell({"kills": own.kills}, config.to_dict(), lambda: compare(config, folder))
    recording.write_table(table(kills, end))
    if not (all(kill["holds"] for kill in kills) and end["records_equal"] and end["parameters_equal"]):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(command_line.exit_status(lambda: main(sys.argv[1:])))
