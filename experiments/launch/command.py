"""What the launch scripts share: their flags, checks of them, and --dry-run."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence


def parser(usage: str | None) -> argparse.ArgumentParser:
    """With --dry-run; what it does not know goes to `bd3 train`."""
    made = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own flags, and those of `bd3 train`, which must name a config and a workdir. Status 2 otherwise."""
    own, train = made.parse_known_args(argv)
    for name in ("config", "workdir"):
        if not any(re.match(rf"--{name}=.", flag) for flag in train):
            made.error(f"--{name}=... is missing; it goes to bd3 train")
    if wrong := [flag for flag in train if not re.match(r"--\w", flag)]:
        made.error(f"unexpected argument {wrong[0]!r}; flags of bd3 train are --NAME=VALUE")
    return own, train


def value(train: Sequence[str], name: str) -> str:
    """Of a flag of `bd3 train`; empty without it."""
    return next((flag.split("=", 1)[1] for flag in reversed(train) if flag.startswith(f"--{name}=")), "")


def require_bucket(made: argparse.ArgumentParser, train: Sequence[str]) -> None:
    """Hosts that share no disk need a workdir in a bucket."""
    workdir = value(train, "workdir")
    if not workdir.startswith("gs://"):
        made.error(f"--workdir is {workdir!r}; allowed: gs://..., which all hosts can write")


def run(commands: Sequence[Sequence[str]], dry_run: bool) -> int:
    """Runs commands one after another until one fails; prints each before."""
    for command in commands:
        print(shlex.join(command), flush=True)
        if not dry_run and (status := subprocess.run(command, check=False).returncode):
            print(f"ended with status {status}", file=sys.stderr)
            return status
    return 0
