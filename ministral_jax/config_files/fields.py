"""Typed access to one JSON object: every wrong value is a ConfigError that names its key. Knows no config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import INT32_MAX, LARGEST_NUMBER, SMALLEST_NUMBER
from ..errors import ConfigError

_SHOWN_CHARACTERS = 60


class Fields:
    """The keys of one JSON object.

    Messages give the dotted name from the root of the file; the file itself is named by whoever opened it. `asked`
    collects the dotted name of every key that was looked at: the others are those that we do not interpret.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", asked: set[str] | None = None) -> None:
        self._values = values
        self._where = where
        self.asked: set[str] = set() if asked is None else asked

    def name(self, key: str) -> str:
        return joined_name(self._where, key)

    def knows(self, *keys: str) -> None:
        """Counts keys as interpreted that this document gives no reason to look at."""
        self.asked.update(map(self.name, keys))

    def value(self, key: str) -> Any:
        """The value as it is in the file; None where it is absent or null."""
        self.asked.add(self.name(key))
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        self.asked.add(self.name(key))
        return key in self._values

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for what stands at `key`."""
        if not self.has(key):
            return ConfigError(f"{self.name(key)} is missing: expected {expected}")
        return ConfigError(f"{self.name(key)}={shown(self._values[key])}: expected {expected}")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = INT32_MAX) -> int:
        """A whole number; `default` where the key is absent, and without a default the key must be there."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"a whole number from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str, *, maximum: int = INT32_MAX) -> int | None:
        """A positive whole number, or None where the key is absent or null."""
        return None if self.value(key) is None else self.integer(key, maximum=maximum)

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        minimum: float = 0.0,
        above_minimum: bool = True,
        maximum: float = LARGEST_NUMBER,
    ) -> float:
        """A real number greater than `minimum` (or equal to it, unless `above_minimum`); as `integer` when absent."""
        if default is not None and not self.has(key):
            return default
        value = self.value(key)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        inside = real and minimum <= value <= maximum and not (above_minimum and value == minimum)
        if not inside or 0 < value < SMALLEST_NUMBER:
            relation = "above" if above_minimum else "of at least"
            raise self.error(key, f"a number {relation} {minimum:g} and at most {maximum:g}")
        return float(value)

    def optional_number(self, key: str, *, minimum: float = 0.0, above_minimum: bool = True) -> float | None:
        """A real number as in `number`, or None where the key is absent or null."""
        return None if self.value(key) is None else self.number(key, minimum=minimum, above_minimum=above_minimum)

    def boolean(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the `allowed` strings; `default` where the key is absent or null."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, "one of " + ", ".join(repr(name) for name in allowed))
        return value

    def must_be(self, key: str, allowed: object, reason: str) -> None:
        """Refuses any value but `allowed` (or an absent or null one), because of `reason`."""
        value = self.value(key)
        if value is None:
            return
        if isinstance(value, bool) != isinstance(allowed, bool) or value != allowed:
            raise self.error(key, f"{allowed!r}, since {reason}")

    def block(self, key: str) -> Fields | None:
        """The object at `key`, or None where it is absent or null."""
        return None if self.value(key) is None else self.required_block(key)

    def required_block(self, key: str) -> Fields:
        value = self.value(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Fields(value, self.name(key), self.asked)

    def items(self, key: str, expected: str) -> list[Any] | None:
        """The list at `key`, or None where it is absent or null."""
        value = self.value(key)
        if value is not None and not isinstance(value, list):
            raise self.error(key, expected)
        return value

    def as_dict(self) -> dict[str, Any]:
        """The object as it is in the file."""
        return dict(self._values)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._values)


def joined_name(where: str, key: str) -> str:
    """The dotted name of `key` in the object called `where`; odd keys are quoted, so that a name is always one line."""
    plain = key if key.isidentifier() else repr(key)
    return f"{where}.{plain}" if where else plain


def shown(value: object) -> str:
    """`value` on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
