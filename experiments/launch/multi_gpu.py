"""Trains on the GPUs of this host, all in one process.

python experiments/launch/multi_gpu.py --gpus=8 --fsdp=1 --config=configs/lm1b.py:mdlm --workdir=runs/lm1b-mdlm

--fsdp GPUs split parameters and optimiser, for models that do not fit into one; the rows are split over all. --check
first compiles the config for h100:8, or as many as --gpus says; where it does not fit, nothing is started. Where
CUDA_VISIBLE_DEVICES chooses some of the GPUs, --gpus is their number.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

import command


def main(argv: Sequence[str]) -> int:
    made = command.parser(__doc__)
    made.add_argument("--gpus", type=int, required=True)
    made.add_argument("--fsdp", type=int, default=1)
    own, train = command.parse(made, argv)
    if own.gpus < 1 or own.fsdp < 1 or own.gpus % own.fsdp:
        made.error(f"--gpus is {own.gpus}, --fsdp {own.fsdp}; allowed: 1 or more, and a divisor of --gpus")
    if command.value(train, "config.mesh.data") or command.value(train, "config.mesh.fsdp"):
        made.error("--config.mesh.data and fsdp follow from --gpus and --fsdp")
    if not own.dry_run and (found := count_gpus()) != own.gpus:
        made.error(f"--gpus is {own.gpus}, but there are {found}, by CUDA_VISIBLE_DEVICES, else nvidia-smi -L")
    mesh = ["--config.mesh.data=-1", f"--config.mesh.fsdp={own.fsdp}"]
    check = command.check(made, own, [*train, *mesh], f"h100:{own.gpus}")
    return command.run([*check, [sys.executable, "-m", "bd3_jax.cli", "train", *train, *mesh]], own.dry_run)


def count_gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES chooses, which nvidia-smi does not heed; without it, all."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return sum(name.strip() not in ("", "-1") for name in chosen.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
