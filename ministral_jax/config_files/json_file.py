"""A JSON file as one object, and back: whatever is wrong with the text is a one-line ConfigError. Knows no config."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .fields import joined_name

# Published files hold a few kilobytes; anything near this is no config.
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file at `path`.

    Raises ConfigError, naming the file, if it cannot be read, is larger than 16 MiB, is not UTF-8 or not JSON, has
    another root than an object, repeats a key, nests deeper than 64 levels, or holds NaN, Infinity or a number beyond
    float64.
    """
    try:
        return _parse(_read_bytes(path))
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes `document`, indented, under a temporary name that is renamed when complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from None


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"cannot be read ({problem.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES} bytes: expected a config of a few kilobytes")
    return data


def _parse(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as problem:
        raise ConfigError(f"byte {problem.start} is not UTF-8: expected JSON text") from None
    except json.JSONDecodeError as problem:
        raise ConfigError(
            f"not JSON at line {problem.lineno}, column {problem.colno}: {problem.msg}; download the file again"
        ) from None
    except RecursionError:
        raise ConfigError(_too_deep()) from None
    except ValueError:
        raise ConfigError("a number has thousands of digits: expected one that fits 64 bits") from None
    if not isinstance(document, dict):
        raise ConfigError(f"the root is {_kind(document)}: expected an object of config keys")
    _refuse_odd_values(document)
    return document


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"key {repeated!r} appears twice: expected it once")
    return values


def _refuse_odd_values(document: dict[str, Any]) -> None:
    pending: list[tuple[str, Any, int]] = [("", document, 1)]
    while pending:
        name, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(_too_deep())
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}={value}: expected a finite number")
        if isinstance(value, dict):
            pending += [(joined_name(name, key), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{name}[{i}]", item, depth + 1) for i, item in enumerate(value)]


def _too_deep() -> str:
    return f"nested too deeply: expected at most {MAX_DEPTH} levels"


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
