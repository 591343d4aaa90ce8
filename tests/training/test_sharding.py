"""The rules on meshes of any size, without devices; and 8 simulated devices in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from bd3_jax.checkpoints import run_folder
from bd3_jax.config import MeshConfig
from bd3_jax.errors import UserError
from bd3_jax.training import sharding

MESHES = ("1x1x1", "8x1x1", "1x8x1", "2x2x2")


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("logical", "shape", "wanted"),
    [
        (("embed", "vocab"), (64, 128), ("fsdp", "tensor")),
        (("layers", "embed", None, "heads", None), (3, 64, 3, 4, 16), (None, "fsdp", None, "tensor", None)),
        (("vocab", "embed"), (2001, 64), (None, "fsdp")),  # 2001 is odd
        (("batch", None), (8, 16), (("data", "fsdp"), None)),
        (("batch", None), (4, 16), (None, None)),  # 2 * 4 does not divide 4
        (("cond", None, "embed"), (16, 6, 2), (None, None, None)),
        ((), (), ()),
    ],
)
def test_rules(logical, shape, wanted):
    assert sharding.spec(abstract_mesh(2, 4, 2), logical, shape).spec == PartitionSpec(*wanted)


def test_every_logical_axis_has_a_rule(toy_lm):
    is_names = lambda leaf: isinstance(leaf, tuple)
    names = jax.tree.leaves(toy_lm("sedd").network.logical_axes(), is_leaf=is_names)
    assert {name for axes in names for name in axes} <= {None, *sharding.RULES}


def test_a_mesh_that_is_not_all_devices_is_refused():
    count = jax.device_count()
    assert sharding.make_mesh(MeshConfig(-1, 1, 1)).size == count
    for config in (MeshConfig(-1, count + 1, 1), MeshConfig(count + 1, 1, 1), MeshConfig(count, 1, 2)):
        with pytest.raises(UserError, match=rf"config.mesh.data, fsdp, tensor are {config.data}, .* {count}, "):
            sharding.make_mesh(config)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match=r"config.training.batch_size is 12; allowed: a multiple of 8"):
        sharding.batch_sharding(abstract_mesh(4, 2, 1), 12, "config.training.batch_size")


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
