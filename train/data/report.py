"""What is in the files: bad lines by kind, tokens per source, rows and steps, one sample to look at. Prints nothing."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ministral_jax.tokenizer import Tokenizer

from .config import DataConfig
from .formats import DataError, read_record
from .messages import RecordError
from .packing import Packer, make_packer
from .samples import Pair, Sample
from .sources import LineFile, Source, parse_sources
from .tokens import SampleEncoder

Progress = Callable[[int, int], object]

# In the order in which a line is read: a line is told by the first that it fails.
KINDS = ("json", "record", "message", "tool", "chat", "empty")


@dataclass(frozen=True)
class LineProblem:
    """A line that cannot be trained on: `field` is where in it, or "line"; the rest is RecordError's."""

    file: str
    line: int
    kind: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.field}: {self.found}, expected {self.expected}"


@dataclass
class SourceReport:
    """A source's good lines. Without a tokenizer the tokens are None.

    Attributes:
        path, weight: as written; None is no weight.
        lines, good: lines that are not blank, and those without a problem.
        tokens, trained: predictions and those that count, whole samples, of a pair both.
        longest: predictions of the longest sample.
        too_long: samples longer than a row.
    """

    path: str
    weight: float | None
    lines: int = 0
    good: int = 0
    tokens: int | None = None
    trained: int | None = None
    longest: int | None = None
    too_long: int | None = None

    def add(self, sample: Sample | Pair, seq_len: int | None) -> None:
        self.tokens = (self.tokens or 0) + _predictions(sample)
        self.trained = (self.trained or 0) + sample.trained(0, len(sample))
        self.longest = max(self.longest or 0, len(sample))
        if seq_len is not None:
            self.too_long = (self.too_long or 0) + (len(sample) > seq_len)


@dataclass
class PackingReport:
    """One pass over the data in the order of the files, packed as the config says."""

    seq_len: int
    rows: int = 0
    tokens: int = 0
    trained: int = 0

    @property
    def fill_rate(self) -> float:
        """The share of the rows that is not padding."""
        return self.tokens / (self.rows * self.seq_len) if self.rows else 0.0


@dataclass
class DataReport:
    """All that `ministral data validate` shows.

    Attributes:
        sample: the first good sample as pieces of text, each with whether it is trained; None without a tokenizer.
        corrected: the copies that were written.
    """

    sources: list[SourceReport] = field(default_factory=list)
    problems: list[LineProblem] = field(default_factory=list)
    packing: PackingReport | None = None
    sample: list[tuple[str, bool]] | None = None
    corrected: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> dict[str, int]:
        """How many lines are bad, by kind."""
        counts = Counter(problem.kind for problem in self.problems)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        packing = None if self.packing is None else asdict(self.packing) | {"fill_rate": self.packing.fill_rate}
        return {
            "lines": sum(source.lines for source in self.sources),
            "good": sum(source.good for source in self.sources),
            "kinds": self.kinds,
            "problems": [asdict(problem) for problem in self.problems],
            "sources": [asdict(source) for source in self.sources],
            "packing": packing,
            "sample": self.sample and [{"text": text, "trained": trained} for text, trained in self.sample],
            "corrected": self.corrected,
        }


def sources_of(config: DataConfig) -> tuple[Source, ...]:
    """Every source of a config, of all kinds. Raises DataError if there is none."""
    sources = (
        *parse_sources(config.data, "pretrain"),
        *parse_sources(config.instruct_data, "instruct"),
        *parse_sources(config.preference_data, "preference"),
    )
    if not sources:
        raise DataError("no data: expected data.data, data.instruct_data or data.preference_data")
    return sources


def validate(
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    evaluation: Sequence[Source] = (),
    seq_len: int | None = None,
    corrected: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> DataReport:
    """Reads every line of the sources, goes on past bad ones, and tells what it found.

    Args:
        sources: what to read; a source's kind None lets each line's keys decide.
        tokenizer: None checks what can be checked without one, and counts no tokens.
        config: which messages are trained, how rows are packed.
        evaluation: sources that are read like the others, and make no rows of training.
        seq_len: of the rows to pack, which needs a tokenizer; None packs none.
        corrected: a folder for copies of the files with their good lines alone; it must not hold such files yet.
        progress: called with bytes read and bytes in all.

    Raises:
        DataError: no such file, or a copy that is there already.
    """
    every = (*sources, *evaluation)
    targets = {} if corrected is None else _copies(every, corrected)
    encoder = None if tokenizer is None else SampleEncoder(tokenizer, config.tools_trained)
    packed = None if encoder is None or seq_len is None else _Packed(config, seq_len)
    report = DataReport()
    total, done = sum(file.stat().st_size for source in every for file in source.files), 0
    for place, source in enumerate(every):
        found = SourceReport(str(source.path), source.weight)
        report.sources.append(found)
        for path in source.files:
            good: list[bytes] = []
            lines = LineFile(path)
            for line, number in zip(lines, lines.numbers.tolist(), strict=True):
                found.lines += 1
                done += len(line) + 1
                try:
                    record = read_record(line, source.kind)
                    sample = None if encoder is None else encoder.encode(record)
                except RecordError as error:
                    report.problems.append(_problem(path, number, error))
                    continue
                finally:
                    progress(min(done, total), total)
                found.good += 1
                if path in targets:
                    good.append(line)
                if sample is not None and tokenizer is not None:
                    found.add(sample, seq_len)
                    report.sample = report.sample or marked_pieces(sample, tokenizer)
                    if packed is not None and place < len(sources):
                        packed.add(sample)
            if path in targets:
                _write_lines(targets[path], good)
                report.corrected.append(str(targets[path]))
    report.packing = None if packed is None else packed.finish()
    return report


class _Packed:
    """Counts the rows that samples fill."""

    def __init__(self, config: DataConfig, seq_len: int):
        self._packer: Packer = make_packer(config.packing, seq_len, config.packing_window)
        self._pairs = 0
        self._cuts = config.packing != "mistral-finetune"
        self._drops = config.long == "drop"
        self._report = PackingReport(seq_len)

    def add(self, sample: Sample | Pair) -> None:
        fitted: Any = sample
        if len(sample) > self._report.seq_len and (self._cuts or isinstance(sample, Pair)):
            fitted = None if self._drops else sample.cut(self._report.seq_len)
        if fitted is None:
            return
        if isinstance(fitted, Pair):  # a row for each side
            self._report.rows += 2
            self._count(fitted, _predictions(fitted), 0, len(fitted))
        else:
            self._take(self._packer.add(self._report.rows, fitted))

    def finish(self) -> PackingReport:
        self._take(self._packer.finish())
        return self._report

    def _take(self, rows: Any) -> None:
        for row in rows:
            self._report.rows += 1
            for segment in row.segments:
                self._count(segment.sample, len(segment), segment.start, segment.stop)

    def _count(self, sample: Sample | Pair, tokens: int, start: int, stop: int) -> None:
        self._report.tokens += tokens
        self._report.trained += sample.trained(start, stop)


def marked_pieces(sample: Sample | Pair, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The sample's text, control tokens by name, in pieces that are trained and pieces that are not.

    Of a pair it is the chosen one. A piece is decoded as a whole, so that characters of several tokens are shown;
    SentencePiece writes a space as ▁.
    """
    sample = sample.chosen if isinstance(sample, Pair) else sample
    pieces: list[tuple[list[int], bool]] = []
    for token, weight in zip(sample.ids.tolist(), sample.weights.tolist(), strict=True):
        if not pieces or pieces[-1][1] != (weight > 0):
            pieces.append(([], weight > 0))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids, keep_special=True), trained) for ids, trained in pieces]


def _predictions(sample: Sample | Pair) -> int:
    return len(sample.chosen) + len(sample.rejected) if isinstance(sample, Pair) else len(sample)


def _problem(path: Path, line: int, error: RecordError) -> LineProblem:
    return LineProblem(str(path), line, error.kind, error.field, error.found, error.expected)


def _copies(sources: Sequence[Source], folder: Path) -> dict[Path, Path]:
    """Where each file's copy goes: by its name, or its path within the source's folder."""
    targets: dict[Path, Path] = {}
    for path, source in _files(sources):
        name = path.relative_to(source.path.parent) if source.path.is_dir() else Path(path.name)
        target = folder / name
        if target in targets.values():
            raise DataError(f"{target}: two files of this name, expected one; validate them apart")
        if target.exists():
            raise DataError(f"{target}: exists already, and is not overwritten; expected another folder")
        targets[path] = target
    return targets


def _files(sources: Sequence[Source]) -> Iterator[tuple[Path, Source]]:
    for source in sources:
        for path in source.files:
            yield path, source


def _write_lines(path: Path, lines: Sequence[bytes]) -> None:
    """Writes the lines, under a name of its own until all are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        file.writelines(line + b"\n" for line in lines)
    os.replace(file.name, path)
