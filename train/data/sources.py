"""Files of training data and the lines in them. What a line means: formats.py."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .formats import DataError, RecordKind

_BLOCK = 1 << 24


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
    """A jsonl file, its lines by index. Only their places are kept in memory: 24 bytes a line.

    Attributes:
        path: of the file.
        numbers: int64 [lines], the number of each line in the file, from 1; empty lines are left out.
        digest: of the whole content, in hexadecimal.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error
        ends = np.concatenate([*self._line_breaks(), [len(self._bytes)]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        filled = np.flatnonzero(
            [self._is_filled(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        )
        self._starts, self._ends = starts[filled], ends[filled]
        self.numbers = filled + 1
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> bytes:
        """The line without its line break."""
        return self._bytes[self._starts[index] : self._ends[index]].tobytes().rstrip(b"\r\n")

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def _line_breaks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._bytes), _BLOCK):
            yield np.flatnonzero(self._bytes[start : start + _BLOCK] == ord("\n")) + start

    def _is_filled(self, start: int, end: int) -> bool:
        """Whether there is more than white space."""
        return end > start and (bool(self._bytes[start] > ord(" ")) or bool(self._bytes[start:end].tobytes().strip()))

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, len(self._bytes), _BLOCK):
            digest.update(self._bytes[start : start + _BLOCK].tobytes())
        return digest.hexdigest()
