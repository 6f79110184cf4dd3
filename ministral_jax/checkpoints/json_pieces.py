"""JSON whose outline is known, read piece by piece, so that nothing large is built of hostile text.

A parser that builds the whole document makes gigabytes of a hundred megabytes of empty lists. Here each member of an
object is decoded when it is reached, and the caller checks it before the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue]
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_VALUE_CHARACTERS = 4096


def shown(name: object) -> str:
    """Something out of a file, safe for a one-line message: quoted, escaped, not much longer than 100 characters."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


class _Refused(ValueError):
    """JSON that Python would take and we do not."""


def _no_constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise _Refused("a key appears twice in one object")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


class JsonPieces:
    """A place in the text `raw`, UTF-8, that moves past what is read. `what` says in messages what the text is.

    Every method raises CheckpointError, in one line that names the file and the place, for text other than it expects.
    """

    def __init__(self, raw: bytes, path: Path, what: str) -> None:
        self.path, self.what, self.at = path, what, 0
        self._within: list[str] = []
        try:
            self.text = raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise CheckpointError(f"{path}: {what} is not UTF-8 at its byte {problem.start}") from None

    def object(self, member: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
        """The members of the object that begins here: each name, once, with `member(name)`, which reads its value."""
        self._take("{")
        seen: set[str] = set()
        more = self._next() != "}"
        while more:
            name = self.string()
            if name in seen:
                raise self._error(f"{shown(name)} appears twice", "each name once")
            seen.add(name)
            self._take(":")
            self._within.append(name)
            value = member(name)
            self._within.pop()
            yield name, value
            more = self._next() == ","
            self.at += more
        self._take("}")

    def string(self) -> str:
        """The string that begins here."""
        self._take('"')
        try:
            text, self.at = scanstring(self.text, self.at, True)
        except json.JSONDecodeError as problem:
            raise self._error(problem.msg, "a string") from None
        return text

    def value(self) -> Any:
        """Any value that begins here and is short."""
        self._next()
        try:
            value, used = _DECODER.raw_decode(self.text[self.at : self.at + MAX_VALUE_CHARACTERS])
        except json.JSONDecodeError as problem:
            raise self._error(problem.msg, f"a value of at most {MAX_VALUE_CHARACTERS} characters") from None
        except RecursionError:
            raise self._error("nested too deeply", "a few levels") from None
        except ValueError as problem:  # a refused constant or key, or an integer of thousands of digits
            raise self._error(str(problem), "plain JSON") from None
        self.at += used
        return value

    def end(self) -> None:
        """That nothing but blanks follows."""
        if self._next():
            raise self._error(f"{shown(self._next())} follows the last '}}'", "nothing")

    def _next(self) -> str:
        """The next character that is no blank, without taking it; empty at the end."""
        while (character := self.text[self.at : self.at + 1]) and character in " \t\n\r":
            self.at += 1
        return character

    def _take(self, character: str) -> None:
        found = self._next()
        if found != character:
            raise self._error(shown(found) if found else "the end", repr(character))
        self.at += 1

    def _error(self, found: str, expected: str) -> CheckpointError:
        place = ", ".join([self.what, *map(shown, self._within)])
        return CheckpointError(f"{self.path}: {place}, character {self.at}: {found}; expected {expected}")
