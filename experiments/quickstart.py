"""The whole path in a few minutes on two CPU cores: text, rows, training, likelihood, generated passages, a report.

It runs the commands that a user would, and prints each before it runs. Run again, it finds what is finished and goes on
from there. `make quickstart` calls it; settings after the name go to every command that takes some, as in

    python experiments/quickstart.py --config.training.num_steps=4000
"""

import signal
import subprocess
import sys
import textwrap
import time

from etils import epath

from bd3_jax.evaluation.report import comparable, series
from bd3_jax.metrics import read_all, read_records

CONFIG = "configs/quickstart.py:bd3lm,block_size=8"
WORKDIR = epath.Path("runs/quickstart")


def main(overrides: list[str]) -> int:
    started = time.monotonic()
    of_run = [f"--config={CONFIG}", f"--workdir={WORKDIR}", *overrides]
    commands = [
        ("prepare", [f"--config={CONFIG}", *overrides]),
        ("train", of_run),
        ("eval", of_run),
        ("sample", of_run),
        ("report", [str(WORKDIR)]),
    ]
    for verb, args in commands:
        print(f"\n$ bd3 {' '.join([verb, *args])}", flush=True)
        status = run([sys.executable, "-m", "bd3_jax.cli", verb, *args])
        if status:
            # Status 2 is a mistake that is to be mended first.
            again = "" if status == 2 else " Run `make quickstart` again to go on from here."
            print(f"\nbd3 {verb} ended with status {status}.{again}", file=sys.stderr)
            return status
    print(summary(time.monotonic() - started))
    return 0


def run(command: list[str]) -> int:
    """Runs a command to its end, also after SIGTERM and Ctrl-C, which it gets too: it saves before it stops."""
    with subprocess.Popen(command) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def summary(seconds: float) -> str:
    perplexity = series(comparable(read_all(WORKDIR)), "eval/perplexity")
    (first_step, before), (last_step, after) = perplexity[0], perplexity[-1]
    passages = [sample["text"] for sample in read_records(WORKDIR / "samples.jsonl")[-3:]]
    lines = [
        "",
        f"Done in {seconds / 60:.1f} minutes (this time; what was finished before is kept).",
        f"Validation perplexity: {before:,.0f} at step {first_step}, {after:,.1f} at step {last_step}.",
        "",
        "Generated:",
        *(
            textwrap.fill(" ".join(text.split()), 110, initial_indent="  * ", subsequent_indent="    ")
            for text in passages
        ),
        "",
        f"Checkpoint  {WORKDIR / 'checkpoints'}",
        f"Metrics     {WORKDIR / 'metrics.jsonl'}, TensorBoard in {WORKDIR / 'tensorboard'}",
        f"Samples     {WORKDIR / 'samples.jsonl'}",
        f"Report      {WORKDIR / 'report.html'}",
        "",
        "Next:",
        f"  more text      .venv/bin/bd3 sample --workdir={WORKDIR} --config.sampling.prompt='The city of'",
        f"  train on       .venv/bin/bd3 train --workdir={WORKDIR} --config.training.num_steps={2 * int(last_step)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
