"""The rules on meshes of any size, without devices."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from bd3_jax import sharding
from bd3_jax.config import MeshConfig
from bd3_jax.errors import UserError


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


@dataclasses.dataclass(frozen=True)
class Device:
    """What JAX says of a device of a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_lie_along_data():
    devices = [Device(n, n // 4) for n in range(8)]
    found = sharding.arrange(devices, (4, 2, 1), 2)
    assert [[device.slice_index for device in row] for row in found[:, :, 0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"config\.mesh\.data is 1; allowed: a multiple of 2, the number of slices"):
        sharding.arrange(devices, (1, 8, 1), 2)


@dataclasses.dataclass(frozen=True)
class Described:
    """What JAX says of a chip of a described machine of one slice, which has no number of it."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def test_a_described_machine_of_one_slice():
    chips = [Described(n, (n % 2, n // 2, 0)) for n in range(4)]
    mesh = sharding.make_mesh(MeshConfig(-1, 2, 1), chips)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.devices.flat) == set(chips)


class Rows:
    """A sharding of 8 rows over four processes of two devices, as far as `host_share` asks."""

    def __init__(self, starts):
        self.starts = starts

    def devices_indices_map(self, shape):
        return {Device(n, 0, n // 2): (slice(start, start + 2),) for n, start in enumerate(self.starts)}


@pytest.mark.parametrize(
    ("starts", "shares"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((0, 0, 2, 2, 4, 4, 6, 6), [(0, 4), (1, 4), (2, 4), (3, 4)]),  # `tensor` within a host
        ((0, 4, 0, 4, 0, 4, 0, 4), [(0, 1), (0, 1), (0, 1), (0, 1)]),  # over hosts: each has all rows
        ((0, 2, 0, 2, 4, 6, 4, 6), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_hosts_with_the_same_rows_read_the_same(starts, shares, monkeypatch):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.host_share(Rows(starts), 8) == share


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(UserError, match=r"config.training.batch_size is 12; allowed: a multiple of 8"):
        sharding.batch_sharding(abstract_mesh(4, 2, 1), 12, "config.training.batch_size")
