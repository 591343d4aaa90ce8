r"""Trains on TPU slices of a GKE cluster, as an xpk workload.

python experiments/launch/gke.py --cluster=NAME --zone=ZONE --project=PROJECT --tpu-type=v5litepod-16 --image=IMAGE \
    --config=configs/lm1b.py:mdlm --workdir=gs://BUCKET/lm1b-mdlm --config.data.directory=gs://BUCKET/lm1b

IMAGE holds bd3_jax, installed with the extras tpu and gcs. Of several slices (--slices), each has whole copies of the
parameters: config.mesh.data is a multiple of their number. Preempted, a workload restarts --restarts times by itself,
since bd3 train ends with status 143.

--check first compiles the config for a slice, here v5e:4x4, which is what configs/lm1b.py is made for; where it does
not fit, nothing is started. That takes the extra tpu on this machine.
"""

import re
import shlex
import sys
from collections.abc import Sequence

import command


def main(argv: Sequence[str]) -> int:
    made = command.parser(__doc__)
    for name in ("cluster", "zone", "project", "image"):
        made.add_argument(f"--{name}", required=True)
    made.add_argument("--tpu-type", required=True, help="as in v5litepod-16, v5p-8, v6e-16")
    made.add_argument("--slices", type=int, default=1)
    made.add_argument("--restarts", type=int, default=100)
    made.add_argument("--name", default="bd3", help="of the workload")
    own, train = command.parse(made, argv)
    command.require_bucket(made, train)
    if not re.fullmatch(r"(v4|v5litepod|v5p|v6e)-[1-9]\d*", own.tpu_type):
        made.error(f"--tpu-type is {own.tpu_type!r}; allowed: v4, v5litepod, v5p or v6e, each with -CHIPS")
    if own.slices < 1 or own.restarts < 0:
        made.error(f"--slices is {own.slices}, --restarts {own.restarts}; allowed: 1 or more, 0 or more")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", own.name):
        made.error(f"--name is {own.name!r}; allowed: small letters, digits and -, up to 39, a letter first")
    if command.value(train, "config.training.sigterm_status") == "0":
        made.error("--config.training.sigterm_status=0 would tell Kubernetes that a preempted run is done")
    workload = [
        "xpk", "workload", "create",
        f"--cluster={own.cluster}", f"--workload={own.name}", f"--zone={own.zone}", f"--project={own.project}",
        f"--tpu-type={own.tpu_type}", f"--num-slices={own.slices}", f"--max-restarts={own.restarts}",
        f"--docker-image={own.image}", f"--command=bd3 train {shlex.join(train)}",
    ]  # fmt: skip
    topology = command.TOPOLOGIES.get(own.tpu_type)
    if topology and own.slices > 1:
        topology = f"{own.slices}x{topology}"
    check = command.check(made, own, train, topology)
    return command.run([*check, workload], own.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
