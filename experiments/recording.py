"""What experiments record: experiments/results/NAME/, with figures, settings, commit and machine.

    results.json   a list of cells, one measurement each: settings, figures, the whole config, command, variables of the
                   environment, commit, machine, seconds
    table.md       the figures for a reader
    NAME.png       where a picture says more

A cell is written when it is measured, and what the file has is not measured again: an interrupted experiment goes on
where it was. Two processes may measure different cells of one experiment. To measure anew, remove the folder.
"""

import fcntl
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("jax", "jaxlib", "numpy", "optax")
VARIABLES = ("GLIBC_TUNABLES", "LIBTPU_INIT_ARGS", "XLA_FLAGS")
"""Those of the environment that a speed may depend on."""


class Recording:
    """The cells of one experiment, in `folder`."""

    def __init__(self, folder: Path, on_devices: bool = True):
        """`on_devices`: this process computes on devices, which are then named; else it takes none."""
        self.folder = folder
        self._commit = _commit()  # now, since a checkout may change while a measurement of its own code runs
        self._path = folder / "results.json"
        self._on_devices = on_devices
        self.cells = self._read()

    def cell(
        self, settings: dict[str, Any], config: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The figures under these settings: those in the file, else what `measure` returns, which is added to it.

        Args:
          settings: what makes this cell another one than its neighbours.
          config: all settings of the model and its training that it was measured with.
          measure: returns figures that JSON can hold.
        """
        asked = json.loads(json.dumps({"settings": settings, "config": config}))  # lists for tuples, as in the file
        for cell in self.cells:
            if all(cell[name] == value for name, value in asked.items()):
                return cell["figures"]
        print(f"{self.folder.name}: measuring {json.dumps(settings)}", flush=True)
        began = time.perf_counter()
        figures = measure()
        seconds = round(time.perf_counter() - began, 1)
        made = {"seconds": seconds, **environment(self._on_devices), "commit": self._commit}
        self._append({"settings": asked["settings"], "figures": figures, "config": asked["config"], **made})
        return figures

    def _read(self) -> list[dict[str, Any]]:
        return json.loads(self._path.read_text()) if self._path.exists() else []

    def _append(self, cell: dict[str, Any]) -> None:
        """After what is in the file, which another process may have written to meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.cells = [*self._read(), cell]
            self._write(self._path, json.dumps(self.cells, indent=1) + "\n")
        finally:
            os.close(lock)

    def write_table(self, text: str) -> None:
        """Writes table.md."""
        self._write(self.folder / "table.md", f"{text}\n")

    def _write(self, path: Path, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


def environment(on_devices: bool) -> dict[str, Any]:
    """Command, variables, machine, versions. Devices are named if `on_devices`; of absolute paths the last part is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {"processor": _processor(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1)}
    if on_devices:
        machine["devices"] = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    command = shlex.join(["python", *(re.sub(r"(^|=)/(?:[^/]*/)*", r"\1", argument) for argument in sys.argv)])
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {"command": command, "variables": variables, "machine": machine, "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Of the checkout, and whether files other than results differ from it; 'unknown' outside of git."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)experiments/results")
    return f"{git('rev-parse', 'HEAD') or 'unknown'}{' with changes' if changed else ''}"
