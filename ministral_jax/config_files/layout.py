"""Which of the two published layouts a folder holds: one rule for configs, weights and the choice of hub files."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ..errors import ConfigError

Layout = Literal["mistral", "hf"]

CONFIG_FILE_NAMES: dict[Layout, str] = {"mistral": "params.json", "hf": "config.json"}

MISTRAL_WEIGHTS = "consolidated*.safetensors"


def layout_of(names: Iterable[str]) -> Layout | None:
    """Layout of a folder with files called `names`; None where no config is among them.

    With both configs side by side the mistral layout is read when its weights (`consolidated*.safetensors`) are there,
    else the HF layout: never both, since each holds all tensors.
    """
    present = set(names)
    if CONFIG_FILE_NAMES["mistral"] not in present:
        return "hf" if CONFIG_FILE_NAMES["hf"] in present else None
    if CONFIG_FILE_NAMES["hf"] not in present:
        return "mistral"
    has_weights = any(fnmatchcase(name, MISTRAL_WEIGHTS) for name in present)
    return "mistral" if has_weights else "hf"


def detect_layout(directory: str | Path) -> Layout:
    """Layout of the checkpoint in `directory`, by `layout_of`. Raises ConfigError where there is none."""
    folder = Path(directory)
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no such folder; expected one with params.json or config.json") from None
    except NotADirectoryError:
        raise ConfigError(f"{folder}: not a folder; expected one with params.json or config.json") from None
    except OSError as problem:
        raise ConfigError(f"{folder}: cannot be read ({problem.strerror})") from None
    layout = layout_of(names)
    if layout is None:
        raise ConfigError(
            f"{folder}: neither params.json nor config.json is in this folder; expected a checkpoint as published"
        )
    return layout
