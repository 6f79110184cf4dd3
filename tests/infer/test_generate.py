"""Generation: answers equal what scoring says of them; ends, limits, batches, compiled programs, cache size."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from infer import generate
from infer.answer import Completion
from infer.generate import Generator
from infer.sampling import SamplingParams
from infer.scoring import score
from ministral_jax.cache import plan_cache
from ministral_jax.errors import RequestError
from ministral_jax.tokenizer import Tokenizer
from tests.tokenizers import tokenizer

from .tiny_models import MAX_LENGTH, random_prompts, tiny_model

TOKENIZER = "tiny-v13"
# Of four sequences one bucket; the longest takes three chunks, the shortest is one token.
PROMPTS = random_prompts(40, 7, 1)


@pytest.fixture(scope="module")
def generator() -> Generator:
    """Pages of 4 and chunks of 16, so that every prompt crosses both."""
    return Generator(tiny_model(), tokenizer(TOKENIZER), page_size=4, prefill_chunk=16)


@pytest.fixture(scope="module")
def greedy(generator: Generator) -> list[Completion]:
    return generator.generate(PROMPTS, SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2))


def test_log_probabilities_while_decoding_are_those_of_scoring_the_result(greedy: list[Completion]) -> None:
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        assert len(found.ids) == len(found.logprobs) == 30
        again = score(tiny_model(), [*prompt, *found.ids])
        np.testing.assert_allclose(
            [entry.logprob for entry in found.logprobs], again.logprobs[len(prompt) :], atol=5e-5
        )


def test_greedy_takes_the_token_that_scoring_finds_likeliest(greedy: list[Completion]) -> None:
    for prompt, found in zip(PROMPTS, greedy, strict=True):
        top = score(tiny_model(), [*prompt, *found.ids]).top[len(prompt) - 1 : -1]
        assert list(found.ids) == [token for token, _ in top]
        for entry, (token, logprob) in zip(found.logprobs, top, strict=True):
            assert entry.id == entry.top[0][0] == token
            assert entry.top[0][1] == pytest.approx(logprob, abs=5e-5)


def test_a_drawn_answer_depends_on_its_seed_and_not_on_the_batch(generator: Generator) -> None:
    mine = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)
    other = SamplingParams(temperature=0.7, seed=6, max_tokens=5, ignore_eos=True)
    third, first, _ = generator.generate([PROMPTS[1], PROMPTS[0], PROMPTS[1]], [mine, other, other])
    alone = generator.generate([PROMPTS[0], PROMPTS[2], PROMPTS[1]], [other, other, mine])
    assert alone[2].ids == third.ids
    assert alone[0].ids == first.ids
    reseeded = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=12, ignore_eos=True)
    changed = generator.generate([PROMPTS[1], PROMPTS[0], PROMPTS[1]], [reseeded, other, other])
    assert changed[0].ids != third.ids


def test_stop_ids_end_an_answer_and_are_left_out(generator: Generator, greedy: list[Completion]) -> None:
    ids = greedy[0].ids
    stop = next(token for i, token in enumerate(ids) if i > 3 and token not in ids[:i])
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2, stop_ids=(stop,))
    found = generator.generate(PROMPTS, [params, *[SamplingParams(max_tokens=9, ignore_eos=True, logprobs=0)] * 2])
    assert found[0].ids == ids[: ids.index(stop)]
    assert found[0].finish_reason == "stop"
    assert [(len(other.ids), other.finish_reason) for other in found[1:]] == [(9, "length")] * 2
    assert found[1].ids == greedy[1].ids[:9]
    assert all(entry.top == () for entry in found[1].logprobs)


def test_the_end_of_sequence_token_ends_an_answer_unless_ignored(
    generator: Generator, greedy: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer whose end of sequence is a token that the model does produce."""
    ids = greedy[0].ids
    eos = next(token for i, token in enumerate(ids) if i > 3 and token not in ids[:i])
    monkeypatch.setattr(Tokenizer, "eos_id", eos)
    ended = generator.generate(PROMPTS, SamplingParams(max_tokens=30, logprobs=2))[0]
    assert (ended.ids, ended.finish_reason) == (ids[: ids.index(eos)], "stop")
    assert generator.generate(PROMPTS, SamplingParams(max_tokens=30, logprobs=2, ignore_eos=True))[0].ids == ids


def test_a_stop_string_ends_the_text_where_it_begins(generator: Generator, greedy: list[Completion]) -> None:
    text = greedy[1].text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2, stop=(stop,))
    found = generator.generate(PROMPTS, params)[1]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.ids) < 30


def test_streamed_pieces_make_up_the_whole_answer(generator: Generator, greedy: list[Completion]) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2)
    pieces = list(generator.stream_ids(PROMPTS, params, seconds_per_call=1e-4))
    assert len(pieces) > len(PROMPTS)
    for i, found in enumerate(greedy):
        own = [piece for piece in pieces if piece.index == i]
        assert tuple(token for piece in own for token in piece.ids) == found.ids
        assert "".join(piece.text for piece in own) == found.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + ["length"]


def test_more_prompts_than_a_batch_holds_are_answered_in_turn(
    generator: Generator, greedy: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "MAX_BATCH", 4)
    short = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)
    found = generator.generate([*PROMPTS, *PROMPTS[::-1], PROMPTS[1]], short)
    expected = [completion.ids[:6] for completion in greedy]
    assert [one.ids for one in found] == [*expected, *expected[::-1], expected[1]]
    assert [one.prompt_length for one in found] == [40, 7, 1, 1, 7, 40, 7]
    assert (generator.timing.prompt_tokens, generator.timing.new_tokens) == (103, 42)


def test_the_context_ends_what_nothing_else_does(generator: Generator) -> None:
    (prompt,) = random_prompts(MAX_LENGTH - 4)
    found = generator.generate([prompt, *PROMPTS[1:]], SamplingParams(ignore_eos=True, logprobs=0))
    assert [len(one.ids) for one in found] == [4, MAX_LENGTH - 7, MAX_LENGTH - 1]
    assert {one.finish_reason for one in found} == {"length"}


def test_no_program_is_compiled_for_another_length_of_the_same_bucket(
    generator: Generator, greedy: list[Completion]
) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=2)
    generator.generate(random_prompts(33, 20, 4), params)
    steps = generator._steps
    before = [function._cache_size() for function in steps]
    assert before[0] == 1  # 1 to 16 rows of a prefill chunk are one program
    for prompts in (random_prompts(48, 7, 1), random_prompts(40, 30, 18, 5), random_prompts(35, 3, 3)):
        generator.generate(prompts, SamplingParams(max_tokens=len(prompts[0]), ignore_eos=True, logprobs=2))
    assert [function._cache_size() for function in steps] == before


def test_the_cache_of_a_windowed_layer_holds_its_window(generator: Generator, greedy: list[Completion]) -> None:
    config = tiny_model().config
    plan = generator.cache_plan
    assert plan is not None
    assert generator.cache_bytes == plan.n_bytes
    assert plan == plan_cache(config, batch=4, length=MAX_LENGTH, chunk=64, page_size=4, dtype=jnp.dtype(jnp.float32))
    full, windowed = plan.groups
    assert (full.pages, windowed.pages) == (4 * 32 + 1, 4 * 18 + 1)  # 6 - 1 + 64 tokens touch at most 18 pages of 4


def test_a_float8_cache_is_a_quarter_as_large_and_answers_nearly_the_same(
    generator: Generator, greedy: list[Completion]
) -> None:
    """Given the same tokens, log-probabilities move a little, as they must where keys and values are rounded."""
    small = Generator(tiny_model(), page_size=4, prefill_chunk=16, cache_dtype="float8_e4m3fn")
    first = SamplingParams(max_tokens=1, logprobs=0)
    exact = generator.generate([PROMPTS[0]], first)[0].logprobs[0].logprob
    rounded = small.generate([PROMPTS[0]], first)[0].logprobs[0].logprob
    assert 0 < abs(exact - rounded) < 1.0
    generator.generate(PROMPTS, first)
    small.generate(PROMPTS, first)
    assert 4 * small.cache_bytes == generator.cache_bytes
    assert small.cache_plan is not None
    assert small.cache_plan.n_bytes == small.cache_bytes


def test_a_cache_dtype_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RequestError, match="cache dtype 'int4': expected one of float32, bfloat16"):
        Generator(tiny_model(), cache_dtype="int4")


REFUSED: list[tuple[Any, SamplingParams | list[SamplingParams], str]] = [
    ([[]], SamplingParams(), "prompt 0 is empty: expected at least one token"),
    ([[1], [1, 314]], SamplingParams(), "prompt 1 has token id 314: expected 0 to 313"),
    ([[1], [-1]], SamplingParams(), "prompt 1 has token id -1"),
    ([[1] * MAX_LENGTH], SamplingParams(), "prompt 0 has 128 tokens: expected at most 127"),
    ([[1], [2]], [SamplingParams()], "1 sampling params for 2 prompts"),
    ([[1]], SamplingParams(stop=("x",)), "stop strings need a tokenizer"),
]


@pytest.mark.parametrize(("prompts", "params", "message"), REFUSED)
def test_a_request_that_cannot_be_served_is_refused_before_any_work(prompts: Any, params: Any, message: str) -> None:
    generator = Generator(tiny_model(), page_size=4, prefill_chunk=16)
    with pytest.raises(RequestError, match=message):
        generator.generate(prompts, params)
    assert generator.cache_bytes == 0


def test_no_prompts_give_no_answers(generator: Generator) -> None:
    assert generator.generate([]) == []
