"""Trains in several processes on this machine, which find each other over loopback: to try out what a pod does.

python experiments/launch/local.py --processes=2 --config=configs/quickstart.py:bd3lm,block_size=8 --workdir=runs/two
python experiments/launch/local.py --processes=2 --mode=sample --workdir=runs/two   # or --mode=eval

On a CPU they speak through gloo. Ends with the highest status of the processes. --check first compiles the config for
cpu:2, or as many as --processes says; where it does not fit, nothing is started.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

import command


def start(
    processes: int, flags: Sequence[str], output: Sequence[IO[str] | None], mode: str = "train"
) -> list[subprocess.Popen[str]]:
    """Starts `bd3 MODE` with these flags so many times, each with its number and the address of the first."""
    coordinator = free_address()
    return [
        subprocess.Popen(
            bd3(mode, flags),
            env=os.environ | environment(coordinator, processes, index),
            stdout=output[index],
            stderr=subprocess.STDOUT if output[index] else None,
            text=True,
        )
        for index in range(processes)
    ]


def bd3(mode: str, flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "bd3_jax.cli", mode, *flags]


def environment(coordinator: str, processes: int, index: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": coordinator,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }


def free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def main(argv: Sequence[str]) -> int:
    made = command.parser(__doc__)
    made.add_argument("--processes", type=int, default=2)
    made.add_argument("--mode", choices=("train", "eval", "sample"), default="train")
    own, flags = command.parse(made, argv)
    if not 1 <= own.processes <= 64:
        made.error(f"--processes is {own.processes}; allowed: 1 to 64")
    if own.check and own.mode != "train":
        made.error("--check is for --mode=train")
    if status := command.run(command.check(made, own, flags, f"cpu:{own.processes}"), own.dry_run):
        return status
    if own.dry_run:
        for index in range(own.processes):
            settings = [
                f"{name}={value}" for name, value in environment("127.0.0.1:PORT", own.processes, index).items()
            ]
            print(" ".join([*settings, shlex.join(bd3(own.mode, flags))]))
        return 0
    running = start(own.processes, flags, [None] * own.processes, own.mode)
    signal.signal(signal.SIGTERM, lambda number, frame: [process.send_signal(number) for process in running])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all of them, and they save first
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
