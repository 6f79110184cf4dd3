"""From the MODEL argument to a model, its tokenizer and a Generator. Shows progress; prints nothing on stdout."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError, MinistralError, RequestError, TokenizerError
from .failures import UsageError
from .output import waiting

if TYPE_CHECKING:
    from infer.generate import Generator

    from ..config import Window
    from ..tokenizer import Tokenizer
    from ..transformer import Transformer

TokenizerUse = Literal["needed", "if there", "not used"]


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run; `tokenizer` is None where there is none or none was asked for."""

    model: Transformer
    tokenizer: Tokenizer | None
    folder: Path

    @property
    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer, where the command opened the model with one."""
        if self.tokenizer is None:
            raise MinistralError(f"{self.folder}: no tokenizer file, which text needs; give token ids with --ids")
        return self.tokenizer

    def generator(self, max_length: int | None = None, cache_dtype: str | None = None) -> Generator:
        """A Generator over the model, for sequences of up to `max_length` tokens; None is the model's own."""
        from infer.generate import Generator

        return Generator(self.model, self.tokenizer, max_length=max_length, cache_dtype=cache_dtype)


def open_model(arguments: argparse.Namespace, *, tokenizer: TokenizerUse, images: bool = False) -> OpenModel:
    """Finds and loads what the arguments of `add_model` name; the tokenizer first, since it is quick to fail.

    What reads `images` is loaded only for a command that may show some.
    """
    from ..checkpoints.hub import resolve
    from ..checkpoints.load import load_model
    from ..compilation import keep_compiled_programs
    from ..sharding.agreement import require_same_model

    windows = windows_of(arguments)
    folder = resolve(arguments.model, arguments.revision)
    words = None if tokenizer == "not used" else _open_tokenizer(folder, needed=tokenizer == "needed")
    require_same_model(folder, windows)
    keep_compiled_programs()
    with waiting(f"loading {folder}"):
        model = load_model(
            folder,
            dtype=arguments.dtype,
            windows=windows,
            activations=arguments.activations,
            vision=images,
            mesh=arguments.mesh,
            rules=arguments.rules,
            adapter=arguments.adapter,
        )
    longest = model.config.max_length
    if arguments.max_length is not None and arguments.max_length > longest:
        raise RequestError(f"--max-length {arguments.max_length}: expected at most {longest}, the model's context")
    return OpenModel(model, words, folder)


def _open_tokenizer(folder: Path, *, needed: bool) -> Tokenizer | None:
    """The folder's tokenizer; None where it has none and none is needed. A damaged one is always an error."""
    from ..tokenizer import Tokenizer
    from ..tokenizer_files import find_tokenizer_file

    if not needed:
        try:
            find_tokenizer_file(folder)
        except TokenizerError:
            return None
    return Tokenizer.load(folder)


def windows_of(arguments: argparse.Namespace) -> str | list[Window] | None:
    """What `--windows` says."""
    from ..catalog import parse_windows

    try:
        return None if arguments.windows is None else parse_windows(arguments.windows)
    except ConfigError as error:
        raise UsageError(f"--{error}") from error
