"""Reads what compilers print: collectives in optimised HLO, the largest buffers in an out-of-memory message."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_TPU_KERNEL = re.compile(r'\s+(?:ROOT )?%?([\w-]+).*custom_call_target="tpu_custom_call"')
_GPU_KERNEL = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*\bname = "(\w+)"')
_FLOW = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) (while|conditional|call)\(")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")
_LARGEST = re.compile(r"Size: ([\d.]+[KMG]?)\n(?:\s+Operator: op_name=\"([^\"]*)\"[^\n]*\n)?\s+Shape: (\S+)")
_USED = re.compile(
    r"Used ([\d.]+[KMG]?)B? of|memory required for [\w ]+ \(([\d.]+[KMG]?)\)|allocating ([\d.]+[KMG]?)i?B"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of collective among groups of one size, summed over a run of the program on one chip.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      group: chips that take part in one.
      count: how often, loops included.
      size: bytes of its results, loops included.
      traffic: bytes that a chip sends, by ring algorithms.
    """

    kind: str
    group: int
    count: int
    size: int
    traffic: int


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large array of the program: bytes, shape, and the operation that makes it, as JAX names it."""

    size: int
    shape: str
    operation: str


def array_bytes(shape: str) -> list[int]:
    """'(f32[2,3]{1,0}, s32[])' -> [24, 4]."""
    found = [(kind, dims) for kind, dims in _ARRAY.findall(shape) if kind in _BYTES]
    return [_BYTES[kind] * math.prod(int(size) for size in dims.split(",") if size) for kind, dims in found]


def collectives(text: str, devices: int, turns: float) -> list[Collective]:
    """Collectives of an optimised HLO module for `devices` chips; for `turns` see `instructions`."""
    lines, entry = computations(text)
    totals: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0, 0, 0])

    def count(line: str, times: float) -> None:
        found = _COLLECTIVE.search(line)
        if found:
            kind, group = found[2], _group(line, devices)
            sizes = array_bytes(found[1])
            if found[3] and kind != "all-reduce":  # the operands come first, a permutation's flags last
                half = sizes[: 2 * (len(sizes) // 2)] if kind != "collective-permute" else sizes[:2]
                sizes = half[len(half) // 2 :]
            total = totals[kind, group]
            for place, value in enumerate((1, sum(sizes), _traffic(kind, group, sum(sizes)))):
                total[place] += times * value
        elif within := re.search(r"calls=%?([\w.-]+)", line):  # a fusion may hold one, as an asynchronous start does
            for inner in lines.get(within[1], []):
                count(inner, times)

    for _, line, times in instructions(lines, entry, turns):
        count(line, times)
    found = sorted(totals.items(), key=lambda item: -item[1][2])
    return [Collective(*key, *(round(total) for total in sums)) for key, sums in found]


def instructions(
    lines: dict[str, list[str]],
    name: str,
    turns: float,
    choose: Callable[[list[str]], list[str]] = lambda branches: branches,
    times: float = 1,
    inside: bool = False,
) -> Iterator[tuple[str, str, float]]:
    """(its computation, its line, how often it runs) of each instruction that a run from computation `name` meets.

    Of a fusion it is the fusion itself. Loops count as often as they turn: those of unknown length `turns` times, and
    once where they are within another such loop. Of a conditional's branches those that `choose` returns are entered.

    Args:
      lines: see `computations`.
      name: of the first computation.
      turns: see above.
      choose: from the names of all branches.
      times: how often `name` itself runs.
      inside: whether that is within a loop of unknown length.
    """
    for line in lines.get(name, []):
        flow = _FLOW.match(line)
        if flow is None:
            yield name, line, times
        elif flow[1] == "while":
            known = trips(line, lines)
            often = known if known is not None else 1 if inside else turns
            within = inside or known is None
            yield from instructions(lines, called(line, "body"), turns, choose, times * often, within)
        else:
            entered = choose(branches(line)) if flow[1] == "conditional" else [called(line, "to_apply")]
            for each in entered:
                yield from instructions(lines, each, turns, choose, times, inside)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found:
            name = found[2]
            lines[name] = []
            entry = name if found[1] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def called(line: str, attribute: str) -> str:
    """The computation that an instruction names as its `body`, `condition`, `calls` or `to_apply`."""
    found = re.search(rf"{attribute}=%?([\w.-]+)", line)
    assert found
    return found[1]


def branches(line: str) -> list[str]:
    """The computations of a conditional."""
    found = re.search(r"branch_computations=\{([^}]*)\}", line)
    if found:
        return re.findall(r"[\w.-]+", found[1])
    return [called(line, "true_computation"), called(line, "false_computation")]


def trips(line: str, lines: dict[str, list[str]]) -> int | None:
    """How often a loop turns: as the compiler says, or as its condition does, counting from 0. None: not known."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = "\n".join(lines.get(called(line, "condition"), []))
    bound = re.search(r"ROOT .* compare\(.+, (?:\S+ )?%?([\w.-]+)\), direction=LT", condition)
    limit = bound and re.search(rf"%?{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)", condition)
    return int(limit[1]) if limit else None


def _group(line: str, devices: int) -> int:
    """Chips in one group of a collective, in any of the three ways in which HLO writes groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else devices


def _traffic(kind: str, group: int, size: int) -> int:
    """Bytes that one chip sends for a result of `size` bytes."""
    if kind == "collective-permute":
        return size
    share = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1}
    return round(size * share.get(kind, (group - 1) / group))


def estimated_cycles(text: str, turns: float) -> int:
    """Cycles that the TPU compiler expects of its fusions, kernels not among them; for `turns` see `instructions`."""
    lines, entry = computations(text)
    found = (
        (re.search(r'"estimated_cycles":"(\d+)"', line), times) for _, line, times in instructions(lines, entry, turns)
    )
    return round(sum(int(own[1]) * times for own, times in found if own))


def kernels(text: str, turns: float) -> dict[str, int]:
    """How often each Pallas kernel runs, by name; for `turns` see `instructions`."""
    lines, entry = computations(text)
    totals: dict[str, float] = defaultdict(float)
    for _, line, times in instructions(lines, entry, turns):
        if name := _TPU_KERNEL.match(line) or _GPU_KERNEL.search(line):
            totals[name[1]] += times
    return {name: round(total) for name, total in totals.items()}


def largest_buffers(message: str, count: int = 5) -> list[Buffer]:
    """The largest allocations that an out-of-memory message lists, the largest first."""
    found = [Buffer(_size(size), shape, operation) for size, operation, shape in _LARGEST.findall(message)]
    return sorted(found, key=lambda buffer: -buffer.size)[:count]


def largest_arrays(text: str, count: int = 5) -> list[Buffer]:
    """The largest arrays that instructions of an optimised HLO module make, each shape once."""
    lines, _ = computations(text)
    found: dict[str, Buffer] = {}
    fused = set(re.findall(r"kind=k\w+, calls=%?([\w.-]+)", text))
    for name, body in lines.items():
        for line in () if name in fused else body:
            made = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = ([a-z]\w*\[[\d,]*\])\S* ([\w-]+)\(", line)
            if made and made[2] not in ("parameter", "get-tuple-element", "bitcast"):
                operation = re.search(r'op_name="([^"]*)"', line)
                size = sum(array_bytes(made[1]))
                found.setdefault(made[1], Buffer(size, made[1], operation[1] if operation else made[2]))
    return sorted(found.values(), key=lambda buffer: -buffer.size)[:count]


def needed(message: str) -> int | None:
    """Bytes that an out-of-memory message says the program needs."""
    found = _USED.search(message)
    return _size(next(size for size in found.groups() if size)) if found else None


def _size(text: str) -> int:
    """'1.50G' -> bytes."""
    return round(float(text.rstrip("KMG")) * _UNITS.get(text[-1], 1))
