"""A compiled program's instructions with how often each runs, and the operations of its products; from HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import jax

SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
DEFINED = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]")
DOT = re.compile(r" dot\(%?([\w.\-]+), ")


def executed(text: str) -> Iterator[tuple[str, int]]:
    """Each instruction of a program's HLO and how often it runs: loops as often as they turn, all branches once."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            lines = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        else:
            lines.append(line)
    yield from _executed(computations, entry, 1)


def _executed(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in computations[name]:
        yield line, times
        inner = times * _turns(line, computations)
        branches = BRANCHES.search(line)
        for target in CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else []):
            yield from _executed(computations, target, inner)


def product_flops(compiled: jax.stages.Compiled) -> int:
    """Operations of all dot products of a program, two for a multiplication and its sum."""
    text = compiled.as_text() or ""
    sizes = {found[1]: _sizes(found[3]) for found in map(DEFINED.search, text.splitlines()) if found}
    total = 0
    for line, times in executed(text):
        dot = DOT.search(line)
        if dot:
            result = DEFINED.search(line)
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
            assert result is not None
            assert contracted is not None
            depth = math.prod(sizes[dot[1]][axis] for axis in _sizes(contracted[1]))
            total += 2 * math.prod(_sizes(result[3])) * depth * times
    return total


def _sizes(listed: str) -> list[int]:
    return [int(size) for size in listed.split(",") if size]


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    """How often the body of a loop runs: as it says, or as a scan's condition says that counts up to a constant."""
    said = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    if said:
        return int(said[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    root = next((one for one in lines if "ROOT" in one and "direction=LT" in one), "")
    bound = [re.search(r"constant\((\d+)\)", one) for one in lines if any(f"{name} = " in one for name in _names(root))]
    return int(bound[0][1]) if len(bound) == 1 and bound[0] else 1


def _names(instruction: str) -> list[str]:
    """The constants among an instruction's operands."""
    operands = instruction.partition("compare(")[2].partition(")")[0]
    return [name for name in re.findall(r"%[\w.\-]+", operands) if "constant" in name]
