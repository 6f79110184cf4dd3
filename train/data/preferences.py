"""Batches of preference pairs, one pair a row. What is learned from them is no concern of this file."""

from collections.abc import Sequence
from typing import NamedTuple

from ministral_jax.tokenizer import Tokenizer

from .batches import Batch, fill_batch
from .config import DataConfig
from .order import Corpus
from .packing import OneEach, Row, Segment
from .pipeline import Batches, BatchShape, fingerprint
from .tokens import SampleEncoder


class PairBatch(NamedTuple):
    """Row i of both is one pair; `loss_weights` are 1 on the answers, and 0 in a row that only fills up the batch."""

    chosen: Batch
    rejected: Batch


def open_pairs(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches[PairBatch]:
    """Batches of the config's preference pairs; the arguments, and what it raises, are `open_data`'s.

    A pair is not packed. Where one of its conversations is longer than `seq_len`, both are cut or the pair is dropped.
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


def fill_pairs(rows: Sequence[Row], seq_len: int) -> PairBatch:
    """The batch of rows that hold one pair each; an empty row is padding in both."""
    chosen, rejected = (
        [
            Row(
                Segment(part.key, getattr(part.sample, side), 0, len(getattr(part.sample, side)))
                for part in row.segments
            )
            for row in rows
        ]
        for side in ("chosen", "rejected")
    )
    return PairBatch(fill_batch(chosen, seq_len), fill_batch(rejected, seq_len))
