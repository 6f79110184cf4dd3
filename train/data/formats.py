"""One line of a jsonl file made into a record: text, a conversation, or a preference pair. Nothing is tokenised here.

A line that is none of these raises RecordError, which names the field. The shapes are mistral-finetune's
(finetune/data/tokenize.py there), and for pairs the two that are common on the Hugging Face hub.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ministral_jax.errors import MinistralError

from .messages import Message, RecordError, check_messages, check_tools, missing, shown

RecordKind = Literal["pretrain", "instruct", "preference"]

_TEXT_KEYS = ("text", "content")
_MESSAGE_KEYS = ("messages", "interactions")
_TOOL_KEYS = ("tools", "available_tools")
_PAIR_KEYS = ("chosen", "rejected")
_USED = (*_TEXT_KEYS, *_MESSAGE_KEYS, *_TOOL_KEYS, *_PAIR_KEYS, "prompt", "system_prompt", "only_last")


@dataclass(frozen=True)
class TextRecord:
    """Text to pretrain on; every token of it is trained."""

    text: str


@dataclass(frozen=True)
class ChatRecord:
    """A conversation. `only_last`: of its assistant messages, the last alone is trained.

    `messages_field` and `tools_field` are what the line calls them, for those who report about it.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    only_last: bool = False
    reasoning_effort: str | None = None
    messages_field: str = "messages"
    tools_field: str = "tools"


@dataclass(frozen=True)
class PairRecord:
    """Two conversations with the same beginning; only what follows it is trained."""

    chosen: ChatRecord
    rejected: ChatRecord


Record = TextRecord | ChatRecord | PairRecord


def read_record(line: bytes, kind: RecordKind | None = None) -> Record:
    """The record of a line, of a certain kind or of the kind that its keys tell.

    Raises:
        RecordError: the line is not JSON, or not such a record.
    """
    document = _parse(line)
    if not isinstance(document, dict):
        raise RecordError("record", "line", shown(document), "a JSON object")
    for key in _USED:
        if key in document:
            _check_values(document[key], key)
    kind = kind or _kind_of(document)
    if kind == "pretrain":
        return TextRecord(_text(document))
    return _pair(document) if kind == "preference" else _chat(document)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecordError("json", "line", f"byte {error.start} is not UTF-8", "a JSON object") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg} at character {error.pos + 1}" if line.strip() else "nothing"
        raise RecordError("json", "line", found, "a JSON object") from None
    except (RecursionError, ValueError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise RecordError("json", "line", found, "a JSON object") from None


def _check_values(value: Any, field: str) -> None:
    """Raise for what json reads although it is no JSON (NaN), and for text that has no UTF-8 (lone surrogates)."""
    pending = [(value, field)]
    while pending:
        value, field = pending.pop()
        if isinstance(value, str):
            _check_text(value, field)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RecordError("json", field, str(value), "a finite number")
        elif isinstance(value, list):
            pending += [(inner, f"{field}[{place}]") for place, inner in enumerate(value)]
        elif isinstance(value, dict):
            for key, inner in value.items():
                _check_text(key, field)
                pending.append((inner, f"{field}.{key}" if key.isidentifier() else f"{field}[{shown(key)}]"))


def _check_text(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("json", field, f"lone surrogate at character {error.start + 1}", "valid Unicode") from None


def _kind_of(document: Mapping[str, Any]) -> RecordKind:
    if any(key in document for key in _PAIR_KEYS):
        return "preference"
    if any(key in document for key in _MESSAGE_KEYS):
        return "instruct"
    if any(key in document for key in _TEXT_KEYS):
        return "pretrain"
    raise RecordError("record", "messages", f"keys {shown(list(document))}", "messages, text, or chosen and rejected")


def _text(document: Mapping[str, Any]) -> str:
    key = _one_key(document, _TEXT_KEYS)
    text = document[key]
    if not isinstance(text, str):
        raise RecordError("record", key, shown(text), "text")
    if not text:
        raise RecordError("empty", key, "no text", "something to train on")
    return text


def _one_key(document: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """Which of two spellings the record uses; null counts as absent."""
    found = [key for key in keys if document.get(key) is not None]
    if len(found) > 1:
        raise RecordError("record", found[1], f"{found[0]} and {found[1]}", "one of them, they mean the same")
    if not found:
        raise missing("record", next((key for key in keys if key in document), keys[0]), f"{' or '.join(keys)}")
    return found[0]


def _chat(document: Mapping[str, Any]) -> ChatRecord:
    key = _one_key(document, _MESSAGE_KEYS)
    messages = _with_system_prompt(document, check_messages(document[key], key))
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("empty", key, "no assistant message", "at least one to train on")
    tools_key, tools = _tools(document)
    return ChatRecord(
        messages=messages,
        tools=tools,
        only_last=_flag(document, "only_last"),
        reasoning_effort=_effort(document),
        messages_field=key,
        tools_field=tools_key,
    )


def _with_system_prompt(document: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    prompt = document.get("system_prompt")
    if prompt is None:
        return messages
    if not isinstance(prompt, str):
        raise RecordError("record", "system_prompt", shown(prompt), "text")
    if any(message.role == "system" for message in messages):
        raise RecordError("record", "system_prompt", "a system message as well", "one of them")
    return (Message(role="system", content=prompt, field="system_prompt"), *messages)


def _tools(document: Mapping[str, Any]) -> tuple[str, tuple[dict[str, Any], ...]]:
    if all(document.get(key) is None for key in _TOOL_KEYS):
        return _TOOL_KEYS[0], ()
    key = _one_key(document, _TOOL_KEYS)
    return key, check_tools(document[key], key)


def _flag(document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key)
    if value is not None and not isinstance(value, bool):
        raise RecordError("record", key, shown(value), "true or false")
    return bool(value)


def _effort(document: Mapping[str, Any]) -> str | None:
    effort = document.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise RecordError("record", "reasoning_effort", shown(effort), "text such as none or high")
    return effort


def _pair(document: Mapping[str, Any]) -> PairRecord:
    """A pair in either shape: a shared prompt and two answers, or two whole conversations."""
    for key in _PAIR_KEYS:
        if document.get(key) is None:
            raise missing("record", key, "text, a message, or a list of messages")
    prompt = _prompt(document)
    chosen, rejected = (_answered(document, key, prompt) for key in _PAIR_KEYS)
    if prompt is None:
        shared = _shared_length(chosen, rejected)
        chosen, rejected = (_untrained_before(messages, shared) for messages in (chosen, rejected))
    tools_key, tools = _tools(document)
    effort = _effort(document)
    records = [
        ChatRecord(messages, tools, False, effort, messages_field=key, tools_field=tools_key)
        for messages, key in zip((chosen, rejected), _PAIR_KEYS, strict=True)
    ]
    return PairRecord(*records)


def _prompt(document: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The shared beginning, or None where chosen and rejected are whole conversations."""
    whole = isinstance(document["chosen"], list) and not any(document.get(key) for key in _MESSAGE_KEYS)
    if whole and not isinstance(document.get("prompt"), list):
        return None
    if isinstance(document.get("prompt"), str):
        return _with_system_prompt(document, (Message("user", document["prompt"], field="prompt"),))
    keys = (*_MESSAGE_KEYS, "prompt")
    key = _one_key(document, keys)
    messages = check_messages(document[key], key)
    return _untrained_before(_with_system_prompt(document, messages), len(messages) + 1)


def _answered(document: Mapping[str, Any], key: str, prompt: tuple[Message, ...] | None) -> tuple[Message, ...]:
    """The whole conversation with the answer `key`."""
    answer = document[key]
    if isinstance(answer, str):
        answers: tuple[Message, ...] = (Message("assistant", answer, field=key),)
    elif isinstance(answer, dict):
        answers = tuple(check_messages([answer], key, names=[key]))
    else:
        answers = check_messages(answer, key)
    if not answers or answers[-1].role != "assistant":
        raise RecordError("record", key, "no answer at the end", "an assistant message")
    return _with_system_prompt(document, answers) if prompt is None else (*prompt, *answers)


def _shared_length(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many messages both begin with, at most all but the last of either."""
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one.fields() != other.fields():
            break
        shared += 1
    if shared == 0:
        raise RecordError("record", "rejected", "another beginning than chosen", "a prompt that both share")
    return shared


def _untrained_before(messages: tuple[Message, ...], end: int) -> tuple[Message, ...]:
    return tuple(
        message.with_weight(0.0) if place < end and message.role == "assistant" else message
        for place, message in enumerate(messages)
    )


class DataError(MinistralError):
    """Data that cannot be trained on as a whole: no such file, nothing in it, another file than was begun with."""
