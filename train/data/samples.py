"""Samples: token ids with a weight each. How records become samples: tokens.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """Token ids of one sample.

    Attributes:
        ids: int32 [T + 1], bos and eos included.
        weights: float32 [T + 1]; how much predicting each id counts. The first has nothing before it to be
            predicted from, and 0.
    """

    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        """T, the predictions it holds, which is the place it takes in a row."""
        return len(self.ids) - 1

    def trained(self, start: int, stop: int) -> int:
        """How many of the predictions `start` to `stop` count."""
        return int(np.count_nonzero(self.weights[start + 1 : stop + 1]))

    def cut(self, length: int) -> "Sample | None":
        """Its first predictions, or None if none of them is trained."""
        return Sample(self.ids[: length + 1], self.weights[: length + 1]) if self.trained(0, length) else None

    @classmethod
    def of(cls, ids: list[int], weights: Any) -> "Sample":
        weights = np.asarray(weights, np.float32).copy()
        weights[:1] = 0
        return cls(np.asarray(ids, np.int32), weights)


@dataclass(frozen=True, eq=False)
class Pair:
    """The two samples of a preference; weights are 1 on the answers only."""

    chosen: Sample
    rejected: Sample

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    def trained(self, start: int, stop: int) -> int:
        """How many of the predictions `start` to `stop` of both count."""
        return self.chosen.trained(start, stop) + self.rejected.trained(start, stop)

    def cut(self, length: int) -> "Pair | None":
        """The pair with both cut, or None if nothing of an answer is left."""
        chosen, rejected = self.chosen.cut(length), self.rejected.cut(length)
        return None if chosen is None or rejected is None else Pair(chosen, rejected)
