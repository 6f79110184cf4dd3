"""Every kind of tokenizer that tests run over, each loaded once per process. Holds no tests."""

import functools
import tempfile
from pathlib import Path

import mistral_common
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ministral_jax.tokenizer import Tokenizer
from tests.tekken_files import write_tiny_tekken

# The published files that mistral-common ships.
SHIPPED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v3-tekken": "tekken_240911.json",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
}
TINY = {f"tiny-{version}": version for version in ("v3", "v7", "v11", "v13", "v15")}
KINDS = [*SHIPPED, *TINY]


def shipped_file(kind: str) -> Path:
    """The path of a published tokenizer file, by its kind."""
    return Path(mistral_common.__file__).parent / "data" / SHIPPED[kind]


def version_number(kind: str) -> int:
    """3 for "v3-tekken", 7 for "v7m1", 13 for "tiny-v13"."""
    return int(kind.removeprefix("tiny-").removeprefix("v").split("-")[0].split("m")[0])


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """Ours."""
    if kind in SHIPPED:
        return Tokenizer.load(shipped_file(kind))
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.load(write_tiny_tekken(Path(directory), TINY[kind]))


@functools.cache
def mistral_tokenizer(kind: str) -> MistralTokenizer:
    """mistral-common's own, loaded apart from ours."""
    if kind in SHIPPED:
        return MistralTokenizer.from_file(shipped_file(kind))
    with tempfile.TemporaryDirectory() as directory:
        return MistralTokenizer.from_file(write_tiny_tekken(Path(directory), TINY[kind]))
