"""What one compilation told, as a record and as text."""

import dataclasses
import math
from typing import Any

from bd3_jax.compiling.hlo import Buffer, Collective
from bd3_jax.compiling.targets import GIB, Chip

GROUPS = {"train": "training", "eval": "eval", "sample": "sampling"}  # mode -> the settings that hold its batch size

# What stands for a loop whose length depends on what is drawn.
COUNTED = {
    "train": "every token masked, the most",
    "eval": "every token masked, the most",
    "sample": "a call for every token where they are drawn one by one, else two calls a block",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures for one chip and one run of the program.

    Attributes:
      topology: as it was asked for.
      mode: train, eval or sample.
      chips: of the machine.
      rows: of the whole batch.
      fits: whether the compiler accepts it; for GPUs, whether the memory it needs is there.
      memory: bytes by kind; what the arguments hold is computed from the shapes, the rest is the compiler's.
      needed: bytes in all, None where the compiler gave up without saying.
      available: bytes of a chip.
      program_flops: of matrix products, counted in the traced program with its loops, divided by the chips; see
        `programs.Program`.
      compiler_flops: as the compiler counts; bodies of loops once. None where it counts none.
      compiler_bytes: moved, on the chip too; see `compiler_flops`.
      moved_bytes: to and from HBM, loops included, read off the program; of train and eval, not for CPUs, else None.
      compiler_seconds: the compiler's own estimate, where it has one.
      cycles: the TPU compiler's estimate over its fusions, loops included; kernels have none.
      collectives: in the order of their traffic.
      kernels: how often each Pallas kernel runs: which attention it is.
      largest: buffers, the largest first.
      advice: settings that would need less memory, where it does not fit.
      lower_seconds: of tracing and lowering.
      compile_seconds: of the compiler.
      call_bytes: moved to and from HBM in a network call, on average, where each draws a token of every row; None
        elsewhere.
      call_floor: the weights and the context of the samples once.
    """

    topology: str
    mode: str
    chips: int
    rows: int
    fits: bool
    memory: dict[str, int]
    needed: int | None
    available: int
    program_flops: float
    compiler_flops: float | None
    compiler_bytes: float | None
    compiler_seconds: float | None
    cycles: int
    collectives: list[Collective]
    largest: list[Buffer]
    advice: list[str]
    lower_seconds: float
    compile_seconds: float
    moved_bytes: float | None = None
    call_bytes: float | None = None
    call_floor: int | None = None
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Report":
        lists = {"collectives": Collective, "largest": Buffer}
        return cls(**record | {name: [kind(**item) for item in record[name]] for name, kind in lists.items()})

    @property
    def traffic(self) -> int:
        """Bytes that a chip sends to others."""
        return sum(collective.traffic for collective in self.collectives)

    def roofline(self, chip: Chip) -> dict[str, float]:
        """Least seconds of a run by each resource at its published peak; nan where there is no figure."""
        return {
            "matrix products": self.program_flops / chip.flops,
            "HBM": math.nan if self.moved_bytes is None else self.moved_bytes / chip.bandwidth,
            "links": self.traffic / chip.link,
        }

    def table(self, chip: Chip) -> str:
        """For the terminal."""
        verdict = "fits" if self.fits else "DOES NOT FIT"
        needed = "more than there is" if self.needed is None else f"{amount(self.needed)}"
        lines = [f"{self.mode} on {self.topology}: {verdict}, {needed} of {amount(self.available)} a chip"]
        lines += [f"  {name:<22}{amount(size):>10}" for name, size in self.memory.items()]
        lines.append(f"rows: {self.rows:,}, {self.rows / self.chips:g} a chip")
        lines.append(f"matrix products: {self.program_flops / 1e12:.3f} TFLOP a chip, {COUNTED[self.mode]}")
        if self.compiler_flops is not None:
            lines.append(f"the compiler counts {self.compiler_flops / 1e12:.3f} TFLOP, bodies of loops once")
        if self.compiler_bytes is not None:
            lines.append(f"it counts {self.compiler_bytes / 1e9:.1f} GB moved a chip, bodies of loops once")
        if self.moved_bytes is not None:
            lines.append(f"moved to and from HBM: {self.moved_bytes / 1e9:.1f} GB a chip, loops included")
        if self.compiler_seconds is not None:
            lines.append(f"the compiler's estimate: {self.compiler_seconds * 1e3:.1f} ms, bodies of loops once")
        if self.call_bytes is not None and self.call_floor is not None:
            rows, ratio = self.rows / self.chips, self.call_bytes / self.call_floor
            lines.append(
                f"bytes moved per token drawn: {self.call_bytes / rows / 1e6:.1f} MB, {ratio:.2f} times "
                f"{self.call_floor / rows / 1e6:.1f} MB, weights and context once a network call"
            )
        if self.cycles:
            lines.append(f"the compiler's estimate over fusions: {self.cycles / 1e6:.1f} M cycles, loops included")
        if self.kernels:
            lines.append(f"kernels: {', '.join(f'{count} x {name}' for name, count in self.kernels.items())}")
        if chip.platform != "cpu" and self.fits:
            parts = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self.roofline(chip).items())
            lines.append(f"at published peaks at least: {parts}")
        for c in self.collectives:
            sizes = f"{amount(c.size)}, {amount(c.traffic)} sent by a chip"
            lines.append(f"  {c.count} x {c.kind} among {c.group} chips: {sizes}")
        if not self.collectives and self.fits:
            lines.append("no collectives")
        lines += ["largest arrays:"] * bool(self.largest)
        lines += [f"  {amount(b.size):>10}  {b.shape} {b.operation}" for b in self.largest]
        lines += [f"would help: {setting}" for setting in self.advice]
        lines.append(f"lowered in {self.lower_seconds:.1f} s, compiled in {self.compile_seconds:.1f} s")
        return "\n".join(lines)


def amount(size: int) -> str:
    """Bytes in GiB, or in MiB where that is easier to read."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:.2f} MiB"
