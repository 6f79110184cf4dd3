"""Greedy answers do not depend on pages, chunks, the rest of the batch, or which implementation of attention runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import ministral_jax
from infer.answer import Completion
from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax import attend
from ministral_jax.checkpoints.load import load_model
from ministral_jax.transformer import Transformer
from pallas_kernels.paged_attention import Implementation, paged_attention

from .tiny_models import random_prompts, tiny_model

BUNDLED = Path(ministral_jax.__file__).parent / "bundled" / "passkey"
NEW_TOKENS = 24
NEAR_TIE = 1e-3  # of the range of the logits: nearer than this, rounding may decide


@dataclass(frozen=True)
class Way:
    """One way to run the same requests. `beside` are other prompts in the batch, before and after."""

    page_size: int
    chunk: int
    beside: tuple[int, int]
    implementation: Implementation = "xla"


WAYS = [
    Way(16, 32, (1, 1), "pallas_tpu"),
    Way(16, 64, (1, 0)),
    Way(1, 16, (0, 0)),
    Way(4, 32, (1, 2)),
    Way(64, 512, (0, 0)),
    Way(256, 16, (2, 0)),
    Way(16, 64, (0, 1), "reference"),
]


@pytest.fixture(autouse=True)
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pallas kernels run step by step on the CPU."""

    def call(*arrays: Any, implementation: Implementation, **options: Any) -> Any:
        pallas = implementation.startswith("pallas")
        return paged_attention(*arrays, implementation=implementation, interpret=pallas, **options)

    monkeypatch.setattr(attend, "paged_attention", call)


def model_of(name: str, implementation: Implementation) -> Transformer:
    if name == "random":
        return tiny_model(attention=implementation)
    return load_model(BUNDLED, dtype="float32", attention=implementation)


def prompts_of(name: str) -> tuple[list[int], list[list[int]]]:
    """The prompt under test, several windows long, and others to stand beside it."""
    if name == "random":
        prompt, *others = random_prompts(45, 7, 20, 1)
        return prompt, others
    prompt, *others = random_prompts(150, 9, 60, 1, vocab_size=700)
    return prompt, others


def answer(name: str, way: Way) -> Completion:
    prompt, others = prompts_of(name)
    before, after = way.beside
    batch = [*others[:before], prompt, *others[len(others) - after :]]
    generator = Generator(model_of(name, way.implementation), page_size=way.page_size, prefill_chunk=way.chunk)
    params = SamplingParams(max_tokens=NEW_TOKENS, logprobs=0)
    return generator.generate(batch, params)[before]


@functools.cache
def baseline(name: str) -> tuple[Completion, int]:
    """The answer by the dense definition, one prompt alone, and how many of its tokens are no near tie."""
    found = answer(name, Way(64, 512, (0, 0), "reference"))
    prompt, _ = prompts_of(name)
    model = model_of(name, "reference")
    tokens = np.array([[*prompt, *found.ids]], np.int32)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(tokens))[0, len(prompt) - 1 : -1]
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    ties = np.flatnonzero(first - second < NEAR_TIE * np.ptp(logits, axis=-1))
    return found, int(ties[0]) if len(ties) else NEW_TOKENS


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("random", way) for way in WAYS),
        ("bundled", WAYS[1]),
        *(pytest.param("bundled", way, marks=pytest.mark.slow) for way in (WAYS[0], *WAYS[2:])),
    ],
    ids=str,
)
def test_greedy_answers_are_the_same_every_way(name: str, way: Way) -> None:
    expected, certain = baseline(name)
    assert certain >= NEW_TOKENS // 2  # else this would show little
    found = answer(name, way)
    assert found.ids[:certain] == expected.ids[:certain]
    for one, other in zip(found.logprobs[:certain], expected.logprobs[:certain], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
