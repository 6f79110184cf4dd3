"""Regular expressions over the names of modules, as PEFT's rank_pattern and alpha_pattern have them. Imports no jax.

They come from files, so only those that match in bounded time are taken.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_LONGEST = 256
# One for every projection of the largest model, several times over.
MOST_PATTERNS = 4096
# Each one may try every place in a name; with more, or one around a group, a pattern can take longer than a model.
_MOST_REPEATS = 4
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPEAT = re.compile(r"[*+?{]")


def pattern_problem(pattern: str) -> str | None:
    """What keeps `pattern` from being used, if anything."""
    if len(pattern) > _LONGEST:
        return f"a pattern of {len(pattern)} characters; expected at most {_LONGEST}"
    if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MOST_REPEATS:
        return f"{pattern!r} repeats too much; expected at most {_MOST_REPEATS} of * + ? {{, and none after a group"
    try:
        re.compile(pattern)
    except re.error as problem:
        return f"{pattern!r} is not a regular expression ({problem})"
    return None


def first_match(patterns: Mapping[str, Value], names: Iterable[str], default: Value) -> Value:
    """The value of the first pattern that matches the end of one of a module's `names`, from a dot on."""
    names = tuple(names)
    for pattern, value in patterns.items():
        if any(_compiled(pattern).match(name) for name in names):
            return value
    return default


@functools.lru_cache(MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
