"""Which tokens of a sequence lie on which shard of the context axis: arithmetic of runs of tokens, no communication."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jax import lax
from jaxtyping import Array, Int

from ..errors import ShardingError

Split = Literal["contiguous", "zigzag"]
RUNS_PER_SHARD: dict[Split, int] = {"contiguous": 1, "zigzag": 2}


class Chunks(NamedTuple):
    """Sequences cut into equal runs of tokens, `per_shard` to each of `shards`; runs are numbered along the sequence.

    The first slot of shard c holds run c; its second, if it has two, run `2C - 1 - c`: an early run and a late one.
    """

    axis_name: str
    shards: int
    per_shard: int
    length: int  # tokens of a run

    @staticmethod
    def of(n_tokens: int, axis_name: str, split: Split) -> Chunks:
        """From the tokens that one shard holds; inside shard_map. Raises ShardingError where they do not divide."""
        per_shard = _runs_per_shard(split)
        if n_tokens % per_shard:
            raise ShardingError(
                f"a shard of {axis_name!r} holds {n_tokens} tokens: expected an even number, split={split!r} halves it"
            )
        return Chunks(axis_name, lax.axis_size(axis_name), per_shard, n_tokens // per_shard)

    @staticmethod
    def across(length: int, shards: int, split: Split) -> Chunks:
        """From the whole sequence. Raises ShardingError where it does not divide."""
        per_shard = _runs_per_shard(split)
        runs = per_shard * shards
        if length % runs:
            raise ShardingError(f"{length} tokens do not divide into {runs} runs for {shards} shards, split={split!r}")
        return Chunks("context", shards, per_shard, length // runs)

    def at(self, shard: int, slot: int) -> int:
        """Number of the run in a slot of a shard."""
        return 2 * self.shards - 1 - shard if slot else shard

    def owner(self, number: int) -> tuple[int, int]:
        """Shard and slot of a run."""
        return (2 * self.shards - 1 - number, 1) if number >= self.shards else (number, 0)

    def number(self, slot: int) -> Int[Array, ""]:
        """Number of the run in a slot of this shard; inside shard_map."""
        shard = lax.axis_index(self.axis_name)
        return 2 * self.shards - 1 - shard if slot else shard

    def routes(self, slot: int, hop: int) -> dict[int, list[tuple[int, int]]]:
        """Where the runs `hop` before those of `slot` come from: source slot -> (source shard, target shard) pairs.

        Shards that have no such run are left out.
        """
        found: dict[int, list[tuple[int, int]]] = {}
        for shard in range(self.shards):
            number = self.at(shard, slot) - hop
            if number >= 0:
                source, source_slot = self.owner(number)
                found.setdefault(source_slot, []).append((source, shard))
        return found


def _runs_per_shard(split: Split) -> int:
    if split not in RUNS_PER_SHARD:
        raise ShardingError(f"split={split!r}: expected one of {', '.join(RUNS_PER_SHARD)}")
    return RUNS_PER_SHARD[split]
