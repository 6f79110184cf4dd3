"""Samples: ids are mistral-common's own for the whole conversation, and the trained ones are the assistant's."""

import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from tests.tokenizers import KINDS, mistral_tokenizer, tokenizer, version_number
from tests.train.data.lines import CHAT, PAIR, REASONING, TOOLS, WHOLE_PAIR
from train.data.formats import read_record
from train.data.messages import RecordError
from train.data.samples import Pair, Sample
from train.data.tokens import SampleEncoder

TEXTS = st.text("ab é你\n[INST]", min_size=1, max_size=8).filter(lambda text: text.strip(" ") != "")
NO_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}
CALLING = [kind for kind in KINDS if version_number(kind) >= 3]


def parts(texts: list[str]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


@st.composite
def conversations(draw: st.DrawFn, kind: str, tools: bool) -> dict[str, Any]:
    """A line with one to three exchanges: text whole or in parts, calls and their results, reasoning from v13 on."""
    contents = TEXTS | st.lists(TEXTS, min_size=1, max_size=2).map(parts)
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 2))):
        messages.append({"role": "system", "content": draw(contents)})
    for number in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(contents)} for _ in range(draw(st.integers(1, 2)))]
        if tools and draw(st.booleans()):
            ids = [f"call{number}{place:04d}" for place in range(draw(st.integers(1, 2)))]
            arguments = json.dumps({"id": draw(TEXTS), "é": [1, {}]}, ensure_ascii=False)
            calls = [{"id": name, "function": {"name": "weather", "arguments": arguments}} for name in ids]
            said = {"content": draw(TEXTS)} if version_number(kind) >= 7 and draw(st.booleans()) else {}
            messages.append({"role": "assistant", "tool_calls": calls} | said)
            messages += [{"role": "tool", "tool_call_id": name, "content": draw(TEXTS)} for name in ids]
        answer = draw(contents)
        if version_number(kind) >= 13 and draw(st.booleans()):
            answer = [{"type": "thinking", "thinking": draw(TEXTS), "closed": True}, *parts([draw(TEXTS)])]
        messages.append({"role": "assistant", "content": answer, "weight": draw(st.sampled_from([0, 1, 1]))})
    if tools and draw(st.booleans()):
        last = {"id": "lastcall1", "function": {"name": "weather", "arguments": "{}"}}
        messages[-1] = {"role": "assistant", "tool_calls": [last]}
    messages[-1]["weight"] = 1
    effort = {"reasoning_effort": "high"} if version_number(kind) == 15 and draw(st.booleans()) else {}
    return {"messages": messages, **({"tools": TOOLS["tools"]} if tools else {}), **effort}


def one_shot(kind: str, line: dict[str, Any]) -> list[int]:
    """mistral-common's ids of the whole conversation under its fine-tuning rules, built from its own classes."""
    template = mistral_tokenizer(kind).instruct_tokenizer
    version, settings_of = template.tokenizer.version, template.tokenizer.model_settings_builder
    theirs = MistralTokenizer(
        template, get_validator(version, ValidationMode.finetuning), get_normalizer(version, settings_of)
    )
    messages: list[Any] = []
    for message in line["messages"]:
        role, content = message["role"], message.get("content")
        if role == "system":
            messages.append(SystemMessage(content=content))
        elif role == "user":
            messages.append(UserMessage(content=content))
        elif role == "tool":
            messages.append(ToolMessage(content=content, tool_call_id=message["tool_call_id"]))
        else:
            last = message is line["messages"][-1] and version_number(kind) < 13
            calls = [
                ToolCall(**({} if last else {"id": call["id"]}), function=FunctionCall(**call["function"]))
                for call in message.get("tool_calls", ())
            ]
            messages.append(AssistantMessage(content=content, tool_calls=calls or None))
    tools = [Tool(function=Function(**tool["function"])) for tool in line.get("tools", ())] or None
    effort = line.get("reasoning_effort")
    return theirs.encode_chat_completion(
        ChatCompletionRequest(messages=messages, tools=tools, reasoning_effort=effort)
    ).tokens


def encoded(kind: str, line: dict[str, Any], **options: Any) -> Sample:
    sample = SampleEncoder(tokenizer(kind), **options).encode(read_record(json.dumps(line).encode()))
    assert isinstance(sample, Sample)
    return sample


def turns(kind: str, ids: list[int]) -> list[slice]:
    """The assistant's turns, found by control tokens: from the end of what was said to it up to eos."""
    ours = tokenizer(kind)
    openings = {ours.special_id(name) for name in ("[/INST]", "[/TOOL_RESULTS]")} - {None}
    others = {ours.special_id(name) for name in ("[INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]")}
    found, start = [], None
    for place, token in enumerate(ids):
        if place and ids[place - 1] in openings and token not in others:
            start = place
        if token == ours.eos_id and start is not None:
            found.append(slice(start, place + 1))
            start = None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_one_shot_encoding_for_fine_tuning(kind):
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(conversations(kind, tools=version_number(kind) >= 3))
    def check(line: dict[str, Any]) -> None:
        for message in line["messages"]:
            message.pop("weight", None)
        assert encoded(kind, line).ids.tolist() == one_shot(kind, line)

    check()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if version_number(kind) >= 2])
def test_weighted_assistant_turns_with_their_eos_are_trained_and_nothing_else(kind):
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(conversations(kind, tools=False))
    def check(line: dict[str, Any]) -> None:
        sample = encoded(kind, line)
        expected = np.zeros(len(sample.ids))
        answers = [message for message in line["messages"] if message["role"] == "assistant"]
        found = turns(kind, sample.ids.tolist())
        assert len(found) == len(answers)
        for turn, message in zip(found, answers, strict=True):
            expected[turn] = message["weight"]
        assert sample.weights.tolist() == expected.tolist()

    check()


def test_v1_trains_the_answers_though_its_markers_are_text():
    sample = encoded("v1", CHAT)
    trained = sample.ids[sample.weights > 0].tolist()
    assert trained == [*tokenizer("v1").encode("Blue."), tokenizer("v1").eos_id]


@pytest.mark.parametrize("kind", CALLING)
def test_ids_of_calls_are_never_trained_and_the_last_ones_are_gone(kind):
    ours = tokenizer(kind)
    sample = encoded(kind, TOOLS)
    text = ours.decode(sample.ids.tolist(), keep_special=True)
    trained = ours.decode(sample.ids[sample.weights > 0].tolist(), keep_special=True)
    assert "z9Y8x7W6v" not in text
    assert ("a1B2c3D4e" in text) == (version_number(kind) < 13)
    for part in ("a1B2c3D4e", '"id"', "[CALL_ID]", "Rain", "rain"):
        assert part not in trained
    for part in ("[TOOL_CALLS]", "weather", "Oslo", "Rome", "Yes."):
        assert part in trained
    assert trained.count("</s>") == 3


def test_a_call_id_that_the_arguments_spell_is_trained_there():
    line = json.loads(json.dumps(TOOLS))
    line["messages"][2]["tool_calls"][0]["function"]["arguments"] = '{"town": "Oslo", "id": "a1B2c3D4e"}'
    for kind in ("v3", "v3-tekken", "v7", "tiny-v11"):
        sample = encoded(kind, line)
        text = tokenizer(kind).decode(sample.ids[sample.weights > 0].tolist(), keep_special=True)
        assert text.count("a1B2c3D4e") == 1


@pytest.mark.parametrize("field", ["only_last", "tools"])
def test_only_the_last_answer_is_trained_where_that_is_asked_for(field):
    line = TOOLS | ({"only_last": True} if field == "only_last" else {})
    sample = encoded("tiny-v13", line, tools_trained="last" if field == "tools" else "all")
    last = turns("tiny-v13", sample.ids.tolist())[-1]
    assert np.flatnonzero(sample.weights).tolist() == list(range(last.start, last.stop))


def test_conversations_without_tools_train_all_answers_under_either_rule():
    line = {"messages": [{**message, "weight": 1} for message in CHAT["messages"]]}
    both = [encoded("tiny-v13", line, tools_trained=rule) for rule in ("all", "last")]
    assert both[0].weights.tolist() == both[1].weights.tolist()


def test_neighbouring_answers_are_one_turn_unless_their_weights_differ():
    for weight, texts in ((0, ["b</s>"]), (1, ["a\n\nb</s>"])):
        answers = [{"role": "assistant", "content": "a", "weight": weight}, {"role": "assistant", "content": "b"}]
        sample = encoded("tiny-v13", {"messages": [{"role": "user", "content": "q"}, *answers]})
        trained = tokenizer("tiny-v13").decode(sample.ids[sample.weights > 0].tolist(), keep_special=True)
        assert [trained] == texts
        assert len(turns("tiny-v13", sample.ids.tolist())) == 1


def test_thinking_is_trained_with_its_markers():
    sample = encoded("tiny-v13", REASONING)
    trained = tokenizer("tiny-v13").decode(sample.ids[sample.weights > 0].tolist(), keep_special=True)
    assert trained == "[THINK]Two and two.[/THINK]4</s>"


def test_reasoning_beside_the_content_is_a_thinking_part():
    beside = {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"}
    line = {"messages": [*REASONING["messages"][:2], beside]}
    assert encoded("tiny-v13", line).ids.tolist() == encoded("tiny-v13", REASONING).ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_text_is_trained_whole_between_bos_and_eos(kind):
    sample = encoded(kind, {"text": "It was a day."})
    ours = tokenizer(kind)
    assert sample.ids.tolist() == [ours.bos_id, *ours.encode("It was a day."), ours.eos_id]
    assert sample.weights.tolist() == [0.0, *[1.0] * (len(sample.ids) - 1)]


@pytest.mark.parametrize("line", [PAIR, WHOLE_PAIR])
def test_both_shapes_of_a_pair_train_the_answers_alone(line):
    pair = SampleEncoder(tokenizer("tiny-v13")).encode(read_record(json.dumps(line).encode()))
    assert isinstance(pair, Pair)
    for sample, answer in ((pair.chosen, "Hello!"), (pair.rejected, "No.")):
        said = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": answer}]}
        assert sample.ids.tolist() == encoded("tiny-v13", said).ids.tolist()
        assert sample.weights.tolist() == encoded("tiny-v13", said).weights.tolist()


def test_earlier_answers_of_a_pair_are_not_trained():
    shared = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answers = {name: [*shared, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pair = SampleEncoder(tokenizer("tiny-v13")).encode(read_record(json.dumps(answers).encode()))
    assert isinstance(pair, Pair)
    trained = pair.chosen.ids[pair.chosen.weights > 0].tolist()
    assert tokenizer("tiny-v13").decode(trained, keep_special=True) == "chosen</s>"


@pytest.mark.parametrize(
    ("kind", "line", "field"),
    [
        ("v1", TOOLS, "messages"),
        ("v3", REASONING, "messages[2]"),
        ("tiny-v15", {**CHAT, "reasoning_effort": "huge"}, "messages"),
        ("tiny-v13", {"messages": CHAT["messages"][:3]}, "messages"),
        ("tiny-v13", {**TOOLS, "tools": [*TOOLS["tools"], NO_SCHEMA]}, "tools[1]"),
        ("tiny-v13", {"messages": CHAT["messages"][:2]}, "messages"),
    ],
)
def test_what_a_template_cannot_render_is_refused_by_field(kind, line, field):
    with pytest.raises(RecordError) as refused:
        encoded(kind, line)
    assert refused.value.field == field
