"""A run that is killed outright (SIGKILL) at random moments ends as one that was not.

python experiments/random_kills.py --kills=30 > experiments/results/random_kills.md

Saves every third step of a tiny model, so that many kills fall into a save. After each the newest checkpoint must be
readable, and no step before it lost. In the end every record and every parameter must be those of a run without a
break.
"""

import argparse
import random
import subprocess
import sys
import time

import jax
import numpy as np
from absl.flags import FlagValues
from etils import epath

from bd3_jax import command_line
from bd3_jax.checkpoints.orbax import latest_step, restore_params, steps
from bd3_jax.data.prepare import prepare
from bd3_jax.metrics import read_metrics

EVERY = 3
CONFIG = "configs/quickstart.py:bd3lm,block_size=4"


def flags(num_steps: int) -> list[str]:
    settings = {
        "model.length": 16, "model.width": 32, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8,
        "data.directory": "data/random_kills", "training.num_steps": num_steps, "training.log_every": 1,
        "training.eval_every": 50, "training.checkpoint_every": EVERY, "training.microbatches": 2,
        "eval.num_batches": 1, "optimizer.decay": "constant",
        "search.enabled": True, "search.num_batches": 1, "search.widths": "(0.9,)",
    }  # fmt: skip
    return [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in settings.items())]


def start(workdir: epath.Path, num_steps: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bd3_jax.cli", "train", f"--workdir={workdir}", *flags(num_steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def comparable(workdir: epath.Path) -> list[dict[str, object]]:
    """Records without what depends on the speed."""
    records = [dict(record) for record in read_metrics(workdir)]
    return [{k: v for k, v in record.items() if not k.endswith(("per_second", "seconds"))} for record in records]


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--kills", type=int, default=30)
    made.add_argument("--steps", type=int, default=3000)
    made.add_argument("--workdir", default="runs/random_kills")
    own = made.parse_args()
    folder, draw = epath.Path(own.workdir), random.Random(0)
    config = command_line.parse(flags(own.steps), FlagValues(), "")
    prepare(config.data, config.model.length)

    began, killed, within_save = time.monotonic(), folder / "killed", 0
    print("# Killed at random moments\n\n| kill | newest checkpoint before | last record | temporary folders left |")
    print("| --- | --- | --- | --- |", flush=True)
    for kill in range(1, own.kills + 1):
        before = latest_step(killed) or 0
        process = start(killed, own.steps)
        while process.poll() is None and (latest_step(killed) or 0) <= before:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1))
        if process.poll() is not None:
            print(f"ended by itself with status {process.returncode} before kill {kill}", file=sys.stderr)
            return 1
        process.kill()
        process.wait()
        newest = latest_step(killed)
        assert newest is not None
        assert newest >= before
        restore_params(config, killed, "raw")
        left = sum(path.name not in map(str, steps(killed)) for path in (killed / "checkpoints").iterdir())
        within_save += left > 0
        last = max(record["step"] for record in read_metrics(killed))
        assert last - newest <= 2 * EVERY, (last, newest)
        print(f"| {kill} | {newest} | {last} | {left} |", flush=True)
    final = newest + 2 * EVERY
    for name in ("killed", "whole"):
        if start(folder / name, final).wait():
            print(f"the run {name} did not end well", file=sys.stderr)
            return 1
    same = comparable(killed) == comparable(folder / "whole")
    ours, theirs = (restore_params(config, folder / name, "raw")[0] for name in ("killed", "whole"))
    equal = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), ours, theirs)
    same_params = all(jax.tree.leaves(equal))
    print(f"\n{own.kills} kills, {within_save} of them within a save; {final} steps. Records are the same as without a")
    print(f"break: {'yes' if same else 'NO'}; parameters, to the last bit: {'yes' if same_params else 'NO'}.")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes.")
    return 0 if same and same_params else 1


if __name__ == "__main__":
    sys.exit(main())
