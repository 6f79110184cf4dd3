"""Other people's training formats made into ours: ShareGPT, OpenAI, Alpaca. What ours may say: formats.py.

sharegpt  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
openai    {"messages": [...], "functions": [...]}, calls as function_call or tool_calls
alpaca    {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["...", "..."]]}
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ministral_jax.chat_request import map_call_ids

from .formats import DataError
from .messages import RecordError, shown
from .report import LineProblem
from .sources import LineFile

Shape = Literal["sharegpt", "openai", "alpaca"]
SHAPES: tuple[Shape, ...] = ("sharegpt", "openai", "alpaca")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool": "tool",
}


@dataclass
class ConvertReport:
    """What became of a file: records read and written, answers' unanswered ends cut, records without an answer."""

    shape: str
    read: int = 0
    written: int = 0
    cut: int = 0
    empty: int = 0
    problems: list[LineProblem] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(source: Path, target: Path, shape: Shape | None = None) -> ConvertReport:
    """Writes our jsonl of a jsonl file, or of a JSON file with a list of records.

    Messages after the last assistant message are cut off, and records without any are left out; both are counted.
    Records that cannot be understood are left out and told. The shape, if not given, is that of the first record.

    Raises:
        DataError: there is nothing to read, its shape cannot be told, or the target exists.
    """
    if target.exists():
        raise DataError(f"{target}: exists already, and is not overwritten; expected another name")
    if not target.parent.is_dir():
        raise DataError(f"{target.parent}: no such folder, expected one to write {target.name} into")
    records = list(_records(source))
    report = ConvertReport(shape or _detect(source, records))
    reshape: Callable[[dict[str, Any]], dict[str, Any]] = _READERS[report.shape]
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=target.name, suffix=".part", delete=False
    ) as file:
        for number, record in records:
            report.read += 1
            try:
                if isinstance(record, RecordError):
                    raise record
                if not isinstance(record, dict):
                    raise RecordError("record", "line", shown(record), "a JSON object")
                converted = reshape(record)
                _finish(converted, report)
                if converted["messages"]:
                    file.write(json.dumps(converted) + "\n")
                    report.written += 1
            except RecursionError:
                deep = ("record", "line", "nested too deeply", "a conversation")
                report.problems.append(LineProblem(str(source), number, *deep))
            except RecordError as error:
                problem = LineProblem(str(source), number, error.kind, error.field, error.found, error.expected)
                report.problems.append(problem)
    os.replace(file.name, target)
    return report


def _records(source: Path) -> Iterator[tuple[int, Any]]:
    """Each record and its line, or its place in a list, from 1; a RecordError where a line is not JSON."""
    if not source.is_file():
        raise DataError(f"{source}: no such file, expected a jsonl or JSON file")
    lines = LineFile(source)
    if not len(lines):
        raise DataError(f"{source}: no lines in it")
    if lines[0].lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        try:
            yield from enumerate(json.loads(source.read_bytes()), start=1)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: begins like a JSON list, but is none: {error}") from error
        return
    for number, line in zip(lines.numbers.tolist(), lines, strict=True):
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield number, RecordError("json", "line", str(error), "a JSON object")


def _detect(source: Path, records: list[tuple[int, Any]]) -> Shape:
    for _, record in records:
        if isinstance(record, dict):
            if isinstance(record.get("conversations", record.get("conversation")), list):
                return "sharegpt"
            if isinstance(record.get("messages"), list):
                return "openai"
            if "instruction" in record:
                return "alpaca"
    raise DataError(f"{source}: no record with conversations, messages or instruction; say which it is with --from")


def _finish(record: dict[str, Any], report: ConvertReport) -> None:
    """Cuts what follows the last answer, and empties a record without one."""
    messages = record["messages"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        report.empty += 1
        record["messages"] = []
    elif answers[-1] + 1 < len(messages):
        report.cut += 1
        record["messages"] = messages[: answers[-1] + 1]


def _text(record: Mapping[str, Any], key: str, where: str = "") -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError("record", where + key, shown(value), "text")
    return value


def _objects(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RecordError("record", where, shown(value), "a list of objects")
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise RecordError("record", f"{where}[{place}]", shown(entry), "an object")
    return value


def _from_alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """The instruction and, after an empty line, its input; earlier exchanges in `history` come before."""
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    history = record.get("history")
    if history is not None and not isinstance(history, list):
        raise RecordError("record", "history", shown(history), "a list of question and answer")
    turns: list[Any] = history or []
    for place, turn in enumerate(turns):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RecordError("record", f"history[{place}]", shown(turn), "a question and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _text(record, "input")
    messages.append({"role": "user", "content": question})
    if record.get("output") not in (None, ""):
        messages.append({"role": "assistant", "content": _text(record, "output")})
    return {"messages": messages}


def _from_openai(record: dict[str, Any]) -> dict[str, Any]:
    """Functions become tools; a function_call a tool call; a function message the result of the call before it."""
    ids = _CallIds(record)
    messages = []
    for place, message in enumerate(_objects(record.get("messages"), "messages")):
        where = f"messages[{place}]."
        fields = {key: value for key, value in message.items() if key != "function_call" and value is not None}
        if message.get("function_call") is not None:
            fields["tool_calls"] = [ids.call(message["function_call"], f"{where}function_call")]
        elif message.get("tool_calls"):
            fields["tool_calls"] = ids.given(_objects(message["tool_calls"], f"{where}tool_calls"), where)
        elif message.get("role") in ("function", "tool"):
            fields = {"role": "tool", "content": message.get("content"), **ids.answer(message, where)}
        if fields.get("content") in (None, "") and fields.get("role") == "assistant" and "tool_calls" not in fields:
            continue
        _text(fields, "role", where)
        messages.append(fields)
    converted: dict[str, Any] = {"messages": messages}
    tools = record.get("tools")
    if record.get("functions"):
        tools = [{"type": "function", "function": entry} for entry in _objects(record["functions"], "functions")]
    if tools:
        converted["tools"] = _objects(tools, "tools")
    return converted


def _from_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    ids = _CallIds(record)
    key = "conversations" if "conversations" in record else "conversation"
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _text(record, "system")})
    for place, turn in enumerate(_objects(record.get(key), key)):
        where = f"{key}[{place}]."
        names = ("from", "value") if "from" in turn else ("role", "content")
        said, value = _text(turn, names[0], where), turn.get(names[1])
        role = _SHAREGPT_ROLES.get(said)
        if role is None:
            raise RecordError("record", where + names[0], shown(said), f"one of {', '.join(_SHAREGPT_ROLES)}")
        if role == "call":
            call = ids.call(_json(_text(turn, names[1], where), where + names[1]), where + names[1])
            messages.append({"role": "assistant", "tool_calls": [call]})
        elif role == "tool":
            messages.append({"role": "tool", "content": _text(turn, names[1], where), **ids.answer({}, where)})
        elif role != "assistant" or value not in (None, ""):
            message: dict[str, Any] = {"role": role, "content": _text(turn, names[1], where)}
            messages.append(message | ({"weight": turn["weight"]} if turn.get("weight") is not None else {}))
    converted: dict[str, Any] = {"messages": messages}
    if record.get("tools"):
        tools = _json(record["tools"], "tools") if isinstance(record["tools"], str) else record["tools"]
        converted["tools"] = [
            entry if "function" in entry else {"type": "function", "function": entry}
            for entry in _objects(tools, "tools")
        ]
    return converted


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError("record", where, f"{shown(text)}, not JSON", "the text of a JSON value") from error


class _CallIds:
    """Nine-character ids for the tool calls of one record, the same whenever it is converted."""

    def __init__(self, record: Mapping[str, Any]):
        self._seed = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        self._count = 0
        self._known: dict[str, str] = {}
        self._unanswered: list[str] = []

    def call(self, function: Any, where: str) -> dict[str, Any]:
        """A call that came without an id."""
        if not isinstance(function, dict):
            raise RecordError("record", where, shown(function), "an object with name and arguments")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments)
        named = {"name": _text(function, "name", f"{where}."), "arguments": arguments}
        return {"id": self._new(), "type": "function", "function": named}

    def given(self, calls: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        """Calls with ids of any form, or without."""
        converted = []
        for place, call in enumerate(calls):
            function = call.get("function")
            if not isinstance(function, dict):
                raise RecordError("record", f"{where}tool_calls[{place}].function", shown(function), "an object")
            made = self.call(function, f"{where}tool_calls[{place}].function")
            if isinstance(call.get("id"), str) and call["id"]:
                self._unanswered[-1] = made["id"] = self._nine(call["id"])
            converted.append(made)
        return converted

    def answer(self, message: Mapping[str, Any], where: str) -> dict[str, str]:
        """The tool_call_id of a result: the one it gives, else that of the first call not yet answered."""
        given = message.get("tool_call_id")
        if isinstance(given, str) and given:
            call_id = self._nine(given)
            self._unanswered = [other for other in self._unanswered if other != call_id]
            return {"tool_call_id": call_id}
        if not self._unanswered:
            raise RecordError("record", f"{where}role", "a result", "a call before it that it answers")
        return {"tool_call_id": self._unanswered.pop(0)}

    def _nine(self, given: str) -> str:
        if given not in self._known:
            self._known = map_call_ids([*self._known, given])
        return self._known[given]

    def _new(self) -> str:
        call_id = self._nine(f"{self._seed}:{self._count}")
        self._count += 1
        self._unanswered.append(call_id)
        return call_id


_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "sharegpt": _from_sharegpt,
    "openai": _from_openai,
    "alpaca": _from_alpaca,
}
