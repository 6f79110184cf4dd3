"""Batches of preference pairs, two rows a pair. What is learned from them is no concern of this file."""

from collections.abc import Sequence

from ministral_jax.tokenizer import Tokenizer

from .batches import Batch, fill_batch
from .config import DataConfig
from .order import Corpus
from .packing import OneEach, Row, Segment
from .pipeline import Batches, BatchShape, fingerprint
from .tokens import SampleEncoder

ROWS = 2  # of a pair


def open_pairs(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[Batch]:
    """Batches of the config's preference pairs, `batch_size` of them; the rest, and what it raises, are `open_data`'s.

    Rows 2 i and 2 i + 1 are the chosen and the rejected conversation of pair i, whose `loss_weights` are 1 on the
    answers; both are padding where a pair only fills up the batch. A pair is not packed. Where one of its conversations
    is longer than `seq_len`, both are cut or the pair is dropped.
    """
    return Batches(
        Corpus(config, ("preference",), seed),
        SampleEncoder(tokenizer, config.tools_trained),
        OneEach(),
        fill_pairs,
        BatchShape(seq_len, batch_size, process_index, process_count),
        fingerprint(config, tokenizer, seq_len=seq_len, batch_size=batch_size, seed=seed),
        cuts_itself=False,
        drops_long=config.long == "drop",
    )


def fill_pairs(rows: Sequence[Row], seq_len: int) -> Batch:
    """The batch of rows that hold one pair each; an empty row is padding, twice."""
    apart = [Row(_side(segment, side) for segment in row.segments) for row in rows for side in ("chosen", "rejected")]
    return fill_batch(apart, seq_len)


def _side(segment: Segment, side: str) -> Segment:
    sample = getattr(segment.sample, side)
    return Segment(segment.key, sample, 0, len(sample))
