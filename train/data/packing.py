"""Which samples share a row. Knows lengths and places, no arrays: those are made in batches.py.

A row is made of segments, each a stretch of one sample. A packer takes samples one at a time (`add`), each under a key
that is its own, and hands out rows as they are done, the rest in `finish`. `open_rows`, begun and not yet handed out,
are its whole state.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .samples import Sample


@dataclass(frozen=True, eq=False)
class Segment:
    """The predictions `start` to `stop` of a sample: it reads ids[start:stop] and predicts ids[start+1:stop+1]."""

    key: int
    sample: Any
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Row:
    """Segments side by side, and how many predictions they are."""

    def __init__(self, segments: Iterable[Segment] = ()):
        self.segments: list[Segment] = []
        self.length = 0
        for segment in segments:
            self.add(segment)

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.length += len(segment)

    def plain(self) -> list[list[int]]:
        """The row as JSON, its samples left out: [key, start, stop] of each segment."""
        return [[segment.key, segment.start, segment.stop] for segment in self.segments]

    @classmethod
    def restored(cls, row: Iterable[Iterable[int]], sample_of: Callable[[int], Any]) -> "Row":
        """The row again, with the samples of its keys."""
        return cls(Segment(key, sample_of(key), start, stop) for key, start, stop in row)


class FirstFit:
    """Each sample, whole, goes into the oldest open row with room for it.

    A full row is handed out at once. When more than `window` rows are open, the fullest is, the oldest of equals.
    """

    def __init__(self, seq_len: int, window: int):
        self._seq_len = seq_len
        self._window = window
        self.open_rows: list[Row] = []

    def add(self, key: int, sample: Sample) -> Iterable[Row]:
        segment = Segment(key, sample, 0, len(sample))
        row = next((row for row in self.open_rows if row.length + len(segment) <= self._seq_len), None)
        if row is None:
            row = Row()
            self.open_rows.append(row)
        row.add(segment)
        if row.length == self._seq_len:
            return [self._take(row)]
        return [self._take(max(self.open_rows, key=_length))] if len(self.open_rows) > self._window else []

    def finish(self) -> Iterable[Row]:
        rows, self.open_rows = self.open_rows, []
        return rows

    def _take(self, row: Row) -> Row:
        self.open_rows = [other for other in self.open_rows if other is not row]
        return row


def _length(row: Row) -> int:
    return row.length


class CutAndContinue:
    """mistral-finetune's packing: one open row, and what does not fit begins the next one, as a segment of its own.

    The rest of a cut sample no longer sees its beginning. A stretch without a trained token is left out
    (`sequence_iterator` in finetune/data/dataset.py there).
    """

    def __init__(self, seq_len: int):
        self._seq_len = seq_len
        self.open_rows: list[Row] = []

    def add(self, key: int, sample: Sample) -> Iterable[Row]:
        rows: list[Row] = []
        start = 0
        while start < len(sample):
            row = self.open_rows[0] if self.open_rows else Row()
            stop = min(start + self._seq_len - row.length, len(sample))
            if sample.weights[start + 1 : stop + 1].any():
                row.add(Segment(key, sample, start, stop))
                self.open_rows = [row]
                if row.length == self._seq_len:
                    rows.append(row)
                    self.open_rows = []
            start = stop
        return rows

    def finish(self) -> Iterable[Row]:
        rows, self.open_rows = self.open_rows, []
        return rows


class OneEach:
    """A row for each sample."""

    def __init__(self) -> None:
        self.open_rows: list[Row] = []

    def add(self, key: int, sample: Any) -> Iterable[Row]:
        return [Row([Segment(key, sample, 0, len(sample))])]

    def finish(self) -> Iterable[Row]:
        return []


Packer = FirstFit | CutAndContinue | OneEach


def make_packer(packing: str, seq_len: int, window: int) -> Packer:
    """The packer of a config; all but mistral-finetune's take samples of at most `seq_len` predictions."""
    if packing == "first-fit":
        return FirstFit(seq_len, window)
    return CutAndContinue(seq_len) if packing == "mistral-finetune" else OneEach()
