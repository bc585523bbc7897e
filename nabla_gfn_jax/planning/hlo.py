"""Reads how often each instruction runs from the text of a compiled program; the compiler's summary lacks it."""

import math
import re
from dataclasses import dataclass

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_WIDTHS |= {"f64": 8, "s64": 8, "u64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_TRIPS = re.compile(r'known_trip_count["\\]*:\{["\\]*n["\\]*:["\\]*(\d+)')
_CYCLES = re.compile(r'estimated_cycles["\\]*:["\\]*(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# Instructions that move no data themselves.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota"}
_FREE |= {"partition-id", "replica-id", "after-all", "opt-barrier"}


@dataclass(frozen=True)
class Instruction:
    """One line of a program: opcode, size of the result in bytes, and names of the operands."""

    name: str
    opcode: str
    size: int
    operands: tuple[str, ...]
    line: str


@dataclass(frozen=True)
class Traffic:
    """The work of one call of a program on a device. The body of a loop counts as often as it runs.

    Attributes:
        bytes: size of the results and operands of all instructions. It is an upper bound of the memory traffic, because
            fusions and caches may avoid some of it.
        cycles: the compiler's own estimate, 0 if it made none.
        collectives: opcode → (number of runs, bytes of all runs).
        unknown_loops: number of loops whose length is unknown and whose body was counted once.
    """

    bytes: float
    cycles: float
    collectives: dict[str, tuple[int, float]]
    unknown_loops: int


def traffic(program: str) -> Traffic:
    """The traffic of a compiled program, from its text (`compiled.as_text()`)."""
    computations, entry = _parse(program)
    runs = _runs(computations, entry)
    fused = _fused(computations)
    moved = cycles = 0.0
    collectives: dict[str, tuple[int, float]] = {}
    unknown = 0
    for name, times in runs.items():
        sizes = {i.name: i.size for i in computations[name]}
        for i in computations[name]:
            unknown += i.opcode == "while" and _trips(i, computations) is None
            if name in fused:
                continue
            if match := _CYCLES.search(i.line):
                cycles += times * int(match[1])
            if i.opcode not in _FREE and not i.opcode.endswith("-done"):
                moved += times * _bytes_moved(i, sizes)
            kind = i.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                count, size = collectives.get(kind, (0, 0.0))
                collectives[kind] = (count + times, size + times * i.size)
    return Traffic(moved, cycles, collectives, unknown)


def _bytes_moved(i: Instruction, sizes: dict[str, int]) -> int:
    if i.opcode in ("dynamic-slice", "gather", "slice", "broadcast"):
        return 2 * i.size
    operands = [sizes.get(name, 0) for name in i.operands]
    if i.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(operands[1:])
    return i.size + sum(operands)


def _parse(program: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in program.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            name, result, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            computations[current].append(Instruction(name, opcode, _size(result), operands, line))
    return computations, entry


def _size(text: str) -> int:
    """The bytes of a shape, or of all shapes in a tuple."""
    found = [(kind, dims) for kind, dims in _SHAPE.findall(text) if kind in _WIDTHS]
    return sum(_WIDTHS[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in found)


def _runs(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in one call of the program."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for i in computations[name]:
            trips = _trips(i, computations) if i.opcode == "while" else 1
            for called in _called(i):
                if called in computations:
                    visit(called, times * (trips or 1))

    visit(entry, 1)
    return runs


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The length of a loop: the compiler's note, or the bound of a counter from 0 as in JAX's scan; None if unknown."""
    if noted := _TRIPS.search(loop.line):
        return int(noted[1])
    condition = computations.get(_CONDITION.findall(loop.line)[0], [])
    bounds = [match[1] for i in condition if (match := _BOUND.search(i.line))]
    compared = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.line]
    return int(bounds[0]) if len(bounds) == len(compared) == 1 else None


def _called(i: Instruction) -> list[str]:
    return [name.strip(" %") for several, one in _CALLED.findall(i.line) for name in (several or one).split(",")]


def _fused(computations: dict[str, list[Instruction]]) -> set[str]:
    """The computations that run as part of the instruction that calls them."""
    inside = {"fusion", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter", "custom-call"}
    inside |= set(_COLLECTIVES) | {f"{kind}-start" for kind in _COLLECTIVES}
    found = {name for body in computations.values() for i in body if i.opcode in inside for name in _called(i)}
    while more := {n for name in found & computations.keys() for i in computations[name] for n in _called(i)} - found:
        found |= more
    return found
