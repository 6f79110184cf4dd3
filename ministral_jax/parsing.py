"""What a model answered: text, reasoning and tool calls, told apart by token id. Not by markers in the text.

A control token is an id that ordinary text never encodes to, so a model that writes about "[TOOL_CALLS]" calls
nothing. The formats are those of mistral-common's templates, by the version of the tokenizer file:

    v2, v3, v7   [TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}, ...]
    v11          [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}     once per call, the id left out by most models
    v13, v15     [TOOL_CALLS]name[ARGS]{...}                once per call
    any          [THINK]...[/THINK]                         where the file has these tokens

A file without these tokens (v1) gives text and nothing else.
"""

import enum
import json
import re
import secrets
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .tokenizer import TextStream, Tokenizer

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # what mistral-common accepts in a conversation
_FIRST_VERSION_WITH_ARGS = 11


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole call: `id` of nine alphanumerics, the function's name, and its arguments as a JSON object's text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParseProblem:
    """Why a tool call could not be read, in one line. Its text follows as a TextDelta."""

    message: str


Event = TextDelta | ReasoningDelta | ToolCall | ParseProblem


@dataclass(frozen=True)
class AssistantMessage:
    """An answer.

    Attributes:
        content: the text, which includes that of tool calls that could not be read.
        reasoning: what stood between [THINK] and [/THINK], all of it together.
        tool_calls: the calls, in order.
        problems: for each call that could not be read, why.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, events: Iterable[Event]) -> "AssistantMessage":
        """The message that the events of an OutputParser add up to."""
        told = list(events)
        return cls(
            content="".join(event.text for event in told if isinstance(event, TextDelta)),
            reasoning="".join(event.text for event in told if isinstance(event, ReasoningDelta)),
            tool_calls=tuple(event for event in told if isinstance(event, ToolCall)),
            problems=tuple(event.message for event in told if isinstance(event, ParseProblem)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The message as Tokenizer.encode_chat takes it, to go on with the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            parts: list[dict[str, Any]] = [{"type": "thinking", "thinking": self.reasoning, "closed": True}]
            message["content"] = [*parts, {"type": "text", "text": self.content}] if self.content else parts
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def random_call_id() -> str:
    """A tool-call id that mistral-common accepts."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def parse_output(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    *,
    reasoning: bool = False,
    continuing: bool = False,
    new_call_id: Callable[[], str] = random_call_id,
) -> AssistantMessage:
    """The message in the ids that a model generated; the arguments are OutputParser's, as are the events summed up.

    Raises:
        TokenizerError: an id is outside the vocabulary. Nothing that a model can write is an error.
    """
    parser = OutputParser(tokenizer, reasoning=reasoning, continuing=continuing, new_call_id=new_call_id)
    events = [event for token_id in ids for event in parser.feed(token_id)] + parser.finish()
    return AssistantMessage.of(events)


class _Mode(enum.Enum):
    TEXT = enum.auto()
    REASONING = enum.auto()
    CALL = enum.auto()


class OutputParser:
    """Reads generated ids one at a time and tells what they add to the message.

    A tool call is told when it is complete: at the next [TOOL_CALLS], [THINK], eos, or the end. [TOOL_CALLS] ends
    reasoning. A second [THINK] inside reasoning, and a [/THINK] outside, are dropped; so is every other control
    token. Reasoning still open at the end is reasoning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        reasoning: bool = False,
        continuing: bool = False,
        new_call_id: Callable[[], str] = random_call_id,
    ):
        """Begin an answer.

        Args:
            tokenizer: gives the version, the control ids and the text.
            reasoning: the prompt left a [THINK] open, so the answer begins inside it.
            continuing: the prompt ended in text that the answer goes on from (`prefix`): its first space is kept.
            new_call_id: makes an id for a call that has none, or one that mistral-common would refuse.
        """
        self._tokenizer = tokenizer
        self._new_call_id = new_call_id
        self._tool_calls = tokenizer.special_id("[TOOL_CALLS]")
        self._think = tokenizer.special_id("[THINK]")
        self._end_think = tokenizer.special_id("[/THINK]")
        self._has_args = int(tokenizer.version.removeprefix("v")) >= _FIRST_VERSION_WITH_ARGS
        self._mode = _Mode.REASONING if reasoning else _Mode.TEXT
        self._text = TextStream(tokenizer, continuing=continuing and not reasoning)
        self._reasoning = TextStream(tokenizer, continuing=continuing and reasoning)
        self._call: list[int] = []
        self._call_ids: set[str] = set()

    def feed(self, token_id: int) -> list[Event]:
        """What this id adds; often nothing yet.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if token_id == self._tool_calls:
            return self._enter(_Mode.CALL)
        if token_id == self._think:
            return [] if self._mode is _Mode.REASONING else self._enter(_Mode.REASONING)
        if token_id == self._end_think:
            return self._enter(_Mode.TEXT) if self._mode is _Mode.REASONING else []
        if token_id == self._tokenizer.eos_id:
            return self._enter(_Mode.TEXT)
        if self._mode is _Mode.CALL:
            self._call.append(self._tokenizer.checked_id(token_id))
            return []
        if self._mode is _Mode.REASONING:
            return _said(ReasoningDelta, self._reasoning.feed(token_id))
        return _said(TextDelta, self._text.feed(token_id))

    def finish(self) -> list[Event]:
        """What the end of the ids settles: a last call, or half a character."""
        return self._enter(_Mode.TEXT)

    def _enter(self, mode: _Mode) -> list[Event]:
        """Close what was being read, and go over to `mode`."""
        left, self._mode = self._mode, mode
        if left is _Mode.CALL:
            body, self._call = self._call, []
            return self._read_calls(body)
        if left is _Mode.REASONING:
            return _said(ReasoningDelta, self._reasoning.finish())
        return _said(TextDelta, self._text.finish())

    def _read_calls(self, body: list[int]) -> list[Event]:
        """The calls in the ids after one [TOOL_CALLS], and the text after them; or the problem, and all its text."""
        try:
            calls, rest = self._named_call(body) if self._has_args else self._listed_calls(body)
        except ValueError as error:
            return [ParseProblem(str(error)), *_said(TextDelta, self._tokenizer.decode(body))]
        return [*calls, *_said(TextDelta, rest if rest.strip() else "")]

    def _listed_calls(self, body: list[int]) -> tuple[list[ToolCall], str]:
        """v2 to v7: one JSON list of calls."""
        listed, _, rest = _first_json(self._tokenizer.decode(body), list, "the tool calls")
        calls = []
        for entry in listed:
            if not isinstance(entry, dict) or not isinstance(entry.get("arguments"), dict):
                raise ValueError("a tool call is not an object with a name and an object of arguments")
            name = _checked_name(entry.get("name"))
            calls.append(ToolCall(self._call_id(entry.get("id")), name, json.dumps(entry["arguments"])))
        return calls, rest

    def _named_call(self, body: list[int]) -> tuple[list[ToolCall], str]:
        """v11 and later: a name, perhaps an id, and JSON arguments. Some models leave [ARGS] out."""
        head, arguments = _split_once(body, self._tokenizer.special_id("[ARGS]"), "[ARGS]")
        head, call_id = _split_once(head, self._tokenizer.special_id("[CALL_ID]"), "[CALL_ID]")
        name = self._tokenizer.decode(head)
        if arguments is None:
            name, brace, tail = name.partition("{")
            text = brace + tail
        else:
            text = self._tokenizer.decode(arguments)
        name = _checked_name(name.strip())
        _, text, rest = _first_json(text, dict, f"the arguments of {name}")
        return [ToolCall(self._call_id(self._tokenizer.decode(call_id or [])), name, text)], rest

    def _call_id(self, given: object) -> str:
        """The id the model gave, if mistral-common will take it back, else a new one."""
        usable = isinstance(given, str) and _CALL_ID.fullmatch(given) and given not in self._call_ids
        call_id = str(given) if usable else self._new_call_id()
        self._call_ids.add(call_id)
        return call_id


def _said(kind: type[TextDelta] | type[ReasoningDelta], text: str) -> list[Event]:
    return [kind(text)] if text else []


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
        raise ValueError(f"{str(name)[:80]!r} is not a function name: letters, digits, _ and -, at most 64")
    return name


def _split_once(ids: list[int], marker: int | None, name: str) -> tuple[list[int], list[int] | None]:
    """The ids before and after a control token; all of them and None if it does not occur."""
    if marker is None or marker not in ids:
        return ids, None
    if ids.count(marker) > 1:
        raise ValueError(f"{name} occurs {ids.count(marker)} times in one tool call, expected once")
    at = ids.index(marker)
    return ids[:at], ids[at + 1 :]


def _first_json(text: str, kind: type, what: str) -> tuple[Any, str, str]:
    """The JSON value that `text` begins with, the text of that value, and the text after it.

    Raises:
        ValueError: there is none, it is not of `kind`, or it is NaN or infinite somewhere, which is not JSON.
    """
    text = text.lstrip()
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError(f"{what}: not JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, kind):
        expected = {list: "a list", dict: "an object"}[kind]
        raise ValueError(f"{what}: a JSON {type(value).__name__}, expected {expected}")
    return value, text[:end], text[end:]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
