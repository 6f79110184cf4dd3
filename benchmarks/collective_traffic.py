"""What a compiled program sends between devices: its collectives, counted in the HLO, loops as often as they turn."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Sent(NamedTuple):
    """One collective: its name, the bytes that it gives each device, the devices that get any, how often it runs."""

    name: str
    n_bytes: int
    receivers: int
    times: int

    @property
    def total(self) -> int:
        """Bytes over the whole mesh."""
        return self.n_bytes * self.receivers * self.times


def traffic(compiled: jax.stages.Compiled) -> list[Sent]:
    """All collectives of a program. A permutation that leaves everything where it is sends nothing."""
    text = compiled.as_text() or ""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if opened:
            lines = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        else:
            lines.append(line)
    return _sent(computations, entry, 1)


def _sent(computations: dict[str, list[str]], name: str, times: int) -> list[Sent]:
    found = []
    for line in computations[name]:
        collective = INSTRUCTION.search(line)
        if collective:
            pairs = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[-1].split("}}")[0] + "}")
            receivers = sum(source != target for source, target in pairs)
            found.append(Sent(collective[2], _result_bytes(*collective.groups()), receivers, times))
            continue
        inner = times * _turns(line, computations)
        branches = BRANCHES.search(line)
        called = CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])
        for target in called:
            found += _sent(computations, target, inner)
    return found


def _result_bytes(types: str, name: str, started: str | None) -> int:
    """Bytes that a collective gives, from its type, where one that is only started has its operands first."""
    arrays = [(kind, sizes) for kind, sizes in SHAPE.findall(types) if sizes or not started]
    if started and name in ("all-gather", "collective-permute"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(math.prod(int(size) for size in sizes.split(",") if size) * BYTES[kind] for kind, sizes in arrays)


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
