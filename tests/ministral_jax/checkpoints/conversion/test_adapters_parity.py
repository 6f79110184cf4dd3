"""PEFT itself: it loads the adapters that we convert, we convert those that it saves, and the logits are ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.load import load_model
from tests.architecture_files import EXAMPLES, make, write_example
from tests.checkpoint_files import tiny_config
from tests.ministral_jax.checkpoints.conversion.test_adapters import PEFT, write_mistral_adapter

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

KINDS = ["mistral", "mistral_window", "ministral", "ministral3_tied", "wide_heads"]
# Of the range of the logits.
CLOSE = 1e-4
TOKENS = np.arange(3, 33)[None] % 128
# What is more than one rank and one factor for all, in PEFT's words.
UNEVEN: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"k_proj": 5},
}


def base(folder: Path, kind: str) -> Any:
    """Writes folder/base in the mistral layout and folder/base_hf; returns what transformers loads of the latter."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    example = EXAMPLES[kind]() if kind in EXAMPLES else make(tiny_config(kind))  # type: ignore[arg-type]
    write_example(folder / "base", example, "mistral")
    convert(folder / "base", folder / "base_hf", to="hf")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base_hf", attn_implementation="eager", dtype=torch.float32
    ).eval()


def their_logits(model: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def our_logits(folder: Path, adapter: Path | None = None) -> np.ndarray:
    model = load_model(folder, dtype="float32", adapter=adapter)
    return np.asarray(jax.jit(model.__call__)(jnp.asarray(TOKENS)))


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.ptp(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_a_converted_adapter_and_answers_as_here(tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = base(tmp_path, kind)
    weights = write_mistral_adapter(tmp_path / "lora", EXAMPLES[kind]().config, scaling=0.75)
    convert(tmp_path / "lora", tmp_path / "peft", to="hf")
    plain = their_logits(model)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    assert sum(".lora_A." in name for name, _ in adapted.named_parameters()) == len(weights) / 2
    expected = their_logits(adapted)
    assert worst(our_logits(tmp_path / "base", tmp_path / "lora"), expected) < CLOSE
    assert worst(plain, expected) > 0.1  # so that the comparison means much


def saved_by_peft(model: Any, folder: Path, **settings: Any) -> Any:
    """A model with a random adapter on every projection, the adapter saved in `folder`."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_converted_and_answers_as_there(tmp_path, kind):
    adapted = saved_by_peft(base(tmp_path, kind), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "lora", to="mistral", base=tmp_path / "base")
    expected = their_logits(adapted)
    assert worst(our_logits(tmp_path / "base", tmp_path / "lora"), expected) < CLOSE
    assert worst(our_logits(tmp_path / "base"), expected) > 0.1


def test_what_peft_saves_comes_back_to_the_bit_and_is_loaded_by_it(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = saved_by_peft(base(tmp_path, "ministral"), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "lora", to="mistral", base=tmp_path / "base")
    convert(tmp_path / "lora", tmp_path / "again", to="hf")
    first, last = load_file(tmp_path / "peft" / PEFT), load_file(tmp_path / "again" / PEFT)
    assert first.keys() == last.keys()
    assert all(np.array_equal(first[name], last[name]) for name in first)
    again = peft.PeftModel.from_pretrained(base(tmp_path / "2", "ministral"), tmp_path / "again")
    np.testing.assert_array_equal(their_logits(again), their_logits(adapted))


def test_ranks_and_factors_of_single_modules_are_taken_as_peft_takes_them(tmp_path):
    adapted = saved_by_peft(base(tmp_path, "mistral"), tmp_path / "peft", **UNEVEN)
    ranks = {name: len(values) for name, values in load_file(tmp_path / "peft" / PEFT).items() if "lora_A" in name}
    assert {rank for name, rank in ranks.items() if re.search("q_proj", name)} == {3}
    assert worst(our_logits(tmp_path / "base", tmp_path / "peft"), their_logits(adapted)) < CLOSE
