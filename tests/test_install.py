"""An installed package is enough: no checkout, no editable install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_brings_the_configs_and_the_command(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bd3_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, source], check=True)

    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = "import bd3_jax.configs.base as base; print(base.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == site / "bd3_jax" / "configs" / "base.py"

    modules = {path.relative_to(source) for path in (source / "bd3_jax").rglob("*.py")}
    assert modules <= {path.relative_to(site) for path in site.rglob("*.py")}
    run = [sys.executable, site / "bin" / "bd3", "train", "--config=configs/quickstart.py", "--workdir=run", "--x=1"]
    ended = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: Unknown command line flag 'x'\n")
