"""Training on 8 simulated devices, in a process of their own, split in any way, is training on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bd3_jax.checkpoints import run_folder

MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2")


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory) -> dict:
    """What tests/training/eight_devices.py found for every mesh."""
    folder = tmp_path_factory.mktemp("eight")
    # Large enough for every rule to apply on 2x2x2; an even vocabulary (258).
    overrides = {"model.num_heads": 4, "model.width": 64, "training.batch_size": 16, "optimizer.clip_norm": 1e6}
    run_folder.write_config(tiny_config("bd3lm,block_size=4", **overrides), folder)
    script = Path(__file__).parent / "eight_devices.py"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # to compile sooner
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), str(folder), *MESHES]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES[1:])
def test_meshes_agree(runs, mesh):
    one, other = runs["1x1x1"], runs[mesh]
    assert one["grads"].keys() == other["grads"].keys()
    for name, gradient in one["grads"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(other["grads"][name], gradient, rtol=0, atol=1e-5 * scale, err_msg=name)
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-4)
    assert max(np.abs(gradient).max() for gradient in one["grads"].values()) > 1e-3


@pytest.mark.parametrize(
    ("mesh", "qkv", "output", "batch"),  # what one device holds
    [
        ("1x1x1", [2, 64, 3, 4, 16], [64, 258], [16, 16]),
        ("8x1x1", [2, 64, 3, 4, 16], [64, 258], [2, 16]),
        ("1x8x1", [2, 8, 3, 4, 16], [8, 258], [2, 16]),
        ("2x2x2", [2, 32, 3, 2, 16], [32, 129], [4, 16]),
    ],
)
def test_the_state_is_split(runs, mesh, qkv, output, batch):
    held = runs[mesh]["held"]
    for part in ("params", "ema", "mu", "nu"):
        assert held[f"{part}/qkv"] == qkv
        assert held[f"{part}/output"] == output
    assert held["batch"] == batch
    assert held["step"] == []
