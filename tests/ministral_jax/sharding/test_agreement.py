"""What processes compare: every difference between two checkpoints, configs or sets of versions shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ministral_jax.config import ModelConfig
from ministral_jax.sharding.agreement import checkpoint_items, config_items, difference, require_same_model
from ministral_jax.sharding.agreement import version_items as versions
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

WEIGHTS = "consolidated.safetensors"
FIRST = "layers.0.attention.wq.weight"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The weight files of two equal checkpoints in folders of their own."""
    write_tiny_checkpoint(tmp_path / "one", tiny_config())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one" / WEIGHTS, tmp_path / "two" / WEIGHTS


def compared(pair: tuple[Path, Path]) -> str:
    one, two = (checkpoint_items([path]) for path in pair)
    return difference(one, two, 3)


def test_equal_copies_in_other_folders_agree(pair):
    assert compared(pair) == ""


def test_a_file_that_is_longer_is_named_with_both_sizes(pair):
    size = pair[1].stat().st_size
    with pair[1].open("ab") as file:
        file.write(b"x")
    assert compared(pair).startswith(
        f"process 3 differs from process 0 in the size of {WEIGHTS} (and 1 more): {size + 1} bytes there, {size} bytes "
    )


def test_another_dtype_of_one_tensor_shows_in_the_header(pair):
    tensors = load_file(pair[1])
    save_file(tensors | {FIRST: tensors[FIRST].view(np.int32)}, pair[1])
    assert compared(pair).startswith(f"process 3 differs from process 0 in the header of {WEIGHTS}")


def test_another_offset_of_a_tensor_shows_in_the_header(pair):
    raw = bytearray(pair[1].read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    norms = [name for name in header if name.endswith("attention_norm.weight")]
    header[norms[0]], header[norms[1]] = header[norms[1]], header[norms[0]]
    raw[8 : 8 + length] = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    pair[1].write_bytes(raw)
    assert f"in the header of {WEIGHTS}" in compared(pair)


def test_other_values_of_every_tensor_show_in_samples(pair):
    save_file({name: values + 1 for name, values in load_file(pair[1]).items()}, pair[1])
    assert compared(pair).startswith(f"process 3 differs from process 0 in the tensors of {WEIGHTS}: sha256 ")


def test_a_missing_file_is_nothing():
    assert difference({"the size of a": "1"}, {}, 1).startswith(
        "process 1 differs from process 0 in the size of a: nothing there, 1 in process 0;"
    )
    assert "in the size of a: 1 there, nothing in process 0;" in difference({}, {"the size of a": "1"}, 1)


def test_other_windows_are_a_field_of_the_config():
    one, two = tiny_config("mistral"), tiny_config("mistral_window")
    assert "in the config's windows: (5, 5, 5) there, (None, None, None) in" in difference(
        config_items(one), config_items(two), 1
    )


def test_every_field_of_a_config_is_compared():
    assert len(config_items(tiny_config())) == len(ModelConfig.__dataclass_fields__)


def test_versions_are_those_of_what_computes():
    assert set(versions()) == {"python", "jax", "jaxlib", "flax", "numpy", "ministral-jax"}
    assert versions()["numpy"] == np.__version__


def test_a_process_that_is_alone_reads_nothing_to_agree_with_itself(tmp_path):
    require_same_model(tmp_path / "nowhere")
