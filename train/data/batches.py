"""Rows as the arrays that a training step takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from .packing import Row

PADDING_SEGMENT = 0


class Batch(NamedTuple):
    """A batch on the host; a pytree of numpy arrays.

    Attributes:
        tokens: what the model reads; 0 in padding.
        targets: the token after each of `tokens`, within its segment.
        loss_weights: how much predicting `targets` counts; 0 in prompts and padding.
        positions: from 0 in each segment, and in the padding as well.
        segment_ids: 1, 2, ... in each row, and 0 in padding, which so sees nothing but itself in flash_attention.
    """

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]
    loss_weights: Float32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]


def empty_batch(rows: int, seq_len: int) -> Batch:
    """A batch of padding."""
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))  # [B, T]
    integers = [np.zeros((rows, seq_len), np.int32) for _ in range(3)]
    tokens, targets, segment_ids = integers
    return Batch(tokens, targets, np.zeros((rows, seq_len), np.float32), positions, segment_ids + PADDING_SEGMENT)


def fill_batch(rows: Sequence[Row], seq_len: int) -> Batch:
    """The batch of these rows; an empty row is padding.

    A segment that goes on with a cut sample begins at position 0 again, as in mistral-finetune.
    """
    batch = empty_batch(len(rows), seq_len)
    for place, row in enumerate(rows):
        end = 0
        for number, segment in enumerate(row.segments, start=1):
            begin, end = end, end + len(segment)
            read, predicted = slice(segment.start, segment.stop), slice(segment.start + 1, segment.stop + 1)
            batch.tokens[place, begin:end] = segment.sample.ids[read]
            batch.targets[place, begin:end] = segment.sample.ids[predicted]
            batch.loss_weights[place, begin:end] = segment.sample.weights[predicted]
            batch.positions[place, begin:end] = np.arange(len(segment))
            batch.segment_ids[place, begin:end] = number
        batch.positions[place, end:] = np.arange(seq_len - end)
    return batch
