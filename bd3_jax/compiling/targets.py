"""Machines that programs are compiled for without being there, with the figures that their makers publish.

A topology is CHIP:SHAPE, as in v5e:16x16, v5p:4x4x4 or h100:8 (GPUs of one NVLink domain); 2xv5e:16x16 is two slices of
TPUs, joined by the data centre's network. `cpu:N` is this machine, split into N devices: it needs no further package
and shows shardings and collectives.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax

from bd3_jax.errors import UserError
from bd3_jax.training.speed import peak_flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      platform: whose compiler it takes.
      kind: its name in JAX.
      memory: bytes of HBM that a program may use.
      bandwidth: of HBM, bytes per second.
      link: of all its links to other chips, bytes per second in one direction.
    """

    platform: Literal["tpu", "cuda", "cpu"]
    kind: str
    memory: int
    bandwidth: float
    link: float

    @property
    def flops(self) -> float:
        """Peak of bfloat16 matrix products with float32 sums, per second; nan where it is not known."""
        return peak_flops(self.kind) or math.nan


GIB = 2**30
# Bandwidths from the makers' data sheets; memory is what their compilers leave to a program.
CHIPS = {
    "v5e": Chip("tpu", "TPU v5 lite", int(15.75 * GIB), 819e9, 200e9),
    "v5p": Chip("tpu", "TPU v5", int(95.74 * GIB), 2765e9, 600e9),
    "v6e": Chip("tpu", "TPU v6 lite", int(31.25 * GIB), 1638e9, 400e9),
    "h100": Chip("cuda", "NVIDIA H100", 84_978_434_048, 3352e9, 450e9),
}
NEEDS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}  # platform -> the module that brings its compiler

# What XLA asks of a device that is not there, in the text format of its GpuTargetConfigProto: an H100 SXM's figures.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: `shape` counts the chips of a slice along each axis of their network."""

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        if self.name == "cpu":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.size
            return Chip("cpu", "cpu", memory, math.nan, math.nan)
        return CHIPS[self.name]

    @property
    def size(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process of its own, set before JAX is imported: the host computes on its CPU."""
        own = {
            # No metadata server is asked, and other processes may hold the library too.
            "tpu": {
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_ACCELERATOR_TYPE": "v5litepod-8",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            },
            "cuda": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
            "cpu": {"XLA_FLAGS": f"--xla_force_host_platform_device_count={self.size}"},
        }
        return {"JAX_PLATFORMS": "cpu", **own[self.chip.platform]}

    def devices(self) -> Sequence[jax.Device]:
        """Devices for a mesh; nothing can run on them.

        Raises:
          UserError: a shape that this kind of chip is not built in.
        """
        from jax.experimental import topologies

        if self.chip.platform == "cpu":
            return jax.devices()
        if self.chip.platform == "cuda":
            shape = f"1x1x{self.size}"
            return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=shape).devices
        shape = "x".join(map(str, self.shape))
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.size == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)  # else hosts have four chips or more
        try:
            return topologies.get_topology_desc(f"{self.name}:{shape}", "tpu", **options).devices
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"--topology={self.name}:{shape} is no machine that its compiler knows: {error}") from error


def parse(topology: str) -> Target:
    """'v5e:16x16' -> 16 * 16 chips of v5e; '2xv5e:16x16' -> twice as many.

    Raises:
      UserError: an unknown chip, or something else than numbers joined by x, or slices of what is no TPU.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([a-z]\w*):([1-9]\d{0,3}(?:x[1-9]\d{0,3}){0,2})", topology)
    slices, name, shape = found.groups() if found else (None, "", "")
    if name not in (*CHIPS, "cpu") or (slices and (name == "cpu" or CHIPS[name].platform != "tpu")):
        raise UserError(
            f"--topology is {topology!r}; allowed: CHIP:SHAPE with a chip of {', '.join((*CHIPS, 'cpu'))}, "
            "as in v5e:16x16, v5p:2x2x1, h100:8, or 2xv5e:16x16 for two slices of TPUs"
        )
    return Target(name, tuple(int(size) for size in shape.split("x")), int(slices or 1))
