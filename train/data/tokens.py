"""Records as token ids with a weight each: 1 where it is trained. Every id comes from mistral-common, none from us.

A conversation is encoded in one piece by mistral-common's own template under its fine-tuning rules, and while it does
so the ids of each message are noted. Nothing is rendered to text and tokenised again, and nothing is concatenated.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from mistral_common.exceptions import InvalidToolException, InvalidToolSchemaException
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer, get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from mistral_common.protocol.instruct.tool_calls import ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator

from ministral_jax.chat_request import REQUEST_FAILURES, chat_request
from ministral_jax.errors import TokenizerError
from ministral_jax.tokenizer import Tokenizer
from ministral_jax.tokenizer_files import one_line

from .call_ids import call_id_tokens
from .formats import ChatRecord, PairRecord, Record, TextRecord
from .messages import RecordError
from .samples import Pair, Sample

_ALLOWED = "what mistral-common accepts for this tokenizer"
_VERSIONS_WITH_CALL_IDS = ("v3", "v7", "v11")


class SampleEncoder:
    """Makes samples of records for one tokenizer. Keeps nothing between records; threads may share it."""

    def __init__(self, tokenizer: Tokenizer, tools_trained: str = "all"):
        self._tokenizer = tokenizer
        self._tools_trained = tools_trained
        self._template: Any = tokenizer.mistral.instruct_tokenizer
        vocabulary = self._template.tokenizer
        self._validator = get_validator(vocabulary.version, ValidationMode.finetuning)
        self._normalizer = _weighted_normalizer(
            get_normalizer(vocabulary.version, vocabulary.model_settings_builder), vocabulary.model_settings_builder
        )

    def encode(self, record: Record) -> Sample | Pair:
        """The sample of a record, or the two of a pair.

        Raises:
            RecordError: mistral-common refuses it ("chat"), or none of its tokens is trained ("empty").
        """
        if isinstance(record, TextRecord):
            ids = self._tokenizer.encode(record.text, bos=True, eos=True)
            return Sample.of(ids, np.ones(len(ids)))
        if isinstance(record, PairRecord):
            return Pair(self._encode_chat(record.chosen), self._encode_chat(record.rejected))
        return self._encode_chat(record)

    def _encode_chat(self, record: ChatRecord) -> Sample:
        request = self._request(record)
        try:
            self._validator.validate_request(request)
            normalized: Any = self._normalizer.from_chat_completion_request(request)
            self._remove_last_call_ids(normalized.messages)
            tokenized, pieces = _encode_apart(self._template, normalized)
        except REQUEST_FAILURES as error:
            field = self._field_of(error, request, record)
            raise RecordError("chat", field, one_line(error), _ALLOWED) from error
        last_only = record.only_last or (bool(record.tools) and self._tools_trained == "last")
        weights = self._weights(pieces, last_only)
        if not weights.any():
            raise RecordError("empty", record.messages_field, "no trained token", "an assistant message of weight 1")
        return Sample.of(tokenized, weights)

    def _request(self, record: ChatRecord) -> ChatCompletionRequest:
        """mistral-common's request, its assistant messages with their weights."""
        messages = [message.fields() for message in record.messages]
        _name_last_calls(messages)
        try:
            request = chat_request(messages, list(record.tools) or None, record.reasoning_effort)
        except TokenizerError as error:
            raise _located(error, record) from error
        weighted = [
            FinetuningAssistantMessage(content=said.content, tool_calls=said.tool_calls, weight=message.weight)
            if isinstance(said, AssistantMessage)
            else said
            for said, message in zip(request.messages, record.messages, strict=True)
        ]
        return request.model_copy(update={"messages": weighted})

    def _remove_last_call_ids(self, messages: list[Any]) -> None:
        """Nothing answers the calls of a last message, so that their random ids would only be predicted."""
        last = messages[-1]
        if last.tool_calls and self._tokenizer.version in _VERSIONS_WITH_CALL_IDS:
            messages[-1] = last.model_copy(
                update={"tool_calls": [ToolCall(function=call.function) for call in last.tool_calls]}
            )

    def _weights(self, pieces: list[tuple[Any, list[int]]], last_only: bool) -> np.ndarray:
        """1 for the ids of weighted assistant messages but for their call ids; float32 [T + 1]."""
        weights = [np.zeros(len(self._template.start()), np.float32)]
        for place, (message, ids) in enumerate(pieces):
            answer = isinstance(message, FinetuningAssistantMessage)
            trained = answer and message.weight != 0 and (not last_only or place == len(pieces) - 1)
            piece = np.full(len(ids), float(trained), np.float32)
            if trained and message.tool_calls:
                piece[call_id_tokens(self._tokenizer, ids)] = 0
            weights.append(piece)
        return np.concatenate(weights)

    def _field_of(self, error: BaseException, request: ChatCompletionRequest, record: ChatRecord) -> str:
        """The tool or message that mistral-common refuses, found by asking again for less."""
        version = self._template.tokenizer.version
        if isinstance(error, InvalidToolException | InvalidToolSchemaException):
            exchange = [UserMessage(content="a"), AssistantMessage(content="b")]
            for place, tool in enumerate(request.tools or []):
                alone: Any = ChatCompletionRequest(messages=exchange, tools=[tool])
                if _refusal(lambda alone=alone: self._validator.validate_request(alone)) is not None:
                    return f"{record.tools_field}[{place}]"
            return record.tools_field
        anywhere = get_validator(version, ValidationMode.agnostic)
        for end in range(1, len(request.messages) + 1):
            beginning: Any = request.messages[:end]
            if _refusal(lambda beginning=beginning: anywhere.validate_messages(beginning)) == str(error):
                return record.messages[end - 1].field
        return record.messages_field


def _weighted_normalizer(plain: Any, settings: Any) -> InstructRequestNormalizer:
    """The same rules, keeping the weights of assistant messages."""
    return type(plain)(UserMessage, FinetuningAssistantMessage, ToolMessage, SystemMessage, InstructRequest, settings)


def _encode_apart(template: Any, request: Any) -> tuple[list[int], list[tuple[Any, list[int]]]]:
    """The ids that the template gives for a request, and each message with its part of them, in order.

    The template encodes message by message and puts the parts together; a copy of it is made to note them.
    """
    noting = copy.copy(template)
    pieces: list[tuple[Any, list[int]]] = []
    for role in ("user", "assistant", "tool", "system"):
        name = f"encode_{role}_message"
        setattr(noting, name, functools.partial(_encode_and_note, getattr(template, name), pieces))
    noting.decode = _no_text  # it would take three quarters of the time, for a text that nobody reads
    ids = list(noting.encode_instruct(request).tokens)
    if ids != [*template.start(), *(token for _, piece in pieces for token in piece)]:
        raise AssertionError("mistral-common's ids are not those of its messages put together")
    return ids, pieces


def _no_text(**_: Any) -> str:
    return ""


def _encode_and_note(encode: Callable[..., Any], pieces: list[Any], message: Any, *args: Any, **kwargs: Any) -> Any:
    """Encodes a message and notes its ids; the template gives them alone, or with images and sounds."""
    encoded = encode(message, *args, **kwargs)
    pieces.append((message, encoded[0] if isinstance(encoded, tuple) else encoded))
    return encoded


def _name_last_calls(messages: list[dict[str, Any]]) -> None:
    """Ids for the calls of the last message that have none: mistral-common asks for them, and they are removed."""
    for place, call in enumerate(messages[-1].get("tool_calls", ())):
        call.setdefault("id", f"call{place:05d}")


def _located(error: TokenizerError, record: ChatRecord) -> RecordError:
    """A refusal in converting, whose message begins with messages[i] or tools[i], as one of the line's own fields."""
    where, _, reason = str(error).partition(": ")
    name, _, place = where.partition("[")
    if name == "messages" and place:
        number, _, rest = place.partition("]")
        return RecordError("chat", record.messages[int(number)].field + rest, reason, _ALLOWED)
    field = record.tools_field + where.removeprefix("tools") if name == "tools" else record.messages_field
    return RecordError("chat", field, reason, _ALLOWED)


def _refusal(check: Callable[[], object]) -> str | None:
    """Why mistral-common refuses, or None where it does not."""
    try:
        check()
    except REQUEST_FAILURES as error:
        return str(error)
    return None
