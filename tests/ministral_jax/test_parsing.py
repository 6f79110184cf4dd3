"""What a model answered, told apart by id: against mistral-common's decoders, its templates, and every split."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.experimental.think import _split_content_and_think_chunks
from mistral_common.experimental.tools import _decode_tool_calls, _split_content_and_tool_calls

from ministral_jax.errors import TokenizerError
from ministral_jax.parsing import (
    AssistantMessage,
    Event,
    OutputParser,
    ParseProblem,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    parse_output,
    random_call_id,
)
from tests.tokenizers import KINDS, mistral_tokenizer, tokenizer, version_number

LISTED = ["v2", "v3", "v3-tekken", "v7", "v7m1", "tiny-v3", "tiny-v7"]
NAMED = ["tiny-v11", "tiny-v13", "tiny-v15"]
REASONING = ["tiny-v13", "tiny-v15"]

ONE = '{"city": "Orléans", "days": [1, {}]}'
TWO = "{}"


def ids(kind: str, *parts: str) -> list[int]:
    """The ids of an answer: a part that is a control token's name is that token, any other is text."""
    found: list[int] = []
    for part in parts:
        special = tokenizer(kind).special_id(part)
        found += tokenizer(kind).encode(part) if special is None else [special]
    return found


def counted() -> Callable[[], str]:
    """Call ids new00001a, new00002a, ..., so that answers can be compared."""
    numbers = itertools.count(1)
    return lambda: f"new{next(numbers):05}a"


def parsed(kind: str, *parts: str, **options: Any) -> AssistantMessage:
    return parse_output(tokenizer(kind), ids(kind, *parts), new_call_id=counted(), **options)


def calls(kind: str) -> list[str]:
    """Two calls in the format of the version."""
    if kind in LISTED:
        one, two = '{"name": "weather", "arguments": ' + ONE + "}", '{"name": "now", "arguments": ' + TWO + "}"
        return ["[TOOL_CALLS]", f"[{one}, {two}]"]
    return ["[TOOL_CALLS]", "weather", "[ARGS]", ONE, "[TOOL_CALLS]", "now", "[ARGS]", TWO]


@pytest.mark.parametrize("kind", LISTED + NAMED)
def test_tool_calls_are_those_mistral_common_decodes(kind: str) -> None:
    answer = ids(kind, "Let me see. ", *calls(kind), "</s>")
    oracle = mistral_tokenizer(kind).instruct_tokenizer.tokenizer
    content, bodies = _split_content_and_tool_calls(answer, oracle.get_special_token("[TOOL_CALLS]"))
    expected = _decode_tool_calls(bodies, oracle)

    found = parse_output(tokenizer(kind), answer)

    assert found.content == oracle.decode(content) == "Let me see. "
    assert [call.name for call in found.tool_calls] == [call.function.name for call in expected]
    assert [json.loads(call.arguments) for call in found.tool_calls] == [
        json.loads(call.function.arguments) for call in expected
    ]
    assert [json.loads(call.arguments) for call in found.tool_calls] == [json.loads(ONE), {}]
    assert found.problems == ()


@pytest.mark.parametrize("kind", REASONING)
def test_reasoning_is_what_mistral_common_splits_off(kind: str) -> None:
    answer = ids(kind, "[THINK]", "Let me think.", "[/THINK]", "The answer. ", "[THINK]", "More", "</s>")
    begin, end = tokenizer(kind).special_id("[THINK]"), tokenizer(kind).special_id("[/THINK]")
    assert begin is not None
    assert end is not None
    chunks = _split_content_and_think_chunks(answer, begin, end)
    oracle = mistral_tokenizer(kind)

    found = parse_output(tokenizer(kind), answer)

    assert found.reasoning == "".join(oracle.decode(chunk) for chunk, thinks in chunks if thinks)
    assert found.content == "".join(oracle.decode(chunk) for chunk, thinks in chunks if not thinks)
    assert (found.reasoning, found.content) == ("Let me think.More", "The answer. ")


CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Orléans"}'}}


SHAPES = {
    "text": LISTED + NAMED,
    "calls": LISTED + NAMED,
    "text and calls": [kind for kind in LISTED + NAMED if version_number(kind) >= 7],
    "reasoning": REASONING,
    "reasoning and calls": REASONING,
}


@pytest.mark.parametrize(("shape", "kind"), [(shape, kind) for shape, kinds in SHAPES.items() for kind in kinds])
def test_an_answer_read_and_put_into_the_conversation_has_its_own_ids_again(shape: str, kind: str) -> None:
    content: Any = "It is " if "text" in shape or shape == "reasoning" else None
    if "reasoning" in shape:
        thinking = [{"type": "thinking", "thinking": "Hm, 你好."}]
        content = [*thinking, {"type": "text", "text": content}] if content else thinking
    answer: dict[str, Any] = {"role": "assistant", "content": content}
    if "calls" in shape:
        answer["tool_calls"] = [{**CALL, "id": "abcdefgh1"}, {**CALL, "id": "abcdefgh2"}]
    question = [{"role": "user", "content": "Where?"}]
    prompt = tokenizer(kind).encode_chat(question).tokens
    whole = tokenizer(kind).encode_chat([*question, answer], for_training=True).tokens
    assert whole[: len(prompt)] == prompt

    found = parse_output(tokenizer(kind), whole[len(prompt) :])

    again = tokenizer(kind).encode_chat([*question, found.to_dict()], for_training=True).tokens
    assert again == whole
    assert found.problems == ()
    assert len(found.tool_calls) == (2 if "calls" in shape else 0)


def test_an_id_that_the_model_gave_is_kept_if_it_is_usable() -> None:
    given = ["[TOOL_CALLS]", "f", "[CALL_ID]", "abcdefgh1", "[ARGS]", "{}"]
    assert [call.id for call in parsed("tiny-v11", *given).tool_calls] == ["abcdefgh1"]
    assert [call.id for call in parsed("tiny-v11", *given, *given).tool_calls] == ["abcdefgh1", "new00001a"]
    assert [call.id for call in parsed("tiny-v11", "[TOOL_CALLS]", "f", "[ARGS]", "{}").tool_calls] == ["new00001a"]
    listed = '[{"name": "f", "arguments": {}, "id": "call_1"}, {"name": "f", "arguments": {}, "id": "abcdefgh1"}]'
    assert [call.id for call in parsed("v3", "[TOOL_CALLS]", listed).tool_calls] == ["new00001a", "abcdefgh1"]


def test_new_ids_are_valid_and_differ() -> None:
    made = {random_call_id() for _ in range(100)}
    assert len(made) == 100
    assert all(len(call_id) == 9 and call_id.isalnum() and call_id.isascii() for call_id in made)


# ---- one id at a time


ANSWERS = {
    "text": ["Héllo 你好 👍🏽 the end"],
    "calls": ["Let me see. ", "calls"],
    "reasoning": ["[THINK]", "Hm 你", "[/THINK]", "the answer", "</s>"],
    "reasoning into calls": ["[THINK]", "Hm 你", "calls", "</s>"],
    "open reasoning": ["[THINK]", "Hm 你"],
    "broken call": ["a ", "[TOOL_CALLS]", 'f{"x": 你', "</s>"],
}


def folded(events: list[Event]) -> tuple[str, str, list[ToolCall], list[str]]:
    """The message in the events, put together otherwise than parse_output does."""
    content, reasoning, found, problems = "", "", [], []
    for event in events:
        match event:
            case TextDelta(text):
                content += text
            case ReasoningDelta(text):
                reasoning += text
            case ToolCall():
                found.append(event)
            case ParseProblem(message):
                problems.append(message)
    return content, reasoning, found, problems


@pytest.mark.parametrize("kind", ["v1", "v3", "v3-tekken", "tiny-v7", "tiny-v11", "tiny-v13"])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_cut_at_any_id_is_parsed_alike_at_once_and_one_by_one(kind: str, name: str) -> None:
    has_calls = tokenizer(kind).special_id("[TOOL_CALLS]") is not None
    parts = [part for given in ANSWERS[name] for part in (calls(kind) if given == "calls" and has_calls else [given])]
    answer = ids(kind, *parts)
    whole = parse_output(tokenizer(kind), answer, new_call_id=counted())
    for cut in range(len(answer) + 1):
        parser = OutputParser(tokenizer(kind), new_call_id=counted())
        told = [event for token_id in answer[:cut] for event in parser.feed(token_id)]
        content, reasoning, found, _ = folded(told)
        assert whole.content.startswith(content)  # nothing that was told is taken back
        assert whole.reasoning.startswith(reasoning)
        assert list(whole.tool_calls[: len(found)]) == found

        at_once = parse_output(tokenizer(kind), answer[:cut], new_call_id=counted())
        expected = (at_once.content, at_once.reasoning, list(at_once.tool_calls), list(at_once.problems))
        assert folded(told + parser.finish()) == expected
        assert "[TOOL_CALLS]" not in content or not has_calls


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_ids_crash_the_parser_and_none_are_lost(kind: str, data: st.DataObject) -> None:
    found = tokenizer(kind)
    special = [token_id for token_id in range(48) if found.is_special(token_id)]
    pieces = [found.encode(text) for text in ("the", "{", "}", "[", "]", '"name":', '{"a": 1}', "f", " ", "你")]
    some = st.sampled_from([[token_id] for token_id in special] * 2 + pieces)
    answer = [token_id for piece in data.draw(st.lists(some, max_size=24)) for token_id in piece]
    at_once = parse_output(found, answer, new_call_id=counted())
    assert len(at_once.problems) <= answer.count(found.special_id("[TOOL_CALLS]") or -1)
    said = at_once.content + at_once.reasoning + "".join(c.name + c.arguments for c in at_once.tool_calls)
    plain = found.decode(answer)
    if not at_once.tool_calls:  # nothing but order may differ, and spaces where SentencePiece text is divided
        assert sorted(said.replace(" ", "")) == sorted(plain.replace(" ", ""))


# ---- reasoning


def test_reasoning_still_open_at_the_end_is_reasoning() -> None:
    assert parsed("tiny-v13", "[THINK]", "Hm") == AssistantMessage(reasoning="Hm")


def test_a_stray_end_of_reasoning_is_dropped() -> None:
    assert parsed("tiny-v13", "a", "[/THINK]", "b", "[/THINK]") == AssistantMessage(content="ab")


def test_a_second_begin_of_reasoning_is_dropped() -> None:
    found = parsed("tiny-v13", "[THINK]", "a", "[THINK]", "b", "[/THINK]", "c")
    assert found == AssistantMessage(content="c", reasoning="ab")


def test_an_answer_to_a_prompt_that_left_reasoning_open_begins_inside_it() -> None:
    found = parsed("tiny-v13", "Hm", "[/THINK]", "So", reasoning=True)
    assert found == AssistantMessage(content="So", reasoning="Hm")


def test_a_call_ends_reasoning() -> None:
    found = parsed("tiny-v13", "[THINK]", "Hm", "[TOOL_CALLS]", "f", "[ARGS]", "{}")
    assert found == AssistantMessage(reasoning="Hm", tool_calls=(ToolCall("new00001a", "f", "{}"),))


def test_a_call_is_told_at_eos_and_not_only_at_the_end() -> None:
    parser = OutputParser(tokenizer("tiny-v13"), new_call_id=counted())
    *answer, eos = ids("tiny-v13", "[TOOL_CALLS]", "f", "[ARGS]", "{}", "</s>")
    assert [event for token_id in answer for event in parser.feed(token_id)] == []
    assert parser.feed(eos) == [ToolCall("new00001a", "f", "{}")]
    assert parser.finish() == []


@pytest.mark.parametrize("before", [[], ["[THINK]"]])
@pytest.mark.parametrize("after", [[], ["[TOOL_CALLS]", "f", "[ARGS]", "{}"], ["</s>"]])
def test_half_a_character_is_told_where_its_text_ends(before: list[str], after: list[str]) -> None:
    half = ids("tiny-v13", "a👍")[:-1]
    answer = [*ids("tiny-v13", *before), *half, *ids("tiny-v13", *after)]
    found = parse_output(tokenizer("tiny-v13"), answer)
    assert (found.reasoning if before else found.content) == tokenizer("tiny-v13").decode(half) == "a\ufffd"
    assert len(found.tool_calls) == (1 if "f" in after else 0)


@pytest.mark.parametrize("kind", ["v3", "tiny-v11", "tiny-v13"])
def test_markers_written_as_text_are_text(kind: str) -> None:
    text = 'Say [TOOL_CALLS][{"name": "f", "arguments": {}}] or [THINK]so[/THINK].'
    assert parse_output(tokenizer(kind), tokenizer(kind).encode(text)) == AssistantMessage(content=text)


def test_v1_has_nothing_but_text() -> None:
    text = "[TOOL_CALLS] [THINK] a"
    assert parse_output(tokenizer("v1"), [*tokenizer("v1").encode(text), 2]) == AssistantMessage(content=text)


# ---- tool calls that are not quite right


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('[{"name": "f", "arguments": {"a": 1}', "the tool calls: not JSON: "),
        ("", "the tool calls: not JSON: Expecting value"),
        ("[" * 5_000, "the tool calls: not JSON: nested too deeply"),
        ('{"name": "f", "arguments": {}}', "the tool calls: a JSON dict, expected a list"),
        ('["f"]', "a tool call is not an object"),
        ('[{"name": "f"}]', "a tool call is not an object with a name and an object of arguments"),
        ('[{"name": "f", "arguments": "{}"}]', "a tool call is not an object with a name and an object of"),
        ('[{"arguments": {}}]', "'None' is not a function name"),
        ('[{"name": "f g\\n", "arguments": {}}]', "'f g\\n' is not a function name"),
        ('[{"name": "\\ud800", "arguments": {}}]', "'\\ud800' is not a function name"),
        ('[{"name": "f", "arguments": {"a": NaN}}]', "the tool calls: not JSON: NaN is not a JSON number"),
        ('[{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}]", "the tool calls: not JSON: Exceeds the limit"),
    ],
)
def test_a_broken_list_of_calls_is_given_back_as_text_with_the_problem(body: str, problem: str) -> None:
    found = parsed("v3-tekken", "Well. ", "[TOOL_CALLS]", body, "</s>")
    assert found.content == "Well. " + body
    assert found.tool_calls == ()
    assert len(found.problems) == 1
    assert found.problems[0].startswith(problem)
    assert "\n" not in found.problems[0]


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (["f", "[ARGS]", '{"a": '], "the arguments of f: not JSON: Expecting value at character 6"),
        (["f", "[ARGS]", "[1]"], "the arguments of f: a JSON list, expected an object"),
        (["f", "[ARGS]", '"{}"'], "the arguments of f: a JSON str, expected an object"),
        (["f", "[ARGS]"], "the arguments of f: not JSON: Expecting value"),
        (["f", "[ARGS]", "{}", "[ARGS]", "{}"], "[ARGS] occurs 2 times in one tool call, expected once"),
        (["f", "[CALL_ID]", "a", "[CALL_ID]", "b", "[ARGS]", "{}"], "[CALL_ID] occurs 2 times"),
        (["", "[ARGS]", "{}"], "'' is not a function name"),
        (["two words"], "'two words' is not a function name"),
        ([], "'' is not a function name"),
    ],
)
def test_a_broken_named_call_is_given_back_as_text_with_the_problem(parts: list[str], problem: str) -> None:
    good = ["[TOOL_CALLS]", "g", "[ARGS]", "{}"]
    found = parsed("tiny-v13", *good, "[TOOL_CALLS]", *parts, *good, "</s>")
    assert found.content == "".join(part for part in parts if part not in ("[ARGS]", "[CALL_ID]"))
    assert [call.name for call in found.tool_calls] == ["g", "g"]
    assert len(found.problems) == 1
    assert found.problems[0].startswith(problem)


def test_a_call_without_its_args_token_is_read() -> None:
    found = parsed("tiny-v13", "[TOOL_CALLS]", 'get_weather {"city": "{}"}')
    assert found.tool_calls == (ToolCall("new00001a", "get_weather", '{"city": "{}"}'),)


@pytest.mark.parametrize("kind", ["v3", "v3-tekken", "tiny-v13"])
def test_text_after_a_complete_call_is_text(kind: str) -> None:
    body = ["f", "[ARGS]", "{}\n\nDone."] if kind in NAMED else ['[{"name": "f", "arguments": {}}]\n\nDone.']
    found = parsed(kind, "[TOOL_CALLS]", *body, "</s>")
    assert found == AssistantMessage(content="\n\nDone.", tool_calls=(ToolCall("new00001a", "f", "{}"),))


def test_arguments_are_the_models_own_text() -> None:
    found = parsed("tiny-v13", "[TOOL_CALLS]", "f", "[ARGS]", ' {"b":1,  "a":"é"} ')
    assert found.tool_calls == (ToolCall("new00001a", "f", '{"b":1,  "a":"é"}'),)


def test_a_continued_sentencepiece_answer_keeps_its_first_space() -> None:
    words = tokenizer("v3").encode("and on")
    assert parse_output(tokenizer("v3"), words).content == "and on"
    assert parse_output(tokenizer("v3"), words, continuing=True).content == " and on"


@pytest.mark.parametrize("before", [[], ["[TOOL_CALLS]"], ["[THINK]"]])
def test_an_id_outside_the_vocabulary_is_an_error_where_it_comes(before: list[str]) -> None:
    parser = OutputParser(tokenizer("tiny-v13"))
    for token_id in ids("tiny-v13", *before):
        parser.feed(token_id)
    with pytest.raises(TokenizerError, match="token id 999 is not in the vocabulary"):
        parser.feed(999)
