"""Comparing checkpoints: what is found, how much of it, and that nothing else is."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.conversion.compare import Comparison, compare
from ministral_jax.checkpoints.conversion.opening import open_checkpoint
from ministral_jax.checkpoints.conversion.pieces import CHUNK_BYTES
from tests.architecture_files import EXAMPLES, Tensors, write_example
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

WQ = "layers.1.attention.wq.weight"
FILE = "consolidated.safetensors"


def compared(a: Path, b: Path) -> Comparison:
    with open_checkpoint(a) as one, open_checkpoint(b) as other:
        return compare(one, other)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path, Tensors]:
    """Two equal folders in the mistral layout, float32, and their tensors."""
    write_tiny_checkpoint(tmp_path / "a", tiny_config(), "mistral")
    write_tiny_checkpoint(tmp_path / "b", tiny_config(), "mistral")
    from safetensors.numpy import load_file

    return tmp_path / "a", tmp_path / "b", load_file(tmp_path / "a" / FILE)


def test_equal_folders_are_the_same(pair):
    a, b, tensors = pair
    assert compared(a, b) == Comparison(len(tensors), ())


def test_elements_that_differ_are_counted_and_the_largest_gap_told(pair):
    a, b, tensors = pair
    tensors[WQ][3, 5] += 0.5
    tensors[WQ][9, 1] -= 2.0
    save_file(tensors, b / FILE)
    (found,) = compared(a, b).differences
    assert (found.name, found.different, found.elements) == (WQ, 2, tensors[WQ].size)
    assert found.max_abs == pytest.approx(2.0)


@pytest.mark.parametrize(("value", "gap"), [(np.nan, np.inf), (np.inf, np.inf), (-0.0, 0.0)])
def test_bits_decide_and_gaps_are_told_by_value(pair, value, gap):
    a, b, tensors = pair
    tensors["norm.weight"][2] = 0.0
    save_file(tensors, a / FILE)
    tensors["norm.weight"][2] = value
    save_file(tensors, b / FILE)
    (found,) = compared(a, b).differences
    assert (found.different, found.max_abs) == (1, gap)
    assert compared(b, b).same


def test_another_dtype_is_a_difference_even_with_equal_values(pair):
    a, b, tensors = pair
    tensors["norm.weight"] = np.round(tensors["norm.weight"])
    save_file(tensors, a / FILE)
    save_file(tensors | {"norm.weight": tensors["norm.weight"].astype(np.float16)}, b / FILE)
    (found,) = compared(a, b).differences
    assert (found.in_a, found.in_b, found.different) == ("float32 [64]", "float16 [64]", 0)


def test_a_tied_head_on_one_side_alone_is_told(tmp_path):
    example = EXAMPLES["ministral3_tied"]()
    write_example(tmp_path / "a", example, "mistral")
    example.tensors["output.weight"] = example.tensors["tok_embeddings.weight"]
    write_example(tmp_path / "b", example, "hf")
    (found,) = compared(tmp_path / "a", tmp_path / "b").differences
    assert (found.name, found.in_a, found.in_b) == ("output.weight", None, "bfloat16 [128, 64]")
    assert str(found) == "output.weight: only in B (bfloat16 [128, 64])"


def test_a_difference_far_inside_a_tensor_of_many_pieces_is_found_in_either_layout(tmp_path):
    rows = CHUNK_BYTES // (4 * 64) * 2 + 7
    config = tiny_config(vocab_size=rows, n_layers=1)
    weights = write_tiny_checkpoint(tmp_path / "a", config, "mistral")
    write_tiny_checkpoint(tmp_path / "b", config, "hf")
    assert compared(tmp_path / "a", tmp_path / "b").same
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.embed_tokens.weight"][rows - 2, 63] += 1
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    (found,) = compared(tmp_path / "a", tmp_path / "b").differences
    assert (found.name, found.different) == ("tok_embeddings.weight", 1)
    assert weights["tok_embeddings.weight"].nbytes > 2 * CHUNK_BYTES
