"""Which line is drawn when: a sequence that depends on the seed and the files, and that can be entered anywhere.

Grain does the work: its shuffling is a permutation computed index by index, so nothing is kept in memory for it, and
its mixing keeps the sources' shares over any stretch of the sequence. This file alone imports Grain.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .config import DataConfig
from .formats import ChatRecord, DataError, RecordKind, read_record
from .messages import RecordError
from .sources import LineFile, Source, parse_sources

Element = TypeVar("Element")

_AHEAD = 32  # lines that threads read and tokenise before they are asked for


@dataclass(frozen=True)
class Address:
    """A line: which file, which of its lines, and how many of its messages (None: all)."""

    file: int
    line: int
    messages: int | None = None

    @classmethod
    def of(cls, entry: np.ndarray) -> "Address":
        """From a row of the table of entries, where -1 means all messages."""
        file, line, messages = entry.tolist()
        return cls(file, line, None if messages < 0 else messages)


class Corpus:
    """The files of a config, opened, and the sequence in which their lines are drawn."""

    def __init__(self, config: DataConfig, kinds: Sequence[RecordKind], seed: int):
        """Opens the sources of these kinds. Raises DataError where there is nothing to draw."""
        texts = {
            "pretrain": config.data,
            "instruct": config.instruct_data,
            "preference": config.preference_data,
        }
        self.sources = tuple(source for kind in kinds for source in parse_sources(texts[kind], kind))
        if not self.sources:
            fields = {"pretrain": "data.data", "instruct": "data.instruct_data", "preference": "data.preference_data"}
            raise DataError(f"{' and '.join(fields[kind] for kind in kinds)}: empty, expected files or folders")
        self.files = [LineFile(path) for source in self.sources for path in source.files]
        self._kinds: list[RecordKind | None] = [source.kind for source in self.sources for _ in source.files]
        self._entries = _entries(self.sources, self.files, config)
        for source, entries in zip(self.sources, self._entries, strict=True):
            if not len(entries):
                raise DataError(f"data source {source.path}: no lines in it")
        self.size = sum(map(len, self._entries))
        self._config = config
        self._seed = seed

    def digest(self) -> str:
        """Of all files' content and of the weights of the sources."""
        return json.dumps([[file.digest for file in self.files], [source.weight for source in self.sources]])

    def read(self, address: Address) -> Any:
        """The record at an address. Raises RecordError."""
        record = read_record(self.files[address.file][address.line], self._kinds[address.file])
        if address.messages is None or not isinstance(record, ChatRecord):
            return record
        return _beginning(record, address.messages)

    def where(self, address: Address) -> str:
        """The file and the line's number, for people."""
        file = self.files[address.file]
        return f"{file.path} line {file.numbers[address.line]}"

    def draws(self, make: Callable[[int, Address], Element]) -> "Draws[Element]":
        """The endless or finite sequence of `make(index, address)`."""
        dataset = self._dataset().map_with_index(lambda index, entry: make(index, Address.of(entry)))
        return Draws(dataset, self._config.read_threads)

    def _dataset(self) -> Any:
        grain = _grain()
        weighted = any(source.weight is not None for source in self.sources)
        pools = self._entries if weighted else [np.concatenate(self._entries)]
        seeds = np.random.SeedSequence(self._seed).generate_state(len(pools))
        datasets = [grain.MapDataset.source(pool) for pool in pools]
        if self._config.shuffle:
            datasets = [dataset.shuffle(int(seed)) for dataset, seed in zip(datasets, seeds, strict=True)]
        epochs = self._config.epochs
        if len(datasets) == 1:
            return datasets[0].repeat(epochs)
        if not self._config.shuffle and epochs is not None:  # evaluation: every line, source by source
            return grain.MapDataset.concatenate(datasets).repeat(epochs)
        weights = [1.0 if source.weight is None else source.weight for source in self.sources]
        mixed = grain.MapDataset.mix([dataset.repeat() for dataset in datasets], weights)
        return mixed if epochs is None else mixed.slice(slice(0, epochs * self.size))


class Draws(Iterator[Element]):
    """A sequence by index, and an iterator over it that reads ahead."""

    def __init__(self, dataset: Any, threads: int):
        self._dataset = dataset
        self._threads = threads
        self._iterator: Iterator[Element] | None = None
        self.next_index = 0

    def at(self, index: int) -> Element:
        """The element of an index, made again."""
        return self._dataset[index]

    def go_to(self, index: int) -> None:
        """The next element is that of `index`."""
        self.next_index = index
        self._iterator = None

    def __next__(self) -> Element:
        if self._iterator is None:
            options = _grain().ReadOptions(num_threads=self._threads, prefetch_buffer_size=_AHEAD * (self._threads > 0))
            ahead = self._dataset.slice(slice(self.next_index, len(self._dataset))).to_iter_dataset(options)
            self._iterator = iter(ahead)
        element = next(self._iterator)
        self.next_index += 1
        return element


def _grain() -> Any:
    try:
        import grain
    except ModuleNotFoundError as error:
        raise DataError(f"training data needs {error.name}: pip install 'ministral-jax[train]'") from error
    return grain


def _entries(sources: Sequence[Source], files: Sequence[LineFile], config: DataConfig) -> list[np.ndarray]:
    """For each source the addresses of its lines, int64 [lines, 3], in the order of its files."""
    entries: list[np.ndarray] = []
    place = 0
    for source in sources:
        found = [np.zeros((0, 3), np.int64)]
        for number in range(place, place + len(source.files)):
            lines = np.arange(len(files[number]))
            found.append(np.stack([np.full_like(lines, number), lines, np.full_like(lines, -1)], axis=1))
            if config.tool_prefixes and source.kind == "instruct":
                extra = [(number, line, n) for line in lines.tolist() for n in _prefixes(files[number][line])]
                found.append(np.asarray(extra, np.int64).reshape(-1, 3))
        entries.append(np.concatenate(found))
        place += len(source.files)
    return entries


def _prefixes(line: bytes) -> list[int]:
    """How many messages each shorter beginning has that ends in an answer, longest first."""
    try:
        record = read_record(line, "instruct")
    except RecordError:  # it will be told when it is drawn
        return []
    if not isinstance(record, ChatRecord) or not (record.tools or record.only_last):
        return []
    answers = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
    return [place + 1 for place in reversed(answers[:-1])]


def _beginning(record: ChatRecord, count: int) -> ChatRecord:
    return ChatRecord(
        messages=record.messages[:count],
        tools=record.tools,
        only_last=record.only_last,
        reasoning_effort=record.reasoning_effort,
        messages_field=record.messages_field,
        tools_field=record.tools_field,
    )
