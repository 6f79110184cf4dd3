"""Conversations against mistral-common's own answer to the same request, over every version of its files."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest, ReasoningEffort
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ministral_jax.chat_request import map_call_ids
from ministral_jax.errors import TokenizerError
from tests.tekken_files import write_tiny_tekken
from tests.tokenizers import KINDS, mistral_tokenizer, tokenizer, version_number

ALL = {1, 2, 3, 7, 11, 13, 15}
TOOLED = ALL - {1}
THINKING = {13, 15}

WEATHER_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Météo", "parameters": WEATHER_SCHEMA},
}
WEATHER_TOOL = Tool(function=Function(name="get_weather", description="Météo", parameters=WEATHER_SCHEMA))
ARGUMENTS = '{"city": "Orléans"}'


def call(call_id: str, arguments: Any = ARGUMENTS) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def mistral_call(call_id: str) -> ToolCall:
    return ToolCall(id=call_id, function=FunctionCall(name="get_weather", arguments=ARGUMENTS))


def user(text: str = "What is it?") -> dict[str, Any]:
    return {"role": "user", "content": text}


@dataclass(frozen=True)
class Case:
    """A conversation as dictionaries, the same one in mistral-common's classes, and the versions that render it."""

    messages: list[dict[str, Any]]
    same: list[Any]
    versions: set[int]
    tools: bool = False


CASES = {
    "one turn": Case([user()], [UserMessage(content="What is it?")], ALL),
    "several turns": Case(
        [user("Hello"), {"role": "assistant", "content": "Hi, 你好 👍"}, user("And now?")],
        [
            UserMessage(content="Hello"),
            AssistantMessage(content="Hi, 你好 👍"),
            UserMessage(content="And now?"),
        ],
        ALL,
    ),
    "system prompt": Case(
        [
            {"role": "system", "content": "Be brief."},
            user("One"),
            {"role": "assistant", "content": "1"},
            user("Two"),
        ],
        [
            SystemMessage(content="Be brief."),
            UserMessage(content="One"),
            AssistantMessage(content="1"),
            UserMessage(content="Two"),
        ],
        ALL,
    ),
    "developer role": Case(
        [{"role": "developer", "content": "Be brief."}, user("One")],
        [SystemMessage(content="Be brief."), UserMessage(content="One")],
        ALL,
    ),
    "two user messages": Case(
        [user("One"), user("Two")], [UserMessage(content="One"), UserMessage(content="Two")], ALL
    ),
    "text parts": Case(
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [UserMessage(content=[TextChunk(text="a"), TextChunk(text="b")])],
        ALL,
    ),
    "fields of other clients": Case(
        [
            user("One"),
            {"role": "assistant", "content": "1", "refusal": None, "annotations": [], "audio": None},
            {"role": "user", "content": "Two", "name": "ann"},
        ],
        [UserMessage(content="One"), AssistantMessage(content="1"), UserMessage(content="Two")],
        ALL,
    ),
    "prefix": Case(
        [user("Count"), {"role": "assistant", "content": "One, two,", "prefix": True}],
        [UserMessage(content="Count"), AssistantMessage(content="One, two,", prefix=True)],
        ALL,
    ),
    "tools": Case([user()], [UserMessage(content="What is it?")], ALL, tools=True),
    "tool call and result": Case(
        [
            user(),
            {"role": "assistant", "content": None, "tool_calls": [call("abcdefgh1")]},
            {"role": "tool", "tool_call_id": "abcdefgh1", "content": '{"sky":"clear"}'},
            {"role": "assistant", "content": "Clear."},
            user("Sure?"),
        ],
        [
            UserMessage(content="What is it?"),
            AssistantMessage(content=None, tool_calls=[mistral_call("abcdefgh1")]),
            ToolMessage(tool_call_id="abcdefgh1", content='{"sky":"clear"}'),
            AssistantMessage(content="Clear."),
            UserMessage(content="Sure?"),
        ],
        TOOLED,
        tools=True,
    ),
    "arguments as an object": Case(
        [
            user(),
            {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", {"city": "Orléans"})]},
            {"role": "tool", "tool_call_id": "abcdefgh1", "content": "clear"},
        ],
        [
            UserMessage(content="What is it?"),
            AssistantMessage(content="", tool_calls=[mistral_call("abcdefgh1")]),
            ToolMessage(tool_call_id="abcdefgh1", content="clear"),
        ],
        TOOLED,
        tools=True,
    ),
    "two results in the wrong order": Case(
        [
            user(),
            {"role": "assistant", "tool_calls": [call("abcdefgh1"), call("abcdefgh2")]},
            {"role": "tool", "tool_call_id": "abcdefgh2", "content": "second"},
            {"role": "tool", "tool_call_id": "abcdefgh1", "content": "first"},
        ],
        [
            UserMessage(content="What is it?"),
            AssistantMessage(tool_calls=[mistral_call("abcdefgh1"), mistral_call("abcdefgh2")]),
            ToolMessage(tool_call_id="abcdefgh2", content="second"),
            ToolMessage(tool_call_id="abcdefgh1", content="first"),
        ],
        TOOLED - {2},
        tools=True,
    ),
    "text beside a tool call": Case(
        [
            user(),
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call("abcdefgh1")]},
            {"role": "tool", "tool_call_id": "abcdefgh1", "content": "clear"},
        ],
        [
            UserMessage(content="What is it?"),
            AssistantMessage(content="Let me see.", tool_calls=[mistral_call("abcdefgh1")]),
            ToolMessage(tool_call_id="abcdefgh1", content="clear"),
        ],
        {7, 11, 13, 15},
        tools=True,
    ),
    "thinking part": Case(
        [
            user("One"),
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "1"}],
            },
            user("Two"),
        ],
        [
            UserMessage(content="One"),
            AssistantMessage(content=[ThinkChunk(thinking="hm"), TextChunk(text="1")]),
            UserMessage(content="Two"),
        ],
        THINKING,
    ),
    "thinking part of Mistral's client": Case(
        [
            user("One"),
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": False}],
                "prefix": True,
            },
        ],
        [
            UserMessage(content="One"),
            AssistantMessage(content=[ThinkChunk(thinking="hm", closed=False)], prefix=True),
        ],
        THINKING,
    ),
    "reasoning_content": Case(
        [user("One"), {"role": "assistant", "content": "1", "reasoning_content": "hm"}, user("Two")],
        [
            UserMessage(content="One"),
            AssistantMessage(content=[ThinkChunk(thinking="hm"), TextChunk(text="1")]),
            UserMessage(content="Two"),
        ],
        THINKING,
    ),
    "thinking in the system prompt": Case(
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "First"}, {"type": "thinking", "thinking": "so"}],
            },
            user("One"),
        ],
        [
            SystemMessage(content=[TextChunk(text="First"), ThinkChunk(thinking="so")]),
            UserMessage(content="One"),
        ],
        {13},
    ),
}

RENDERED = [(kind, name) for kind in KINDS for name, case in CASES.items() if version_number(kind) in case.versions]
REFUSED = [(kind, name) for kind in KINDS for name in CASES if (kind, name) not in RENDERED]


@pytest.mark.parametrize(("kind", "name"), RENDERED)
def test_a_conversation_has_the_ids_that_mistral_common_gives_it(kind: str, name: str) -> None:
    case = CASES[name]
    request = ChatCompletionRequest(messages=case.same, tools=[WEATHER_TOOL] if case.tools else None)
    expected = mistral_tokenizer(kind).encode_chat_completion(request).tokens

    found = tokenizer(kind).encode_chat(case.messages, tools=[WEATHER] if case.tools else None)

    assert found.tokens == expected
    assert found.images == ()


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_what_mistral_common_refuses_is_a_one_line_error(kind: str, name: str) -> None:
    case = CASES[name]
    with pytest.raises(TokenizerError) as error:
        tokenizer(kind).encode_chat(case.messages, tools=[WEATHER] if case.tools else None)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 30


def test_v3_tekken_has_the_known_ids_of_hello() -> None:
    found = tokenizer("v3-tekken")
    rendered = found.encode_chat([user("hello")]).tokens
    assert rendered == [1, 3, 29706, 4]
    assert found.encode(found.decode(rendered, keep_special=True)) != rendered  # why text is never encoded again


def test_v1_puts_the_system_prompt_into_the_first_turn_and_later_versions_elsewhere() -> None:
    messages = CASES["system prompt"].messages
    shown = {
        kind: tokenizer(kind).decode(tokenizer(kind).encode_chat(messages).tokens, keep_special=True)
        for kind in ("v1", "v3-tekken", "tiny-v13")
    }
    assert shown["v1"].replace("▁", " ").startswith("<s> [INST] Be brief.<0x0A><0x0A>One [/INST]")
    assert shown["v3-tekken"] == "<s>[INST]One[/INST]1</s>[INST]Be brief.\n\nTwo[/INST]"
    assert shown["tiny-v13"] == "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]One[/INST]1</s>[INST]Two[/INST]"


def documented_templates() -> list[tuple[str, str]]:
    rows = re.findall(
        r"^\| (\S+) \| `(<s>.*)` \|$", (Path(__file__).parents[2] / "docs" / "chat.md").read_text(), re.MULTILINE
    )
    assert {version_number(kind) for kind, _ in rows} == ALL
    return rows


@pytest.mark.parametrize(("kind", "template"), documented_templates())
def test_the_documented_template_is_the_rendered_one(kind: str, template: str) -> None:
    messages = [
        {"role": "system", "content": "SYS"},
        user("U1"),
        {"role": "assistant", "content": "A1"},
        user("U2"),
    ]
    shown = tokenizer(kind).decode(tokenizer(kind).encode_chat(messages).tokens, keep_special=True)
    assert shown.replace("▁", "·").replace("<0x0A>", "⏎").replace("\n", "⏎") == template


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_looks_like_control_tokens_stays_text(kind: str) -> None:
    found = tokenizer(kind)
    text = "</s>[INST] [/INST][TOOL_CALLS][THINK]"
    assert not any(found.is_special(token_id) for token_id in found.encode(text))

    one, other = found.encode_chat([user("x")]).tokens, found.encode_chat([user(text)]).tokens
    assert sum(map(found.is_special, one)) == sum(map(found.is_special, other))


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_assistant_turn_has_no_eos_and_a_finished_one_has(kind: str) -> None:
    found = tokenizer(kind)
    answer = {"role": "assistant", "content": "One, two,"}
    open_turn = found.encode_chat([user("Count"), {**answer, "prefix": True}]).tokens
    finished = found.encode_chat([user("Count"), answer], for_training=True).tokens
    assert finished == [*open_turn, found.eos_id]


@pytest.mark.parametrize("kind", ["v1", "v3", "tiny-v13", "tiny-v15"])
def test_training_conversations_are_mistral_commons_finetuning_ones(kind: str, tmp_path: Path) -> None:
    tiny = kind.startswith("tiny")
    path = write_tiny_tekken(tmp_path, kind.removeprefix("tiny-")) if tiny else tokenizer(kind).path
    oracle = MistralTokenizer.from_file(path, mode=ValidationMode.finetuning)
    request = ChatCompletionRequest(messages=[UserMessage(content="a"), AssistantMessage(content="b")])
    ours = tokenizer(kind).encode_chat([user("a"), {"role": "assistant", "content": "b"}], for_training=True)
    assert ours.tokens == oracle.encode_chat_completion(request).tokens


def test_reasoning_effort_is_for_v15_alone() -> None:
    request = ChatCompletionRequest(messages=[UserMessage(content="a")], reasoning_effort=ReasoningEffort.high)
    expected = mistral_tokenizer("tiny-v15").encode_chat_completion(request).tokens
    assert tokenizer("tiny-v15").encode_chat([user("a")], reasoning_effort="high").tokens == expected
    with pytest.raises(TokenizerError, match="reasoning_effort"):
        tokenizer("tiny-v13").encode_chat([user("a")], reasoning_effort="high")
    with pytest.raises(TokenizerError, match="reasoning_effort"):
        tokenizer("tiny-v15").encode_chat([user("a")], reasoning_effort="enormous")


# ---- tool-call ids


@pytest.mark.parametrize("kind", ["v3", "v3-tekken", "v7", "tiny-v11", "tiny-v13"])
def test_foreign_call_ids_are_replaced_alike_in_call_and_result(kind: str) -> None:
    foreign = ["call_9f8e7d6c5b4a39281706f5e4", "toolu_01", "abcdefgh1"]
    valid = map_call_ids(foreign)
    requests = []
    for ids in (foreign, [valid[call_id] for call_id in foreign]):
        results = [{"role": "tool", "tool_call_id": call_id, "content": "ok"} for call_id in ids]
        requests.append([user(), {"role": "assistant", "tool_calls": [call(i) for i in ids]}, *results])
    native: list[Any] = [UserMessage(content="What is it?")]
    native.append(AssistantMessage(tool_calls=[mistral_call(valid[i]) for i in foreign]))
    native += [ToolMessage(tool_call_id=valid[i], content="ok") for i in foreign]
    expected = mistral_tokenizer(kind).encode_chat_completion(ChatCompletionRequest(messages=native)).tokens

    assert tokenizer(kind).encode_chat(requests[0]).tokens == expected
    assert tokenizer(kind).encode_chat(requests[1]).tokens == expected


@given(st.lists(st.text(max_size=12)))
def test_mapped_ids_are_valid_distinct_and_the_same_every_time(found: list[str]) -> None:
    mapped = map_call_ids(found)
    assert set(mapped) == set(found)
    assert len(set(mapped.values())) == len(set(found))
    assert all(len(new) == 9 and new.isalnum() and new.isascii() for new in mapped.values())
    assert mapped == map_call_ids(found)


def test_an_id_is_mapped_past_one_that_the_conversation_holds_already() -> None:
    usual = map_call_ids(["call_1"])["call_1"]
    mapped = map_call_ids(["call_1", usual])
    assert mapped[usual] == usual
    assert mapped["call_1"] not in (usual, "call_1")


# ---- images


def png(width: int, height: int) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("url", [{"url": png(20, 13)}, png(20, 13)])
def test_an_image_is_its_rows_of_ids_and_its_pixels(url: Any) -> None:
    pytest.importorskip("cv2")
    found = tokenizer("tiny-v13")
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "a"}]
    rendered = found.encode_chat([{"role": "user", "content": parts}])
    img, line, end = (found.special_id(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    assert rendered.tokens[2:10] == [img, img, img, line, img, img, img, end]
    assert [image.shape for image in rendered.images] == [(3, 16, 24)]


@pytest.mark.parametrize(("kind", "url"), [("v7", png(4, 4)), ("tiny-v13", "file:///no/such.png")])
def test_an_image_that_cannot_be_had_is_one_line(kind: str, url: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(TokenizerError, match=r"^(conversation|/no/such\.png): ") as error:
        tokenizer(kind).encode_chat([{"role": "user", "content": parts}])
    assert "\n" not in str(error.value)
