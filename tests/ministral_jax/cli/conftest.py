"""A tiny Ministral for the command line's tests: windows, a v13 tekken file, random weights. Holds no tests."""

from pathlib import Path

import pytest

from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.tekken_files import tiny_tekken, write_tiny_tekken


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, whose words are as many as the embedding's rows."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = tiny_tekken("v13")["config"]["default_vocab_size"]
    write_tiny_checkpoint(folder, tiny_config("ministral", vocab_size=words, max_length=512))
    write_tiny_tekken(folder, "v13")
    return folder


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the HF layout without a tokenizer file."""
    folder = tmp_path_factory.mktemp("bare")
    write_tiny_checkpoint(folder, tiny_config("ministral"), "hf")
    return folder
