"""Prompts with images, live, against transformers and mistral-inference."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ministral_jax
from infer.images import prompt_rows, text_alone
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.parameters import parameters
from ministral_jax.transformer import Transformer
from tests.golden.mistral_inference_runner import run_mistral_inference
from tests.golden.values import CLOSE
from tests.golden.vision_models import CASES, case_ids, case_images, vision_by_name, write_vision_native
from tests.ministral_jax.paged_runner import jitted

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # what other libraries warn about is not ours to fix
]
GOLDEN = vision_by_name("vision")


def all_logits(model: Transformer, tokens: Any, images: Any) -> Any:
    return model.logits(model.hidden(tokens, images=images))


def our_logits(model: Transformer, ids: np.ndarray, images: list[np.ndarray]) -> np.ndarray:
    run = jitted(text_alone(model), all_logits)
    return np.asarray(run(ids[None], prompt_rows(model, ids.tolist(), images)))[0]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


@functools.cache
def torch_model() -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_vision_golden import transformers_vision_model

    return transformers_vision_model(GOLDEN)


def torch_logits(model: Any, case: str) -> np.ndarray:
    from tests.golden.make_vision_golden import run_vision

    return run_vision(model, case_ids(GOLDEN, case), case_images(case))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_transformers_saved_answers_the_same(case: str, tmp_path: Path) -> None:
    torch_model().save_pretrained(tmp_path)
    model = ministral_jax.load(tmp_path)
    assert_close(our_logits(model, case_ids(GOLDEN, case), case_images(case)), torch_logits(torch_model(), case))


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = ministral_jax.load(write_vision_native(GOLDEN, tmp_path / "native"))
    save_hf(tmp_path / "hf", parameters(model), model.config)
    again, report = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(torch_logits(again.float().eval(), "three"), torch_logits(torch_model(), "three"))


@pytest.mark.parametrize("name", ["vision_plain", "vision_unmerged"])
def test_mistral_inference_answers_the_same_to_what_we_save(name: str, tmp_path: Path) -> None:
    """One image: of several it lets the patches of one see those of the others."""
    golden = vision_by_name(name)
    model = ministral_jax.load(write_vision_native(golden, tmp_path / "native"))
    save_mistral(tmp_path / "saved", parameters(model), model.config)
    ids, images = case_ids(golden, "one"), case_images("one")
    theirs = run_mistral_inference(tmp_path / "saved", ids[None], [len(ids)], images=images)[0]
    assert_close(our_logits(model, ids, images), theirs)
