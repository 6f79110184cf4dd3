"""Files of training data and the lines in them. What a line means: formats.py."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .formats import DataError, RecordKind

_BLOCK = 1 << 22
_VISIBLE = np.array([not bytes([byte]).isspace() for byte in range(256)])


@dataclass(frozen=True)
class Source:
    """One entry of a list of sources: `weight` is None where none was written; `files` are in the order of names."""

    path: Path
    weight: float | None
    kind: RecordKind | None
    files: tuple[Path, ...]


def parse_sources(text: str, kind: RecordKind | None = None) -> tuple[Source, ...]:
    """The sources of "path[:weight],path[:weight]", each a file or a folder of jsonl files (at any depth).

    Raises:
        DataError: a path that is not there or named twice, a folder without jsonl files, a weight that is none.
    """
    sources = [_source(item.strip(), kind) for item in text.split(",") if item.strip()]
    seen: set[Path] = set()
    for file in (file.resolve() for source in sources for file in source.files):
        if file in seen:
            raise DataError(f"data source {file}: named twice, expected once; a weight makes it count for more")
        seen.add(file)
    return tuple(sources)


def _source(item: str, kind: RecordKind | None) -> Source:
    path, weight = Path(item), None
    if not path.exists() and ":" in item:
        name, _, written = item.rpartition(":")
        path, weight = Path(name), _weight(written, item)
    if path.is_dir():
        files = tuple(sorted(path.rglob("*.jsonl")))
        if not files:
            raise DataError(f"data source {path}: a folder without .jsonl files, expected at least one")
    elif path.is_file():
        files = (path,)
    else:
        raise DataError(f"data source {path}: no such file or folder")
    return Source(path, weight, kind, files)


def _weight(written: str, item: str) -> float:
    try:
        weight = float(written)
    except ValueError:
        raise DataError(f"data source {item}: no such file, and {written!r} is not a weight") from None
    if not 0 < weight < float("inf"):
        raise DataError(f"data source {item}: weight {written}, expected more than 0")
    return weight


class LineFile:
    """A jsonl file, its lines by index. Only their places are kept in memory, 24 bytes a line, and no open file.

    Attributes:
        path: of the file.
        numbers: int64 [lines], the number of each line in the file, from 1; lines of white space are left out.
        digest: of the whole content, in hexadecimal.
    """

    def __init__(self, path: Path):
        self.path = path
        digest = hashlib.blake2b(digest_size=16)
        ends, filled, size, seen = [], [], 0, 0
        for block in self._blocks():
            digest.update(block)
            content = np.frombuffer(block, np.uint8)
            breaks = np.flatnonzero(content == ord("\n"))
            visible = np.cumsum(_VISIBLE[content]) + seen  # bytes that are no white space, from the file's beginning
            ends.append(breaks + size)
            filled.append(visible[breaks])
            size, seen = size + len(block), int(visible[-1])
        ends = np.concatenate([*ends, [size]]).astype(np.int64)
        visible = np.concatenate([[0], *filled, [seen]])
        lines = np.flatnonzero(np.diff(visible))
        self._starts, self._ends = np.concatenate([[0], ends[:-1] + 1])[lines], ends[lines]
        self.numbers = lines + 1
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> bytes:
        """The line without its line break."""
        with self.path.open("rb") as file:
            return self._read(file, index)

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)

    def _read(self, file: BinaryIO, index: int) -> bytes:
        file.seek(int(self._starts[index]))
        return file.read(int(self._ends[index] - self._starts[index])).rstrip(b"\r\n")

    def _blocks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
