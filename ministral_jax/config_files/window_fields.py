"""Attention windows in the spellings of both layouts: one number, a list tiled over the layers, or a type per layer."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import INT32_MAX, Window
from ..errors import ConfigError
from .fields import Fields, shown

# No published model comes near; a larger number is damage, and would be tiled into a tuple of that length.
MAX_LAYERS = 4096

_EXPECTED = "null, a positive whole number, or a list of these whose length divides the number of layers"
FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of_params(fields: Fields, n_layers: int) -> tuple[Window, ...]:
    """Windows of a params.json, from `sliding_window` or, in its absence, `_sliding_window`."""
    plain, hidden = (_tiled(fields, key, n_layers) for key in ("sliding_window", "_sliding_window"))
    if plain and hidden and plain != hidden:
        raise fields.error("_sliding_window", "the same as sliding_window, which is there too")
    return plain or hidden or (None,) * n_layers


def windows_of_hf(fields: Fields, n_layers: int, default: Window) -> tuple[Window, ...]:
    """Windows of a config.json: `sliding_window` on every layer, or on those that `layer_types` calls sliding.

    `default` is the window of the transformers class, taken where `sliding_window` is absent (null means none).
    """
    windows = _tiled(fields, "sliding_window", n_layers) if fields.has("sliding_window") else (default,) * n_layers
    windows = windows or (None,) * n_layers
    types = fields.items("layer_types", f"a list of {n_layers} layer types")
    if types is None:
        return windows
    if len(types) != n_layers:
        raise fields.error("layer_types", f"{n_layers} entries, one per layer, not {len(types)}")
    for i, (kind, window) in enumerate(zip(types, windows, strict=True)):
        if kind not in (FULL, SLIDING):
            raise ConfigError(f"{fields.name('layer_types')}[{i}]={shown(kind)}: expected {FULL!r} or {SLIDING!r}")
        if kind == SLIDING and window is None:
            raise fields.error("sliding_window", f"a positive whole number, since layer_types[{i}] is {SLIDING!r}")
    return tuple(window if kind == SLIDING else None for kind, window in zip(types, windows, strict=True))


def shortest_pattern(windows: Sequence[Window]) -> list[Window]:
    """The shortest list that gives `windows` when repeated."""
    n = len(windows)
    lengths = (length for length in range(1, n + 1) if n % length == 0)
    return next(list(windows[:length]) for length in lengths if [*windows[:length]] * (n // length) == [*windows])


def _tiled(fields: Fields, key: str, n_layers: int) -> tuple[Window, ...] | None:
    value = fields.value(key)
    if value is None:
        return None
    pattern = value if isinstance(value, list) else [value]
    if not pattern or n_layers % len(pattern):
        raise fields.error(key, f"{_EXPECTED}, {n_layers}")
    return tuple(_window(fields, key, entry) for entry in pattern) * (n_layers // len(pattern))


def _window(fields: Fields, key: str, entry: object) -> Window:
    if entry is None:
        return None
    if isinstance(entry, str) and entry.isascii() and entry.isdigit() and len(entry) <= len(str(INT32_MAX)):
        entry = int(entry)
    if not isinstance(entry, int) or isinstance(entry, bool) or not 0 < entry <= INT32_MAX:
        raise fields.error(key, _EXPECTED)
    return entry
