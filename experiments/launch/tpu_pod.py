r"""Trains on a slice of Cloud TPU: the same command on all its workers, which find each other.

python experiments/launch/tpu_pod.py --tpu=NAME --zone=ZONE --create=v5litepod-16 --install \
    --config=configs/lm1b.py:mdlm --workdir=gs://BUCKET/lm1b-mdlm --config.data.directory=gs://BUCKET/lm1b

--create makes the slice first, as a spot one with --spot. --install copies the last commit to every worker and installs
it, with a Python of its own. Without both, the slice is there and ready.

A preempted slice does not come back. --create deletes one of that name that was preempted and makes it again, so the
run goes on when the same command, with --create and --install, is run again.

--check first compiles the config for the slice that --create names, here v5e:4x4, which is what configs/lm1b.py is made
for; where it does not fit, nothing is started. That takes the extra tpu on this machine.
"""

import re
import shlex
import sys
from collections.abc import Sequence

import command

# Accelerator types -> version of the machines' software.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
ARCHIVE = "bd3_jax.tar.gz"
# The machines have Python 3.10, and bd3_jax asks for 3.11, which uv brings.
INSTALL = (
    f"tar xzf {ARCHIVE} && cd bd3_jax && python3 -m pip install -q --upgrade uv && "
    "python3 -m uv venv -q --clear --python 3.11 .venv && "
    "python3 -m uv pip install -q --python .venv/bin/python -e '.[tpu,gcs]'"
)


def main(argv: Sequence[str]) -> int:
    made = command.parser(__doc__)
    made.add_argument("--tpu", required=True, help="name of the slice")
    made.add_argument("--zone", required=True)
    made.add_argument("--project", default="")
    made.add_argument("--create", default="", metavar="TYPE", help=f"{', '.join(RUNTIMES)}, each with -CHIPS")
    made.add_argument("--spot", action="store_true")
    made.add_argument("--install", action="store_true")
    own, train = command.parse(made, argv)
    command.require_bucket(made, train)
    kind = re.fullmatch(r"(\w+)-[1-9]\d*", own.create)
    if own.create and (not kind or kind[1] not in RUNTIMES):
        made.error(f"--create is {own.create!r}; allowed: {', '.join(f'{name}-CHIPS' for name in RUNTIMES)}")
    if own.spot and not own.create:
        made.error("--spot is for --create")

    place = [own.tpu, f"--zone={own.zone}", *([f"--project={own.project}"] if own.project else [])]
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]

    def everywhere(text: str) -> list[str]:
        return [*tpu, "ssh", *place, "--worker=all", f"--command={text}"]

    commands = command.check(made, own, train, command.TOPOLOGIES.get(own.create))
    if kind:
        version = f"--version={RUNTIMES[kind[1]]}"
        spot = ["--spot"] if own.spot else []
        state = shlex.join([*tpu, "describe", *place, "--format=value(state)"])
        delete = shlex.join([*tpu, "delete", *place, "--quiet"])
        commands.append(["bash", "-c", f'case "$({state} 2>/dev/null)" in PREEMPTED) {delete} ;; esac'])
        commands.append([*tpu, "create", *place, f"--accelerator-type={own.create}", version, *spot])
    if own.install:
        commands.append(["git", "archive", "--prefix=bd3_jax/", f"--output={ARCHIVE}", "HEAD"])
        commands.append([*tpu, "scp", ARCHIVE, f"{own.tpu}:", *place[1:], "--worker=all"])
        commands.append(everywhere(INSTALL))
    commands.append(everywhere(f"cd bd3_jax && .venv/bin/bd3 train {shlex.join(train)}"))
    return command.run(commands, own.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
