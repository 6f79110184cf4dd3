"""Conversations and tools that are none: each is refused in one line that says where."""

from typing import Any

import pytest

from ministral_jax.chat_request import chat_request, encode_request
from ministral_jax.errors import TokenizerError
from tests.tokenizers import mistral_tokenizer

NAMED = {"type": "function", "function": {"name": "f"}}


def user() -> dict[str, Any]:
    return {"role": "user", "content": "What is it?"}


WRONG = {
    "messages: str": "Hello",
    "messages[0]: str": ["Hello"],
    "messages[0].role: 'robot'": [{"role": "robot", "content": "a"}],
    "messages[0].role: None": [{"content": "a"}],
    "messages[0].content: missing": [{"role": "user"}],
    "messages[0].content: int": [{"role": "user", "content": 3}],
    "messages[0].content[0]: str": [{"role": "user", "content": ["a"]}],
    "messages[1].tool_call_id: missing": [user(), {"role": "tool", "content": "a"}],
    "messages[1].tool_calls[0]: str": [user(), {"role": "assistant", "tool_calls": ["f"]}],
    "messages[1]: function": [user(), {"role": "assistant", "tool_calls": [{"id": "abcdefgh1"}]}],
    "messages[1].prefix: 'yes'": [user(), {"role": "assistant", "content": "a", "prefix": "yes"}],
    "messages[0].prefix: only": [{**user(), "prefix": True}],
    "messages[0]: 'video' is not": [{"role": "user", "content": [{"type": "video"}]}],
    "messages[0]: Content chunk must have": [{"role": "user", "content": [{"text": "a"}]}],
    "conversation: Expected last role User": [user(), {"role": "assistant", "content": "done"}],
    "conversation: Conversation must have at least": [],
    "conversation: Unexpected role 'tool'": [user(), {"role": "tool", "content": "a", "tool_call_id": "x"}],
    "conversation: Assistant message with prefix": [
        user(),
        {"role": "assistant", "content": "a", "prefix": True},
        user(),
    ],
}


@pytest.mark.parametrize("start", WRONG)
def test_a_wrong_request_is_one_line_that_says_where(start: str) -> None:
    with pytest.raises(TokenizerError) as error:
        encode_request(mistral_tokenizer("tiny-v13"), chat_request(WRONG[start], None, None))
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "start"),
    [
        ("f", "tools: str"),
        (["f"], "tools[0]: str"),
        ([NAMED, {"type": "function"}], "tools[1].function: None"),
        ([{"type": "function", "function": {"description": "a"}}], "tools[0]: name"),
        ([{"type": "function", "function": {"name": "a b"}}], "conversation: Function name"),
    ],
)
def test_a_wrong_tool_is_one_line_that_says_where(tools: Any, start: str) -> None:
    with pytest.raises(TokenizerError) as error:
        encode_request(mistral_tokenizer("tiny-v13"), chat_request([user()], tools, None))
    assert str(error.value).startswith(start)
    assert "\n" not in str(error.value)
