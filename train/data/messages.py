"""Messages and tools of a conversation, checked field by field. What a template then makes of them: tokens.py."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ministral_jax.errors import MinistralError

ROLES = ("system", "developer", "user", "assistant", "tool")
CONTENT_KEYS = ("content", "text")

_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_LONGEST_SHOWN = 60


class RecordError(MinistralError):
    """A line that cannot be trained on.

    Attributes:
        kind: "json", "record", "message", "tool", "chat" (refused by mistral-common), or "empty".
        field: such as messages[2].tool_calls[0].id; "line" for the line as a whole.
        found, expected: what is there, and what should be.
    """

    def __init__(self, kind: str, field: str, found: str, expected: str):
        super().__init__(f"{field}: {found}, expected {expected}")
        self.kind, self.field, self.found, self.expected = kind, field, found, expected


@dataclass(frozen=True)
class Message:
    """A checked message. `weight`: 0 or 1, whether an assistant message is trained. `field`: where it stood."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    weight: float = 1.0
    field: str = "messages"

    def fields(self) -> dict[str, Any]:
        """The message as Tokenizer.encode_chat takes it: without weight."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            fields["tool_calls"] = [dict(call) for call in self.tool_calls]
        optional = {"tool_call_id": self.tool_call_id, "name": self.name, "reasoning": self.reasoning}
        return fields | {key: value for key, value in optional.items() if value is not None}

    def with_weight(self, weight: float) -> "Message":
        return replace(self, weight=weight)


def shown(value: Any) -> str:
    """A JSON value as an error shows it: one short line."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def missing(kind: str, field: str, expected: str) -> RecordError:
    """The error of a field that is absent or null."""
    return RecordError(kind, field, "missing or null", expected)


def check_messages(value: Any, where: str, names: Sequence[str] | None = None) -> tuple[Message, ...]:
    """The messages of a list; `names` says what to call them instead of where[0], where[1], ...

    Raises:
        RecordError: naming the field that is wrong.
    """
    if not isinstance(value, list):
        raise RecordError("record", where, shown(value), "a list of messages")
    if not value:
        raise RecordError("empty", where, "no messages", "at least a user and an assistant message")
    names = names or [f"{where}[{place}]" for place in range(len(value))]
    return tuple(_check_message(entry, name) for entry, name in zip(value, names, strict=True))


def check_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a list, each `{"type": "function", "function": {"name", "description", "parameters"}}`.

    Raises:
        RecordError: naming the field that is wrong.
    """
    if not isinstance(value, list):
        raise RecordError("tool", where, shown(value), "a list of tools")
    return tuple(_check_tool(entry, f"{where}[{place}]") for place, entry in enumerate(value))


def _check_message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise RecordError("message", where, shown(entry), "an object with role and content")
    role = entry.get("role")
    if role not in ROLES:
        raise RecordError("message", f"{where}.role", shown(role), f"one of {', '.join(ROLES)}")
    message = Message(role="system" if role == "developer" else role, content=_content(entry, where, role), field=where)
    if role == "assistant":
        message = _with_assistant_fields(message, entry, where)
    if role == "tool":
        message = replace(
            message,
            tool_call_id=_text(entry, "tool_call_id", where, "the id of the call it answers"),
            name=_optional_text(entry, "name", where),
        )
        if message.name is not None:
            _check_function_name(message.name, f"{where}.name")
    if message.content is None and not message.tool_calls and not message.reasoning:
        raise missing("message", f"{where}.content", "text or a list of parts")
    return message


def _with_assistant_fields(message: Message, entry: Mapping[str, Any], where: str) -> Message:
    prefix = entry.get("prefix")
    if prefix is not None and prefix is not False:
        raise RecordError("message", f"{where}.prefix", shown(prefix), "nothing: an answer that is trained is finished")
    reasoning = [key for key in ("reasoning", "reasoning_content") if entry.get(key) is not None]
    for key in reasoning:
        _optional_text(entry, key, where)
    if len(reasoning) == 2 and entry[reasoning[0]] != entry[reasoning[1]]:
        raise RecordError("message", f"{where}.reasoning_content", "another text than reasoning", "one of them")
    return replace(
        message,
        tool_calls=_tool_calls(entry.get("tool_calls"), f"{where}.tool_calls"),
        reasoning=entry[reasoning[0]] if reasoning else None,
        weight=_weight(entry.get("weight"), f"{where}.weight"),
    )


def _weight(value: Any, where: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
        raise RecordError("message", where, shown(value), "0 or 1")
    return float(value)


def _content(entry: Mapping[str, Any], where: str, role: str) -> str | list[dict[str, Any]] | None:
    """The content under either of its names, text or checked parts; None where there is none."""
    found = [key for key in CONTENT_KEYS if entry.get(key) is not None]
    if len(found) > 1:
        raise RecordError("message", f"{where}.{found[1]}", "content and text", "one of them, they mean the same")
    if not found:
        return None
    content, field = entry[found[0]], f"{where}.{found[0]}"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RecordError("message", field, shown(content), "text or a list of parts")
    return [_part(part, f"{field}[{place}]", role) for place, part in enumerate(content)]


def _part(part: Any, where: str, role: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise RecordError("message", where, shown(part), "an object with type")
    if part.get("type") == "text":
        return {"type": "text", "text": _text(part, "text", where, "text")}
    allowed = "text or thinking" if role in ("assistant", "system", "developer") else "text"
    if part.get("type") != "thinking" or "thinking" not in allowed:
        raise RecordError("message", f"{where}.type", shown(part.get("type")), f"{allowed} in a message of {role}")
    closed = part.get("closed")
    if closed is not None and not isinstance(closed, bool):
        raise RecordError("message", f"{where}.closed", shown(closed), "true or false")
    return {"type": "thinking", "thinking": _thinking(part, where), "closed": closed is not False}


def _thinking(part: Mapping[str, Any], where: str) -> str:
    """The text of a thinking part, which Mistral's own client writes as a list of text parts."""
    thinking = part.get("thinking")
    if not isinstance(thinking, list):
        return _text(part, "thinking", where, "text or a list of text parts")
    pieces = []
    for place, piece in enumerate(thinking):
        field = f"{where}.thinking[{place}]"
        if not isinstance(piece, dict) or piece.get("type") != "text":
            raise RecordError("message", field, shown(piece), "a text part")
        pieces.append(_text(piece, "text", field, "text"))
    return "".join(pieces)


def _tool_calls(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RecordError("tool", where, shown(value), "a list of tool calls")
    return tuple(_tool_call(entry, f"{where}[{place}]") for place, entry in enumerate(value))


def _tool_call(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RecordError("tool", where, shown(entry), "an object with id and function")
    _check_type(entry, where)
    function = entry.get("function")
    if not isinstance(function, dict):
        raise RecordError("tool", f"{where}.function", shown(function), "an object with name and arguments")
    name = _text(function, "name", f"{where}.function", "the function's name", kind="tool")
    _check_function_name(name, f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if entry.get("id") is not None:
        call["id"] = _text(entry, "id", where, "text", kind="tool")
    return call


def _arguments(value: Any, where: str) -> str:
    """The arguments as the text of a JSON object; none and "" are an empty one, as mistral-common has it."""
    if value is None or value == "":
        return "{}"
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise RecordError("tool", where, shown(value), "the text of a JSON object") from None
    if not isinstance(parsed, dict):
        raise RecordError("tool", where, shown(value), "the text of a JSON object")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _check_tool(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RecordError("tool", where, shown(entry), "an object with function")
    _check_type(entry, where)
    function = entry.get("function")
    if not isinstance(function, dict):
        expected = "an object with name, description and parameters"
        raise RecordError("tool", f"{where}.function", shown(function), expected)
    where = f"{where}.function"
    name = _text(function, "name", where, "the function's name", kind="tool")
    _check_function_name(name, f"{where}.name")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RecordError("tool", f"{where}.parameters", shown(parameters), "a JSON schema")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RecordError("tool", f"{where}.strict", shown(strict), "true or false")
    description = _optional_text(function, "description", where, kind="tool") or ""
    checked = {"name": name, "description": description, "parameters": parameters or {}}
    return {"type": "function", "function": checked | ({} if strict is None else {"strict": strict})}


def _check_type(entry: Mapping[str, Any], where: str) -> None:
    if entry.get("type") not in (None, "function"):
        raise RecordError("tool", f"{where}.type", shown(entry["type"]), "function")


def _check_function_name(name: str, where: str) -> None:
    if not _FUNCTION_NAME.fullmatch(name):
        raise RecordError("tool", where, shown(name), "letters, digits, _ and -, at most 64")


def _text(entry: Mapping[str, Any], key: str, where: str, expected: str, kind: str = "message") -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise RecordError(kind, f"{where}.{key}", shown(value), expected)
    return value


def _optional_text(entry: Mapping[str, Any], key: str, where: str, kind: str = "message") -> str | None:
    return None if entry.get(key) is None else _text(entry, key, where, "text", kind)
