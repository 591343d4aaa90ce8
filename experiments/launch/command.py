"""What the launch scripts share: their flags, checks of them, --check and --dry-run."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Accelerator type -> the shape in which Cloud TPU builds such a slice. v5p counts cores, two to a chip.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
TOPOLOGIES = {
    **{f"v5litepod-{chips}": f"v5e:{shape}" for chips, shape in _FLAT.items()},
    **{f"v6e-{chips}": f"v6e:{shape}" for chips, shape in _FLAT.items()},
    **{f"v5p-{cores}": f"v5p:{shape}" for cores, shape in _CUBES.items()},
}


def parser(usage: str | None) -> argparse.ArgumentParser:
    """With --check and --dry-run; what it does not know goes to `bd3 train`."""
    made = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--check", action="store_true", help="first compile for that machine; go on only if it fits")
    made.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own flags, and those of `bd3 train`, which must name a config and a workdir. Status 2 otherwise.

    A script with a flag --mode may run another verb, which finds its settings in the workdir.
    """
    own, given = made.parse_known_args(argv)
    verb = getattr(own, "mode", "train")
    for name in ("config", "workdir") if verb == "train" else ("workdir",):
        if not any(re.match(rf"--{name}=.", flag) for flag in given):
            made.error(f"--{name}=... is missing; it goes to bd3 {verb}")
    if wrong := [flag for flag in given if not re.match(r"--\w", flag)]:
        made.error(f"unexpected argument {wrong[0]!r}; flags of bd3 {verb} are --NAME=VALUE")
    return own, given


def value(train: Sequence[str], name: str) -> str:
    """Of a flag of `bd3 train`; empty without it."""
    return next((flag.split("=", 1)[1] for flag in reversed(train) if flag.startswith(f"--{name}=")), "")


def require_bucket(made: argparse.ArgumentParser, train: Sequence[str]) -> None:
    """Hosts that share no disk need a workdir in a bucket."""
    workdir = value(train, "workdir")
    if not workdir.startswith("gs://"):
        made.error(f"--workdir is {workdir!r}; allowed: gs://..., which all hosts can write")


def check(
    made: argparse.ArgumentParser, own: argparse.Namespace, train: Sequence[str], topology: str | None
) -> list[list[str]]:
    """With --check, the command that compiles the config for `topology` and fails where it does not fit; else none."""
    if own.check and not topology:
        made.error(f"--check knows no such machine; allowed: {', '.join(TOPOLOGIES)}")
    settings = [flag for flag in train if re.match(r"--(no)?config[.=]", flag)]
    compiling = [sys.executable, "-m", "bd3_jax.cli", "compile", *settings, f"--topology={topology}"]
    return [compiling] if own.check else []


def run(commands: Sequence[Sequence[str]], dry_run: bool) -> int:
    """Runs commands one after another until one fails; prints each before."""
    for command in commands:
        print(shlex.join(command), flush=True)
        if not dry_run and (status := execute(command)):
            print(f"ended with status {status}", file=sys.stderr)
            return status
    return 0


def execute(command: Sequence[str], **options: Any) -> int:
    """The status of a command, which `subprocess.run` runs with `options`; status 2 for one that is not installed."""
    try:
        return subprocess.run(command, check=False, **options).returncode
    except FileNotFoundError:
        print(f"error: {command[0]} is not found on this machine; allowed: installed, and on PATH", file=sys.stderr)
        raise SystemExit(2) from None
