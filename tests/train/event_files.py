"""TensorBoard's event files read as TensorBoard does. Holds no tests."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

Points = list[tuple[int, float]]


def scalars(folder: Path) -> dict[str, Points]:
    """The steps and values of every tag, files in the order of their names.

    Where a file says that a session starts, earlier points from its step on are forgotten.
    """
    found: dict[str, Points] = {}
    for path in sorted(folder.glob("events.*")):
        for event in _events(path.read_bytes()):
            if event.session_log.status == SessionLog.START:
                found = {tag: [point for point in points if point[0] < event.step] for tag, points in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def _events(data: bytes) -> Iterator[Any]:
    """Records of a length, its checksum, as many bytes, and theirs."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        for start, size in ((place, 8), (place + 12, length)):
            (checksum,) = struct.unpack_from("<I", data, start + size)
            assert checksum == _masked(crc32c(data[start : start + size]))
        yield Event.FromString(data[place + 12 : place + 12 + length])
        place += length + 16


def _masked(checksum: int) -> int:
    """As checksums are stored: turned right by 15 bits, and a constant added."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
