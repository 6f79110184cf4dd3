"""One sequence while it is generated: tokens in, text and an end out. Host side, no arrays."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from .sampling import SamplingParams
from .stopping import StopStrings

FinishReason = Literal["stop", "length"]


@runtime_checkable
class TextStream(Protocol):
    """Turns token ids into text one at a time (see `ministral_jax.tokenizer`)."""

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a produced token and the likeliest alternatives, in nats."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one sequence gained: `finish_reason` is set on its last piece."""

    index: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """A finished sequence. `ids` leave out the prompt and the token that ended it."""

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_length: int
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer:
    """Collects the tokens of one sequence, decides when it ends, and hands out what is new."""

    def __init__(
        self, index: int, params: SamplingParams, limit: int, stop_ids: Collection[int], text: TextStream | None
    ) -> None:
        self._index, self._params, self._limit = index, params, limit
        self._stop_ids = frozenset(stop_ids)
        self._text = text
        self._stops = StopStrings(params.stop)
        self._produced = 0
        self._new_ids: list[int] = []
        self._new_text = ""
        self._new_logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: TokenLogprob) -> None:
        """Adds a token; ignored once the sequence has ended."""
        if self.finish_reason is not None:
            return
        self._produced += 1
        if token.id in self._stop_ids:
            self._end("stop")
            return
        self._new_ids.append(token.id)
        if self._params.logprobs is not None:
            self._new_logprobs.append(TokenLogprob(token.id, token.logprob, token.top[: self._params.logprobs]))
        if self._text is not None:
            self._new_text += self._stops.push(self._text.feed(token.id))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self._produced >= self._limit:
            self._end("length")

    def take(self) -> Piece | None:
        """What is new since the last call, or None."""
        if not self._new_ids and not self._new_text and self.finish_reason is None:
            return None
        piece = Piece(self._index, tuple(self._new_ids), self._new_text, tuple(self._new_logprobs), self.finish_reason)
        self._new_ids, self._new_text, self._new_logprobs = [], "", []
        return piece

    def _end(self, reason: FinishReason) -> None:
        if self._text is not None:
            self._new_text += self._stops.push(self._text.finish())
            self._new_text += self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else reason
