"""From a config to batches: lines drawn, tokenised, packed, and handed out a share per host. State goes out and in."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from ministral_jax.errors import MinistralError
from ministral_jax.tokenizer import Tokenizer

from .batches import Batch, fill_batch
from .config import DataConfig
from .formats import DataError
from .messages import RecordError
from .order import Address, Corpus
from .packing import Packer, Row, make_packer
from .samples import Pair, Sample
from .tokens import SampleEncoder

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

_STATE_FORMAT = 1
_PROBE = "Two tokenizers that split this alike, 1234567890, öäüß, 你好, привет, {'a': [None]}, are one."
_TOLD_LINES = 5  # bad lines shown one by one; `ministral data validate` shows all


@dataclass
class Counts:
    """What has been read and handed out since the beginning, over all hosts.

    Attributes:
        rows: rows of batches, those of padding left out.
        samples: lines that were put into rows.
        tokens, trained: predictions in rows, and those of them with a weight.
        cut, dropped: samples too long for a row that lost their end, and that were left out.
        bad, untrained: lines that are no valid record, and samples left without a trained token by cutting.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    untrained: int = 0


@dataclass(frozen=True)
class _Draw:
    """What a line became: samples, or why there is none."""

    index: int
    address: Address
    sample: Sample | Pair | None = None
    problem: RecordError | None = field(default=None, compare=False)


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches[Batch]":
    """Batches of the config's text and conversations; see the package's first page.

    Args:
        config: the sources and how they are trained and packed.
        tokenizer: of the model.
        seq_len: T, predictions per row.
        batch_size: B of the global batch.
        seed: of the order; the same seed gives the same batches.
        process_index, process_count: this host and how many there are; it gets B / process_count rows.

    Raises:
        MinistralError: no such files, nothing in them, sizes that do not divide, or Grain is not installed.
    """
    return Batches(
        Corpus(config, ("pretrain", "instruct"), seed),
        SampleEncoder(tokenizer, config.tools_trained),
        make_packer(config.packing, seq_len, config.packing_window),
        fill_batch,
        BatchShape(seq_len, batch_size, process_index, process_count),
        fingerprint(config, tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed),
        cuts_itself=config.packing == "mistral-finetune",
        drops_long=config.long == "drop",
    )


@dataclass(frozen=True)
class BatchShape:
    """Rows and tokens of the global batch, and which of its rows are this host's."""

    seq_len: int
    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "process_count"):
            if getattr(self, name) < 1:
                raise MinistralError(f"{name}: {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.process_count:
            raise MinistralError(f"batch_size: {self.batch_size} rows do not divide among {self.process_count} hosts")
        if not 0 <= self.process_index < self.process_count:
            raise MinistralError(f"process_index: {self.process_index}, expected 0 to {self.process_count - 1}")

    @property
    def local_rows(self) -> slice:
        """This host's rows of the global batch."""
        share = self.batch_size // self.process_count
        return slice(self.process_index * share, (self.process_index + 1) * share)


class Batches(Iterator[Made], Generic[Made]):
    """This host's batches, and the place reached, which can be stored and gone back to.

    Attributes:
        counts: what has been read and handed out so far.
        samples: lines that one pass draws, the bad ones included.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: SampleEncoder,
        packer: Packer,
        fill: Callable[[Sequence[Row], int], Made],
        shape: BatchShape,
        fingerprint: dict[str, Any],
        *,
        cuts_itself: bool,
        drops_long: bool,
    ):
        """Use `open_data` or `open_pairs`. `cuts_itself`: the packer takes samples of any length."""
        self.counts = Counts()
        self.samples = corpus.size
        self._corpus = corpus
        self._encoder = encoder
        self._packer = packer
        self._fill = fill
        self._shape = shape
        self._fingerprint = fingerprint
        self._cuts_itself = cuts_itself
        self._drops_long = drops_long
        self._draws = corpus.draws(self._make)
        self._ready: list[Row] = []
        self._finished = False
        self._fruitless = 0
        self._told: set[Address] = set()

    def __next__(self) -> Made:
        """The next batch's rows of this host. Raises StopIteration after the last of a number of epochs.

        Raises:
            DataError: a whole pass over the data gave nothing to train on.
        """
        while len(self._ready) < self._shape.batch_size and not self._finished:
            self._draw()
        rows, self._ready = self._ready[: self._shape.batch_size], self._ready[self._shape.batch_size :]
        if not rows:
            raise StopIteration
        self._count(rows)
        rows += [Row() for _ in range(self._shape.batch_size - len(rows))]
        return self._fill(rows[self._shape.local_rows], self._shape.seq_len)

    @property
    def fill_rate(self) -> float:
        """The share of the rows handed out that is not padding; 1 before there is any."""
        return self.counts.tokens / (self.counts.rows * self._shape.seq_len) if self.counts.rows else 1.0

    def state(self) -> dict[str, Any]:
        """The place reached, as a JSON document, the same on every host: what follows depends on it alone."""
        return {
            "format": _STATE_FORMAT,
            "fingerprint": self._fingerprint | {"data": _short(self._corpus.digest())},
            "next": self._draws.next_index,
            "finished": self._finished,
            "open": [row.plain() for row in self._packer.open_rows],
            "ready": [row.plain() for row in self._ready],
            "counts": asdict(self.counts),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` told, of this or another number of hosts.

        Raises:
            DataError: the data, the tokenizer, or what decides the order is not what it was.
        """
        now = self.state()
        if state.get("format") != _STATE_FORMAT:
            raise DataError(f"data state: format {state.get('format')!r}, expected {_STATE_FORMAT}")
        changed = [key for key, value in now["fingerprint"].items() if state["fingerprint"].get(key) != value]
        if changed:
            raise DataError(f"data state: {', '.join(changed)} changed since it was stored; begin a new run for that")
        samples: dict[int, Any] = {}

        def sample_of(key: int) -> Any:
            if key not in samples:
                samples[key] = self._fitted(self._draws.at(key).sample)
            return samples[key]

        self._packer.open_rows = [Row.restored(row, sample_of) for row in state["open"]]
        self._ready = [Row.restored(row, sample_of) for row in state["ready"]]
        self._finished = state["finished"]
        self._fruitless = 0
        self.counts = Counts(**state["counts"])
        self._draws.go_to(state["next"])

    def _make(self, index: int, address: Address) -> _Draw:
        """Reads and tokenises one line; runs in threads, and so keeps nothing."""
        try:
            return _Draw(index, address, self._encoder.encode(self._corpus.read(address)))
        except RecordError as problem:
            return _Draw(index, address, problem=problem)

    def _draw(self) -> None:
        """One more line into the packer."""
        draw = next(self._draws, None)
        if draw is None:
            self._finished = True
            self._ready += self._packer.finish()
            return
        sample = self._fitted(draw.sample, counted=True)
        if draw.problem is not None:
            self._tell(draw.address, draw.problem)
        self._fruitless = 0 if sample is not None else self._fruitless + 1
        if self._fruitless > 2 * self._corpus.size:
            raise DataError(
                f"{self._corpus.size} lines, and none of them gives anything to train on: "
                "`ministral data validate` says why"
            )
        if sample is not None:
            self.counts.samples += 1
            self._ready += self._packer.add(draw.index, sample)

    def _fitted(self, sample: Any, counted: bool = False) -> Any:
        """The sample as it goes into rows: cut to a row's length, or None if nothing of it is left."""
        if sample is None or self._cuts_itself or len(sample) <= self._shape.seq_len:
            return sample
        if self._drops_long:
            self.counts.dropped += counted
            return None
        sample = sample.cut(self._shape.seq_len)
        self.counts.cut += counted
        if sample is None:
            self.counts.untrained += counted
        return sample

    def _tell(self, address: Address, problem: RecordError) -> None:
        """Counts a bad line and, the first time round, says what is wrong with it."""
        if address.messages is not None:  # the line itself tells; a shorter beginning may well have nothing to train
            return
        self.counts.bad += 1
        if address in self._told:
            return
        self._told.add(address)
        if len(self._told) <= _TOLD_LINES:
            logger.warning("%s: %s: left out", self._corpus.where(address), problem)
        if len(self._told) == _TOLD_LINES:
            logger.warning("bad lines are only counted from here on: `ministral data validate` lists them")

    def _count(self, rows: Sequence[Row]) -> None:
        self.counts.rows += len(rows)
        for segment in (segment for row in rows for segment in row.segments):
            self.counts.tokens += len(segment)
            self.counts.trained += segment.sample.trained(segment.start, segment.stop)


def fingerprint(config: DataConfig, tokenizer: Tokenizer, **sizes: int) -> dict[str, Any]:
    """What decides the sequence of batches beside the files' content; paths may change."""
    options = asdict(config)
    for key in ("data", "instruct_data", "preference_data", "read_threads"):
        del options[key]
    behaviour = [tokenizer.version, tokenizer.vocabulary_size, *tokenizer.encode(_PROBE, bos=True, eos=True)]
    return sizes | options | {"tokenizer": _short(str(behaviour))}


def _short(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
