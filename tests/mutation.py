"""Damage for valid files, the same on every run: fields of a JSON document, bytes of any file. Holds no tests."""

import copy
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]


class _Absent:
    def __repr__(self) -> str:
        return "<deleted>"


_ABSENT = _Absent()
_DEEP: list[Any] = []
for _ in range(40):
    _DEEP = [_DEEP]

# Values of every JSON type, sensible in none or few places. NaN and Infinity are written as Python's json writes them.
_VALUES: tuple[Any, ...] = (
    _ABSENT, None, True, False, -1, 0, 1, 3, -(2**63), 10**30, 10**400, 0.0, -0.5, 0.5, 1e-320, 1e300,
    float("nan"), float("inf"), "", "7", "-7", "١", "text\nof two lines", "\ud800", "x" * 10_000, [], [None], [0],
    [[1]], ["full_attention"], {}, {"rope_type": "linear"}, {"\n": {}}, _DEEP,
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """A damaged document as JSON text, the field that was touched, and what it was given."""

    path: Path
    value: Any
    text: str

    @property
    def leaf(self) -> str:
        """The last key on the way to the field, list positions left out."""
        return [part for part in self.path if isinstance(part, str)][-1]


def fields_of(document: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every value in `document`, inner ones and containers alike, the root left out."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from fields_of(value, (*path, key))


def damaged_documents(document: dict[str, Any], seed: int | None = None, per_field: int = 4) -> Iterator[Damage]:
    """`document` with one field deleted or replaced, for every field.

    Every kind of value is tried, or, with a seed, `per_field` of them, drawn anew for each field.
    """
    draw = random.Random(seed)
    for path in fields_of(document):
        values = (*_VALUES, *_near(_at(document, path)))
        for value in values if seed is None else draw.sample(values, per_field):
            yield Damage(path, value, json.dumps(_with(document, path, value)))


def documents_with_added_keys(
    document: dict[str, Any], keys: Iterable[str], seed: int, per_key: int = 4
) -> Iterator[Damage]:
    """`document` with one more key at its root, for each of `keys` that it has not, with `per_key` kinds of value."""
    draw = random.Random(seed)
    for key in sorted(set(keys) - document.keys()):
        for value in draw.sample(_VALUES[1:], per_key):
            yield Damage((key,), value, json.dumps({**document, key: value}))


def randomly_damaged_documents(document: dict[str, Any], seed: int, count: int) -> Iterator[Damage]:
    """`count` documents with two to four fields damaged at once; `path` is the last of them."""
    draw = random.Random(seed)
    for _ in range(count):
        damaged, path, value = document, (), None
        for _ in range(draw.randint(2, 4)):
            path = draw.choice(list(fields_of(damaged)))
            value = draw.choice((*_VALUES, *_near(_at(damaged, path))))
            damaged = _with(damaged, path, value)
            if not damaged:
                break
        yield Damage(path, value, json.dumps(damaged))


def damaged_bytes(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`data` cut off, with bits flipped, with bytes that are no UTF-8, with parts lost or repeated; `count` of each."""
    draw = random.Random(seed)
    yield b""
    for _ in range(count):
        at, end = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        yield data[:at] + bytes(draw.randrange(0x80, 0x100) for _ in range(3)) + data[at:]
        yield data[:at] + data[end:]
        yield data[:end] + data[at:]
        yield data[:at] + b"\0" * (end - at) + data[end:]


def _near(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool) or value is None:
        return (str(value), [value])
    if isinstance(value, int | float):
        return (-value, value + 1, value * 1000, str(value), [value], [value, value], {"value": value})
    if isinstance(value, str):
        return (value.upper(), value + " ", [value], value + "\n")
    if isinstance(value, list):
        return (value * 2, value[:-1], [value], dict(enumerate(value)))
    return ([value], list(value), list(value.values()))


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _with(document: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    owner = _at(changed, path[:-1])
    if value is _ABSENT:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return changed
