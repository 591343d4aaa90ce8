"""The benchmark, on models that take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_jax.errors import UserError

TINY = {"model.length": 16, "model.width": 16, "model.num_layers": 2, "model.num_heads": 2, "model.cond_dim": 8}


def test_a_setting_that_is_not_there(script):
    with pytest.raises(UserError, match=r"--set=model\.depth=3"):
        script("benchmark").configure("ar", ["model.depth=3"])
    assert script("benchmark").configure("bd3lm", ["model.width=64", "model.dropout=0"]).model.width == 64


@pytest.mark.slow
def test_benchmark_on_two_devices(tmp_path):
    """Figures that follow from each other agree; every mode has a row."""
    path = Path(__file__).parents[2] / "experiments" / "benchmark.py"
    flags = [
        f"--set={name}={value}"
        for name, value in (TINY | {"sampling.max_length": 16, "sampling.batch_size": 8}).items()
    ]
    command = [sys.executable, str(path), "--objectives=bd3lm", "--vocab_sizes=11", "--rounds=1", f"--out={tmp_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "results.json").read_text())
    assert all(cell["machine"]["devices"].startswith("2 ") for cell in cells)
    results = [cell["figures"] for cell in cells]
    assert [result["mode"] for result in results] == ["train", "eval", "sample"]
    for result in results:
        assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(8 * 16)
        assert result["memory"] > 0
    train, evaluation, _ = results
    assert train["flops"] > 2 * evaluation["flops"]  # the backward pass is two more products for each
    assert train["peak_fraction"] == pytest.approx(train["flops"] / train["step_seconds"] / train["matmul_peak"])
    assert done.stdout.count("| bd3lm |") == 3
