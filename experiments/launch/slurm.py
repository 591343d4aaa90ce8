r"""Trains on GPU nodes under Slurm, one process a GPU; they find each other by Slurm's own environment.

python experiments/launch/slurm.py --nodes=2 --gpus=8 --time=24:00:00 \
    --config=configs/lm1b.py:mdlm --workdir=/shared/runs/lm1b-mdlm

The workdir lies where all nodes see it. Two minutes before its time is over the job is told, saves and is queued again.
--check first compiles the config for h100:16, or all GPUs together, as if they were of one NVLink domain; where it does
not fit, nothing is queued.
"""

import re
import shlex
import sys
from collections.abc import Sequence

import command

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
{partition}
# Since Slurm 22.05 srun does not take the number of CPUs from above.
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 {train}
status=$?
[ $status -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status
"""


def main(argv: Sequence[str]) -> int:
    made = command.parser(__doc__)
    made.add_argument("--nodes", type=int, required=True)
    made.add_argument("--gpus", type=int, required=True, help="of a node")
    made.add_argument("--cpus", type=int, default=8, help="of a GPU")
    made.add_argument("--time", default="24:00:00", help="limit of the job, as Slurm writes it")
    made.add_argument("--partition", default="")
    made.add_argument("--name", default="bd3")
    own, train = command.parse(made, argv)
    for name in ("nodes", "gpus", "cpus"):
        if getattr(own, name) < 1:
            made.error(f"--{name} is {getattr(own, name)}; allowed: 1 or more")
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", own.time):
        made.error(f"--time is {own.time!r}; allowed: as 90, 24:00:00 or 7-00:00:00")
    if not re.fullmatch(r"[\w.-]+", own.name) or not re.fullmatch(r"[\w.,-]*", own.partition):
        made.error("--name and --partition are words")
    check = command.check(made, own, train, f"h100:{own.nodes * own.gpus}")
    if status := command.run(check, own.dry_run):
        return status
    text = SCRIPT.format(
        name=own.name, nodes=own.nodes, gpus=own.gpus, cpus=own.cpus, time=own.time,
        partition=f"#SBATCH --partition={own.partition}\n" if own.partition else "",
        train=shlex.join([sys.executable, "-m", "bd3_jax.cli", "train", *train]),
    )  # fmt: skip
    print(text, end="", flush=True)
    return 0 if own.dry_run else command.execute(["sbatch"], input=text, text=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
