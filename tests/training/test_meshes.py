"""Training on 8 simulated devices, in a process of their own, split in any way, is training on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from bd3_jax.checkpoints import run_folder
from bd3_jax.metrics import EVALUATIONS, read_metrics
from bd3_jax.training.loop import train

MESHES = ("1x1x1", "8x1x1", "2x4x1", "1x8x1", "2x2x2")
OTHERS = ("1x1x8", "1x2x4", "1x4x2", "2x1x4", "4x1x2", "4x2x1")  # whose product is 8, too

# Large enough for every rule to apply on 2x2x2; an even vocabulary (258).
LARGE = {
    "model.num_heads": 4, "model.width": 64, "training.batch_size": 16, "training.microbatches": 2,
    "model.max_logits": 5 * 258,
}  # fmt: skip


def run_script(name: str, *args: str) -> str:
    """Runs a script beside this file with 8 devices, and returns what it prints."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # to compile sooner
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).parent / name), *args]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def run_meshes(tiny_config, folder, steps, meshes) -> dict:
    """What tests/training/eight_devices.py finds for every mesh."""
    run_folder.write_config(tiny_config("bd3lm,block_size=4", **LARGE, **{"optimizer.clip_norm": 1e6}), folder)
    return json.loads(run_script("eight_devices.py", str(folder), str(steps), *meshes).splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory) -> dict:
    return run_meshes(tiny_config, tmp_path_factory.mktemp("eight"), 4, MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_meshes_agree(runs, mesh):
    assert_agree(runs["1x1x1"], runs[mesh])


@pytest.mark.slow
def test_all_meshes_agree_over_20_steps(tiny_config, tmp_path):
    found = run_meshes(tiny_config, tmp_path, 20, MESHES + OTHERS)
    one = found["1x1x1"]
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < one["losses"][0] - 0.1
    for mesh in MESHES[1:] + OTHERS:
        assert_agree(one, found[mesh])


def assert_agree(one: dict, other: dict) -> None:
    """The first gradient to 1e-5 of the largest of its array, every loss to 1e-4."""
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


def test_memory_falls_as_more_devices_split_the_state(runs):
    """Bytes that each device holds of the state, and in all, as compiled."""
    held = {mesh: runs[mesh]["memory"]["arguments"] for mesh in MESHES}
    assert held["1x8x1"] < held["2x4x1"] < held["2x2x2"] * 1.1 < held["8x1x1"] / 2
    assert held["8x1x1"] / held["1x8x1"] > 5  # 8, but for what is too small to be split
    total = {mesh: sum(runs[mesh]["memory"].values()) for mesh in MESHES}
    assert total["1x8x1"] < total["2x4x1"] < total["8x1x1"]
    # Activations stay split by rows whatever splits the parameters.
    assert runs["1x8x1"]["memory"]["temporaries"] < 1.2 * runs["8x1x1"]["memory"]["temporaries"]


def test_chunks_of_the_loss_exchange_nothing(runs):
    """The output layer is gathered before the loop over them, and its gradient added up after it."""
    for mesh in ("8x1x1", "2x4x1", "1x8x1"):
        assert runs[mesh]["collectives"] > 0
        assert runs[mesh]["in_chunks"] == []


@pytest.mark.slow
def test_training_moves_to_another_mesh_and_is_evaluated(tiny_config, tmp_path):
    """Begun on 2x2x2, continued and evaluated on 1x4x2, against one device without a break."""
    every = {"training.num_steps": 4, "training.log_every": 1, "training.eval_every": 2, "eval.num_batches": 0}
    config = tiny_config("bd3lm,block_size=4", **LARGE, **every)
    for name in ("one", "eight"):
        (tmp_path / name).mkdir()
        run_folder.write_config(config, tmp_path / name)
    run_script("eight_devices_run.py", str(tmp_path / "eight"))
    train(config, epath.Path(tmp_path / "one"))

    ours, wanted = (read_metrics(epath.Path(tmp_path / name)) for name in ("eight", "one"))
    (evaluated,) = read_metrics(epath.Path(tmp_path / "eight"), EVALUATIONS)
    assert evaluated["eval/nll"] == pytest.approx(ours[-1]["eval/nll"], rel=1e-5)  # of the same rows and weights
    assert [record["step"] for record in ours] == [record["step"] for record in wanted]
    for mine, theirs in zip(ours, wanted, strict=True):
        for name in {"train/loss", "train/grad_norm", "eval/nll", "eval/standard_error"} & theirs.keys():
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4)
    assert wanted[-1]["eval/nll"] < wanted[0]["eval/nll"] - 0.01
