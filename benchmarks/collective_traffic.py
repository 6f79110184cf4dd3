"""What a compiled program sends between devices: its collectives, counted in the HLO, loops as often as they turn."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax

from benchmarks.compiled_loops import SHAPE, executed

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
}
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")


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
    found = []
    for line, times in executed(compiled.as_text() or ""):
        collective = INSTRUCTION.search(line)
        if collective:
            pairs = re.findall(r"\{(\d+),(\d+)\}", line.split("source_target_pairs=")[-1].split("}}")[0] + "}")
            receivers = sum(source != target for source, target in pairs)
            found.append(Sent(collective[2], _result_bytes(*collective.groups()), receivers, times))
    return found


def _result_bytes(types: str, name: str, started: str | None) -> int:
    """Bytes that a collective gives, from its type, where one that is only started has its operands first."""
    arrays = [(kind, sizes) for kind, sizes in SHAPE.findall(types) if sizes or not started]
    if started and name in ("all-gather", "collective-permute"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(math.prod(int(size) for size in sizes.split(",") if size) * BYTES[kind] for kind, sizes in arrays)
