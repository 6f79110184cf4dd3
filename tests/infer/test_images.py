"""Prompts with images: in chunks, in batches, in later turns, and scored; what does not fit together is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import ministral_jax
from infer.generate import Generator
from infer.images import prompt_rows, text_alone
from infer.pages import PageTables
from infer.sampling import SamplingParams
from infer.scoring import score
from ministral_jax.cache import PagedBatch, allocate_cache, plan_cache
from ministral_jax.errors import RequestError
from ministral_jax.transformer import Transformer
from ministral_jax.vision_adapter import ImageRows
from tests.golden.vision_models import IMAGE, case_ids, case_images, vision_by_name, write_vision_native
from tests.ministral_jax.paged_runner import jitted

GOLDEN = vision_by_name("vision")
ONE, THREE = (case_ids(GOLDEN, case).tolist() for case in ("one", "three"))
TEXT = [token for token in THREE if token > IMAGE + 3]
PARAMS = SamplingParams(max_tokens=6, logprobs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_native(GOLDEN, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    return ministral_jax.load(folder)


@pytest.fixture(scope="module")
def generator(model: Transformer) -> Generator:
    """Chunks of 16 tokens for two sequences at once, so that images are cut."""
    return Generator(model, page_size=4, prefill_chunk=16, max_length=128)


def test_answers_are_those_of_whole_sequences(model: Transformer, generator: Generator) -> None:
    """One image, several, none, in one batch; scoring sees each prompt and its answer at once."""
    prompts, images = [ONE, THREE, TEXT], [case_images("one"), case_images("three"), []]
    answers = generator.generate(prompts, PARAMS, images=images)
    for prompt, own, answer in zip(prompts[:2], images, answers, strict=False):
        scored = score(model, [*prompt, *answer.ids], own)
        assert len(answer.ids) == 6
        assert [token for token, _ in scored.top[len(prompt) - 1 : -1]] == list(answer.ids)
        found = [entry.logprob for entry in answer.logprobs]
        np.testing.assert_allclose(found, scored.logprobs[len(prompt) :], rtol=0, atol=1e-4)
    assert generator.generate([TEXT] * 3, PARAMS)[0].ids == answers[2].ids


def test_what_an_image_shows_decides_the_answer(generator: Generator) -> None:
    shown, other = case_images("one"), [image[:, ::-1].copy() for image in case_images("one")]
    answers = generator.generate([ONE, ONE, ONE], PARAMS, images=[shown, other, shown])
    assert answers[0].ids == answers[2].ids != answers[1].ids


def test_an_image_in_the_second_turn_sees_the_cached_first_one(model: Transformer) -> None:
    """Two turns through one cache, the second with three images, against both turns at once."""
    turns = [(np.array(ids, np.int32), case_images(case)) for ids, case in ((ONE, "one"), (THREE, "three"))]
    rows = max(len(ids) for ids, _ in turns)
    dtype, total = jnp.dtype(jnp.float32), len(ONE) + len(THREE)
    plan = plan_cache(model.config, batch=1, length=128, chunk=rows, page_size=4, dtype=dtype)
    cache, tables, done = allocate_cache(model.config, plan, dtype), PageTables(plan, 1), 0
    text = text_alone(model)
    extend = jitted(text, Transformer.extend)
    parts = []
    for ids, images in turns:
        tables.advance(0, done, done + len(ids))
        done += len(ids)
        batch = PagedBatch(
            tuple(jnp.asarray(table) for table in tables.tables), jnp.array([0, len(ids)]), jnp.array([done])
        )
        shown = prompt_rows(model, ids.tolist(), images, rows)
        hidden, cache = extend(
            jnp.asarray(np.pad(ids, (0, rows - len(ids)))), cache, batch, ImageRows(shown.rows[0], shown.present[0])
        )
        parts.append(hidden[: len(ids)])
    both = [*ONE, *THREE]
    at_once = jitted(text, whole_sequence)(jnp.array([both]), prompt_rows(model, both, [*turns[0][1], *turns[1][1]]))[0]
    assert len(at_once) == total
    np.testing.assert_allclose(np.concatenate(parts), at_once, rtol=0, atol=1e-5 * np.ptp(at_once))


def whole_sequence(model: Transformer, tokens: Any, images: Any) -> Any:
    return model.hidden(tokens, images=images)


def test_images_in_several_chunks_run_the_programs_of_one(generator: Generator) -> None:
    generator.generate([THREE] * 3, PARAMS, images=[case_images("three")] * 3)
    before = generator._steps.prefill._cache_size()
    ids = [20, *([*[IMAGE] * 3, 12] * 6), 30]
    generator.generate([ids] * 3, PARAMS, images=[[np.zeros((3, 48, 24), np.float32)]] * 3)
    assert generator._steps.prefill._cache_size() == before


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (ONE, [[np.zeros((3, 8, 8), np.float32)]], r"prompt 0 has 6 image tokens \(id 10\), its 1 images have 1"),
        (TEXT, [case_images("one")], "prompt 0 has 0 image tokens"),
        (ONE, [[np.zeros((3, 20, 16), np.float32)]], "an image of 16 x 20 pixels: expected multiples of 8 up to 56"),
        (ONE, [[np.zeros((3, 64, 8), np.float32)]], "an image of 8 x 64 pixels"),
        (ONE, [[np.zeros((1, 8, 8), np.float32)]], r"image pixels of shape \[1, 8, 8\]"),
        (ONE, [[], []], "images for 2 prompts, of which there are 1"),
    ],
)
def test_images_that_are_not_those_of_the_prompt_are_refused(
    prompt: Any, images: Any, message: str, generator: Generator
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        generator.generate([prompt], images=images)
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_images(folder: Path) -> None:
    text = ministral_jax.load(folder, vision=False)
    with pytest.raises(RequestError, match="prompt 0 has 1 images: this model reads text only"):
        Generator(text).generate([ONE], images=[case_images("one")])
    with pytest.raises(RequestError, match="the sequence has 1 images: this model reads text only"):
        score(text, ONE, case_images("one"))
