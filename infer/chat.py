"""Conversations on top of a Generator: messages in; text, reasoning and tool calls out, told apart by token id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ministral_jax.errors import RequestError
from ministral_jax.parsing import (
    AssistantMessage,
    Event,
    OutputParser,
    ReasoningDelta,
    TextDelta,
)
from ministral_jax.tokenizer import Tokenizer

from .answer import FinishReason
from .sampling import SamplingParams
from .stopping import StopStrings

if TYPE_CHECKING:
    from .generate import Generator

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatPiece:
    """More of an answer, as it is to be read: control tokens and tool calls are not in it."""

    text: str
    reasoning: bool = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ChatReply:
    """A whole answer, why it ended, and how many tokens were read and written for it."""

    message: AssistantMessage
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int


class ChatStream:
    """The answer to a conversation while it comes: iterate for its pieces; `reply` is what has come so far.

    Nothing is computed before the first piece is asked for, and iteration may be left at any time.

    Attributes:
      messages: the conversation that is answered.
    """

    def __init__(
        self,
        generator: Generator,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Message] | None = None,
        reasoning_effort: str | None = None,
    ) -> None:
        """Renders the conversation; the arguments are those of `Tokenizer.encode_chat`, and how to choose tokens.

        Raises TokenizerError for messages that mistral-common refuses, RequestError without a tokenizer, or for images
        that the model does not read.
        """
        tokenizer = generator.tokenizer
        if tokenizer is None:
            raise RequestError("a conversation needs the model's tokenizer: give Generator one")
        params = params or SamplingParams()
        chat = tokenizer.encode_chat(messages, tools, reasoning_effort=reasoning_effort)
        if chat.images and generator.model.config.vision is None:
            raise RequestError(f"{len(chat.images)} images in the conversation: this model reads text only")
        self._parser = OutputParser(
            tokenizer,
            reasoning=_reasoning_is_open(tokenizer, chat.tokens),
            continuing=bool(messages[-1].get("prefix", False)),
        )
        self._stops = {kind: StopStrings(params.stop) for kind in (TextDelta, ReasoningDelta)}
        self.messages = tuple(messages)
        self._known_ids = tokenizer.vocabulary_size
        self._prompt_tokens = len(chat.tokens)
        self._pieces = generator.stream_ids([chat.tokens], params, images=[chat.images])
        self._events: list[Event] = []
        self._finish_reason: FinishReason = "length"
        self._new_tokens = 0

    def __iter__(self) -> Iterator[ChatPiece]:
        for piece in self._pieces:
            self._new_tokens += len(piece.ids)
            for token_id in piece.ids:
                if token_id < self._known_ids:  # an embedding may have more rows than the tokenizer has words
                    yield from self._take(self._parser.feed(token_id))
            self._finish_reason = piece.finish_reason or self._finish_reason
        yield from self._take(self._parser.finish())
        for kind, stops in self._stops.items():
            yield from self._take([kind(stops.finish())], certain=True)

    @property
    def reply(self) -> ChatReply:
        """The answer as far as it was iterated."""
        message = AssistantMessage.of(self._events)
        return ChatReply(message, self._finish_reason, self._prompt_tokens, self._new_tokens)

    def _take(self, events: Sequence[Event], *, certain: bool = False) -> Iterator[ChatPiece]:
        """Keeps what events add, cut before a stop string unless `certain`, and yields what is text."""
        for event in events:
            if isinstance(event, TextDelta | ReasoningDelta):
                kind = type(event)
                text = event.text if certain else self._stops[kind].push(event.text)
                if text:
                    self._events.append(kind(text))
                    yield ChatPiece(text, reasoning=kind is ReasoningDelta)
            else:
                self._events.append(event)


class ChatSession:
    """A conversation that goes on: keeps the messages, answers the last one.

    Attributes:
      messages: the conversation so far, as `Tokenizer.encode_chat` takes it.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        system: str | None = None,
        tools: Sequence[Message] | None = None,
        params: SamplingParams | None = None,
    ) -> None:
        self._generator, self._tools, self._params = generator, tools, params
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self._first)

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self.messages = list(self._first)

    def ask(self, text: str, images: Sequence[Any] = ()) -> ChatStream:
        """The answer to a user's message. Call `keep` when it has come, or the message is as if never sent.

        `images` are Pillow images, bytes of picture files or paths; they stand before the text.
        """
        pictures = [{"type": "image", "image": image} for image in images]
        content = [*pictures, {"type": "text", "text": text}] if pictures else text
        return self._stream([{"role": "user", "content": content}])

    def give_results(self, results: Mapping[str, str]) -> ChatStream:
        """The answer to the results of the last answer's tool calls, by call id."""
        return self._stream(
            [{"role": "tool", "tool_call_id": call_id, "content": result} for call_id, result in results.items()]
        )

    def keep(self, stream: ChatStream) -> ChatReply:
        """Adds what was asked and what was answered to the conversation; an empty answer leaves it as it was."""
        message = stream.reply.message
        if message.content or message.reasoning or message.tool_calls:
            self.messages = [*stream.messages, message.to_dict()]
        return stream.reply

    def _stream(self, asked: list[Message]) -> ChatStream:
        return ChatStream(self._generator, [*self.messages, *asked], self._params, tools=self._tools)


def _reasoning_is_open(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends inside [THINK]: the answer then begins as reasoning."""
    begin, end = tokenizer.special_id("[THINK]"), tokenizer.special_id("[/THINK]")
    last = next((token for token in reversed(prompt) if token in (begin, end)), None)
    return last is not None and last == begin
