"""Packing, held against straightforward loops over whole lists, and the arrays that rows become."""

import random

import numpy as np
import pytest

from train.data.batches import PADDING_SEGMENT, fill_batch
from train.data.packing import CutAndContinue, FirstFit, OneEach, Packer, Row
from train.data.samples import Sample


def samples(seed: int, count: int, longest: int, trained: float = 0.7) -> list[Sample]:
    """Samples of random length with ids that tell them apart, some of their tokens trained."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        ids = [1000 * (number + 1) + place for place in range(draw.randint(2, longest + 1))]
        made.append(Sample.of(ids, [float(draw.random() < trained) for _ in ids]))
    return made


def packed(packer: Packer, given: list[Sample]) -> list[Row]:
    rows = [row for key, sample in enumerate(given) for row in packer.add(key, sample)]
    return [*rows, *packer.finish()]


def lengths_by_first_fit(lengths: list[int], seq_len: int, window: int) -> list[list[int]]:
    """Which samples share a row: bins as plain lists of numbers, sums taken anew at every look."""
    done: list[list[int]] = []
    bins: list[list[int]] = []
    for number, length in enumerate(lengths):
        for place in bins:
            if sum(lengths[i] for i in place) + length <= seq_len:
                place.append(number)
                break
        else:
            bins.append([number])
        full = [place for place in bins if sum(lengths[i] for i in place) == seq_len]
        if not full and len(bins) > window:
            most = max(sum(lengths[i] for i in place) for place in bins)
            full = [next(place for place in bins if sum(lengths[i] for i in place) == most)]
        done += full
        bins = [place for place in bins if place not in full]
    return done + bins


def cut_and_continued(given: list[Sample], seq_len: int) -> list[tuple[list[int], list[int], list[float], list[int]]]:
    """mistral-finetune's rows as inputs, targets, weights and segment sizes: one endless list, filled and cut."""
    rows: list[tuple[list[int], list[int], list[float], list[int]]] = []
    inputs: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    sizes: list[int] = []
    for sample in given:
        rest = [sample.ids[:-1].tolist(), sample.ids[1:].tolist(), sample.weights[1:].tolist()]
        while rest[0]:
            room = seq_len - len(inputs)
            piece, rest = [part[:room] for part in rest], [part[room:] for part in rest]
            if not any(piece[2]):
                continue
            inputs, targets, weights = inputs + piece[0], targets + piece[1], weights + piece[2]
            sizes.append(len(piece[0]))
            if len(inputs) == seq_len:
                rows.append((inputs, targets, weights, sizes))
                inputs, targets, weights, sizes = [], [], [], []
    return rows + ([(inputs, targets, weights, sizes)] if inputs else [])


@pytest.mark.parametrize("window", [1, 3, 50])
def test_first_fit_equals_bins_kept_by_hand(window):
    for seed in range(20):
        given = samples(seed, 60, longest=40)
        rows = packed(FirstFit(40, window), given)
        keys = [[segment.key for segment in row.segments] for row in rows]
        assert keys == lengths_by_first_fit([len(sample) for sample in given], 40, window)


def test_first_fit_keeps_every_sample_whole_and_no_more_rows_open_than_its_window():
    given = samples(1, 200, longest=64)
    packer, keys = FirstFit(64, 5), []
    for key, sample in enumerate(given):
        for row in packer.add(key, sample):
            keys += [
                segment.key for segment in row.segments if (segment.start, segment.stop) == (0, len(segment.sample))
            ]
        assert len(packer.open_rows) <= 5
    keys += [segment.key for row in packer.finish() for segment in row.segments]
    assert sorted(keys) == list(range(200))


def test_first_fit_fills_rows_better_with_a_wider_window():
    given = samples(2, 600, longest=300)
    rows = [len(packed(FirstFit(512, window), given)) for window in (1, 8, 64)]
    assert rows[0] > rows[1] > rows[2]
    assert sum(map(len, given)) / (512 * rows[2]) > 0.95


@pytest.mark.parametrize("trained", [0.7, 0.03])
def test_cut_and_continue_equals_mistral_finetunes_loop(trained):
    for seed in range(20):
        given = samples(seed, 25, longest=90, trained=trained)
        rows = packed(CutAndContinue(32), given)
        batch = fill_batch(rows, 32)
        expected = cut_and_continued(given, 32)
        assert len(rows) == len(expected)
        for place, (inputs, targets, weights, sizes) in enumerate(expected):
            end = len(inputs)
            assert batch.tokens[place, :end].tolist() == inputs
            assert batch.targets[place, :end].tolist() == targets
            assert batch.loss_weights[place, :end].tolist() == weights
            assert batch.positions[place, :end].tolist() == [i for size in sizes for i in range(size)]
            numbers = [number for number, size in enumerate(sizes, start=1) for _ in range(size)]
            assert batch.segment_ids[place, :end].tolist() == numbers


def test_one_each_gives_a_row_per_sample():
    given = samples(3, 5, longest=10)
    assert [[segment.key for segment in row.segments] for row in packed(OneEach(), given)] == [[0], [1], [2], [3], [4]]


def test_a_row_is_its_samples_side_by_side_and_then_padding_of_no_weight():
    first, second = Sample.of([5, 6, 7], [1, 1, 1]), Sample.of([8, 9], [0, 1])
    batch = fill_batch([*packed(FirstFit(6, 1), [first, second]), Row()], 6)
    assert batch.tokens.tolist() == [[5, 6, 8, 0, 0, 0], [0] * 6]
    assert batch.targets.tolist() == [[6, 7, 9, 0, 0, 0], [0] * 6]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[1, 1, 2, *[PADDING_SEGMENT] * 3], [PADDING_SEGMENT] * 6]
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
