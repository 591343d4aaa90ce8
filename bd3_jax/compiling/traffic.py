"""Bytes that a compiled program moves to and from HBM, read off its text.

The compiler's own count has the bodies of loops once, and counts what stays on the chip. Here loops count as often as
they turn, and arrays that a TPU's compiler has put into on-chip memory, S(1) in their layouts, not at all. That of a
GPU plans no such memory: what its caches hold counts as moved.
"""

import re
from typing import NamedTuple

from bd3_jax.compiling import hlo

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_SLICES = ("dynamic-slice", "slice", "gather")
_FREE = (
    "parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "partition-id", "replica-id",
)  # fmt: skip


class _Array(NamedTuple):
    """`size`: bytes; `held`: in HBM."""

    size: int
    held: bool

    @property
    def moved(self) -> int:
        return self.size if self.held else 0


class _Instruction(NamedTuple):
    root: bool
    name: str
    arrays: list[_Array]  # of its result
    kind: str
    operands: list[str]
    line: str

    @property
    def moved(self) -> int:
        return sum(array.moved for array in self.arrays)

    @property
    def size(self) -> int:
        return sum(array.size for array in self.arrays)


Computation = dict[str, _Instruction]


def moved(text: str, turns: float) -> float:
    """Bytes to and from HBM of one run of an optimised HLO module on one chip.

    For `turns` see `hlo.instructions`; of several branches the cheapest counts.
    """
    lines, entry = hlo.computations(text)
    program = {name: _parse(body) for name, body in lines.items()}
    by_line = {each.line: each for computation in program.values() for each in computation.values()}

    def run(name: str) -> float:
        cheapest = lambda branches: [min(branches, key=run)]
        return sum(
            times * _cost(by_line[line], program[where], program)
            for where, line, times in hlo.instructions(lines, name, turns, cheapest)
            if line in by_line
        )

    return run(entry)


def _parse(lines: list[str]) -> Computation:
    found = {}
    for line in lines:
        made = _INSTRUCTION.match(line)
        if made is None and " = " in line:
            raise ValueError(
                f"the compiler writes an instruction in a way that is not known here: {line.strip()[:200]}"
            )
        if made:
            root, name, shape, kind, rest = made.groups()
            arrays = [
                _Array(sum(hlo.array_bytes(f"{dtype}[{dims}]")), "S(" not in (layout or ""))
                for dtype, dims, layout in _ARRAY.findall(shape)
            ]
            operands = re.findall(r"%([\w.-]+)", rest[: rest.index(")")])
            found[name] = _Instruction(bool(root), name, arrays, kind, operands, line)
    return found


def _cost(instruction: _Instruction, here: Computation, program: dict[str, Computation]) -> int:
    """Reads of the operands and writes of the result."""
    kind, operands = instruction.kind, [here[name] for name in instruction.operands if name in here]
    if kind in _FREE or kind.endswith("-done"):
        return 0
    if kind in _SLICES:
        return instruction.moved + (instruction.size if operands[0].moved else 0)
    if kind == "dynamic-update-slice":
        return operands[1].moved + (operands[1].size if instruction.moved else 0)
    if kind.endswith("-start"):
        # Of a copy the destination comes first, of others what is read; what is read may be part of an array.
        place = 0 if kind == "copy-start" else len(operands)
        made = instruction.arrays[min(place, len(instruction.arrays) - 1)]
        return made.moved + (made.size if any(operand.moved for operand in operands) else 0)
    if kind == "fusion":
        inner = program[hlo.called(instruction.line, "calls")]
        reads = sum(
            _read(inner, _parameter(inner, place), operand.moved, program) for place, operand in enumerate(operands)
        )
        root = next(each for each in inner.values() if each.root)
        return reads + _written(inner, root, instruction.arrays)
    return sum(operand.moved for operand in operands) + instruction.moved


def _parameter(computation: Computation, place: int) -> str:
    return next(each.name for each in computation.values() if f" parameter({place})" in each.line)


def _read(computation: Computation, name: str, size: int, program: dict[str, Computation]) -> int:
    """Bytes that a fusion reads of an array of `size` bytes: less where it takes slices, or writes into it in place."""
    total = 0
    for user in computation.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.kind == "bitcast":
            total += _read(computation, user.name, size, program)
        elif user.kind in _SLICES and first:
            total += user.size
        elif user.kind == "fusion":
            inner = program[hlo.called(user.line, "calls")]
            total += _read(inner, _parameter(inner, user.operands.index(name)), size, program)
        elif not (user.kind == "dynamic-update-slice" and first):
            return size
    return min(size, total)


def _written(computation: Computation, root: _Instruction, arrays: list[_Array]) -> int:
    """Bytes of a fusion's result that it writes."""
    if root.kind == "tuple":
        parts = [computation[name] for name in root.operands]
        if len(parts) == len(arrays):
            return sum(_written(computation, part, [array]) for part, array in zip(parts, arrays, strict=True))
    if root.kind == "bitcast":
        return _written(computation, computation[root.operands[0]], arrays)
    if root.kind == "dynamic-update-slice":
        return computation[root.operands[1]].size if arrays[0].held else 0
    return sum(array.moved for array in arrays)
