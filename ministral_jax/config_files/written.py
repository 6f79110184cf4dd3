"""What is written back: the source document while it still says the same, else fresh keys over its unknown ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config import ModelConfig
from .fields import Fields, joined_name
from .layout import Layout

Read = Callable[[Fields], ModelConfig]
Write = Callable[[ModelConfig], dict[str, Any]]


def document_of(
    config: ModelConfig, layout: Layout, read: Read, write: Write, usual: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of `config` in `layout`.

    A config that was read from this layout and is still what its file says gets the file's own document, key by key.
    Otherwise it is `write(config)`, which says everything `read` wants to know, over what the source file had beyond
    that, over `usual`.
    """
    source = config.extra.get(layout)
    if source is None:
        return {**usual, **write(config)}
    fields = Fields(source)
    if read(fields) == config:
        return dict(source)
    return {**usual, **_with_unknown_keys(source, write(config), fields.asked)}


def _with_unknown_keys(
    source: Mapping[str, Any], fresh: Mapping[str, Any], known: set[str], where: str = ""
) -> dict[str, Any]:
    merged = {key: value for key, value in source.items() if joined_name(where, key) not in known}
    for key, value in fresh.items():
        old = source.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            value = _with_unknown_keys(old, value, known, joined_name(where, key))
        merged[key] = value
    return merged
