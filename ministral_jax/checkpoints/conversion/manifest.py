"""`conversion.json`, which lies in every converted folder: what was written, with checksums, and what it came from.

It keeps the source's own config documents, so that converting back gives the very document, unknown keys included.
It holds no time and no path: the same conversion writes the same manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config_files.json_file import read_json_object, write_json
from ...errors import ConfigError

MANIFEST = "conversion.json"
_FORMAT = "ministral-jax conversion 1"


@dataclass(frozen=True)
class FileRecord:
    """A written file: its size and the SHA-256 of its bytes, in hex."""

    n_bytes: int
    sha256: str


def write_manifest(
    folder: Path,
    *,
    source: Mapping[str, Any],
    options: Mapping[str, Any],
    documents: Mapping[str, Any],
    files: Mapping[str, FileRecord],
) -> None:
    """Writes the manifest: what the source was, how it was converted, its config documents, and the files written."""
    document = {
        "format": _FORMAT,
        "source": dict(source),
        "options": dict(options),
        "documents": dict(documents),
        "files": {name: {"bytes": record.n_bytes, "sha256": record.sha256} for name, record in sorted(files.items())},
    }
    write_json(folder / MANIFEST, document)


def kept_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """The config documents that an earlier conversion into `folder` kept, by layout; none where it was not one.

    Raises ConfigError for a manifest that is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    document = read_json_object(path)
    if document.get("format") != _FORMAT:  # a file of somebody else's
        return {}
    kept = document.get("documents")
    if not isinstance(kept, dict) or not all(isinstance(value, dict) for value in kept.values()):
        raise ConfigError(f"{path}: documents: expected an object of config documents; remove the file to do without")
    return kept
