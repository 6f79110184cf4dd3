"""The bundled passkey model: its documents, its tokens, its training loop, and what the checked-in weights can do."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

import ministral_jax
from ministral_jax.checkpoints.load import load_model
from ministral_jax.config import ModelConfig, RopeConfig
from ministral_jax.errors import MinistralError
from train.passkey import documents, evaluate, pretrain, recipe, vocabulary
from train.passkey.conversations import ConversationEncoder, Stage, batch, random_conversation

BUNDLED = Path(ministral_jax.__file__).parent / "bundled" / "passkey"
STAGES = (recipe.FEW_FACTS, recipe.MORE_FACTS, recipe.SHORT, recipe.MIDDLE, recipe.LONG)
TINY = Stage(48, facts=(1, 1), questions=(1, 1), filler=(0.0, 0.2))


@pytest.fixture(scope="module")
def encoder() -> ConversationEncoder:
    return ConversationEncoder(BUNDLED / "tekken.json")


def tiny_recipe(vocabulary_size: int) -> recipe.Recipe:
    config = ModelConfig(
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        hidden_dim=48,
        vocab_size=vocabulary_size,
        norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        windows=(None, 8),
        max_length=64,
    )
    return recipe.Recipe(
        config,
        (recipe.Period(8, (TINY,)),),
        tokens_per_step=48 * 8,
        learning_rate=1e-2,
        warmup_steps=1,
        decay_steps=2,
    )


def test_no_number_is_on_both_sides_of_the_split() -> None:
    rng = random.Random(0)
    train = {documents.random_number(rng, "train") for _ in range(3000)}
    held_out = {documents.random_number(rng, "held-out") for _ in range(3000)}
    assert not train & held_out
    assert all(len(number) == 5 and number.isdigit() for number in train | held_out)


def test_about_one_number_in_ten_is_held_out() -> None:
    sides = [documents.split_of(f"{number:05d}") for number in range(0, 100_000, 37)]
    assert 0.08 < sides.count("held-out") / len(sides) < 0.13


@pytest.mark.parametrize("stage", STAGES)
def test_a_document_states_every_number_that_is_asked_for(stage: Stage, encoder: ConversationEncoder) -> None:
    rng = random.Random(1)
    for _ in range(30):
        conversation = random_conversation(rng, stage, encoder, "train")
        labels = [documents.PASS_KEY, *documents.DISTRACTOR_LABELS]
        for question, answer in zip(conversation.questions, conversation.answers, strict=True):
            label = next(label for label in labels if label in question)
            stated = [f.format(label=label, number=answer) for f in documents.STATEMENTS]
            assert any(statement in conversation.document for statement in stated)
            assert documents.split_of(answer) == "train"


def test_the_pass_key_is_always_asked_for(encoder: ConversationEncoder) -> None:
    rng = random.Random(2)
    for _ in range(50):
        questions = random_conversation(rng, recipe.LONG, encoder, "train").questions
        assert sum(documents.PASS_KEY in question for question in questions) == 1


def test_a_document_puts_its_key_at_the_depth_wanted(encoder: ConversationEncoder) -> None:
    rng = random.Random(3)
    for depth in (0.0, 0.5, 1.0):
        facts = documents.random_facts(rng, 4, "train")
        depths = [depth, 0.2, 0.6, 0.9]
        document = documents.write_document(rng, facts, depths, 600, encoder.count)
        at = encoder.count(document[: document.index(facts[0].sentence)]) / encoder.count(document)
        assert abs(at - depth) < 0.12
        assert 560 <= encoder.count(document) <= 640


@pytest.mark.parametrize("stage", STAGES)
def test_ids_equal_those_of_mistral_common_for_the_whole_chat(stage: Stage, encoder: ConversationEncoder) -> None:
    tokenizer, rng = MistralTokenizer.from_file(BUNDLED / "tekken.json"), random.Random(4)
    for _ in range(40):
        conversation = random_conversation(rng, stage, encoder, "held-out")
        messages = [UserMessage(content=conversation.first_turn)]
        for question, answer in zip(conversation.questions[1:], conversation.answers, strict=False):
            messages += [AssistantMessage(content=answer), UserMessage(content=question)]
        ids, answered = encoder.conversation(conversation)
        prompt = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert ids[:-6] == prompt
        assert ids[-6:] == [*encoder.text(conversation.answers[-1]), encoder.end]
        assert answered[-6:] == [True] * 6
        assert sum(answered) == 6 * len(conversation.answers)


def test_a_batch_marks_answers_where_they_are_predicted(encoder: ConversationEncoder) -> None:
    tokens, following, answered = batch(random.Random(5), recipe.MORE_FACTS, 4, encoder, "train")
    assert tokens.shape == following.shape == answered.shape == (4, recipe.MORE_FACTS.length)
    assert (tokens[:, 1:] == following[:, :-1]).all()
    digits = {encoder.text(str(digit))[0] for digit in range(10)}
    assert set(following[answered].tolist()) <= digits | {encoder.end}
    assert set(tokens[answered & (following != encoder.end)].tolist()) <= digits | {encoder.question_end}


def test_the_vocabulary_file_is_the_one_its_script_builds() -> None:
    built, checked_in = vocabulary.tekken(), (BUNDLED / "tekken.json").read_text()
    assert json.loads(checked_in) == built


def test_training_lowers_the_loss(encoder: ConversationEncoder, tmp_path: Path) -> None:
    run = tiny_recipe(encoder.vocabulary_size)
    rows = batch(random.Random(6), TINY, 8, encoder, "train")
    before = pretrain.answer_loss(run.config, pretrain.initial_state(run).parameters, *map(jnp.asarray, rows))[0]
    state = pretrain.train(run, BUNDLED / "tekken.json", tmp_path)
    after = pretrain.answer_loss(run.config, state.parameters, *map(jnp.asarray, rows))[0]
    assert state.step == run.steps
    assert after < 0.7 * before


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(encoder: ConversationEncoder, tmp_path: Path) -> None:
    run = tiny_recipe(encoder.vocabulary_size)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    at_once = pretrain.train(run, BUNDLED / "tekken.json", whole)
    pretrain.train(run, BUNDLED / "tekken.json", parts, until=3)
    resumed = pretrain.train(run, BUNDLED / "tekken.json", parts, resume=True)
    assert resumed.step == at_once.step
    for name, array in at_once.parameters.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(resumed.parameters[name]), err_msg=name)


def test_resuming_without_a_saved_state_is_refused_in_one_line(encoder: ConversationEncoder, tmp_path: Path) -> None:
    with pytest.raises(MinistralError, match=r"has no training_state\.safetensors: nothing to resume"):
        pretrain.load_state(tiny_recipe(encoder.vocabulary_size), tmp_path)


def test_a_text_of_ones_own_hides_every_fact_and_too_short_a_one_is_refused(encoder: ConversationEncoder) -> None:
    rng = random.Random(8)
    facts = documents.random_facts(rng, 4, "held-out")
    text = "It was a dark and stormy night; the rain fell in torrents. " * 20
    document = documents.hide_in_text(rng, text, facts, [0.1, 0.5, 0.5, 0.9], 200, encoder.count)
    assert all(document.count(fact.sentence) == 1 for fact in facts)
    assert 190 <= encoder.count(document) <= 215
    with pytest.raises(MinistralError, match="give a longer one"):
        documents.hide_in_text(rng, "Too short.", facts, [0.1, 0.5, 0.5, 0.9], 200, encoder.count)


@pytest.fixture(scope="module")
def cases(encoder: ConversationEncoder) -> list[evaluate.Case]:
    return evaluate.make_cases(encoder, recipe.WINDOW, lengths=(1, 2, 3, 4, 12), per_cell=6)


def test_the_bundled_model_is_the_recipes() -> None:
    config = load_model(BUNDLED).config
    assert dataclasses.replace(config, extra={}) == recipe.CONFIG


def test_the_bundled_model_finds_held_out_keys_up_to_four_windows(cases: list[evaluate.Case]) -> None:
    near = [case for case in cases if case.windows <= evaluate.REQUIRED_LENGTHS]
    right = evaluate.exact_answers(load_model(BUNDLED), near)
    assert sum(right) / len(right) >= evaluate.REQUIRED_ACCURACY


def test_with_every_layer_windowed_keys_beyond_the_stacked_windows_are_lost(cases: list[evaluate.Case]) -> None:
    reach = recipe.CONFIG.n_layers * (recipe.WINDOW - 1)
    far = [case for case in cases if case.distance > reach]
    assert len(far) >= 5
    intact = evaluate.exact_answers(load_model(BUNDLED), far)
    blind = load_model(BUNDLED, windows=[recipe.WINDOW])
    windowed = evaluate.exact_answers(blind, far)
    assert sum(intact) / len(far) >= 0.8
    assert sum(windowed) / len(far) < 0.2
