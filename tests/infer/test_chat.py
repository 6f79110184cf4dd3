"""Conversations on top of a generator: told apart by id, cut at stop strings, kept as history. The ids are scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from infer.answer import Piece
from infer.chat import ChatPiece, ChatSession, ChatStream
from infer.generate import Generator
from infer.sampling import SamplingParams
from ministral_jax.errors import RequestError, TokenizerError
from ministral_jax.tokenizer import Tokenizer
from tests.infer.tiny_models import tiny_model
from tests.tekken_files import write_tiny_tekken

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]


class ScriptedGenerator(Generator):
    """Answers with given ids, a few at a time, whatever it is asked; remembers what that was."""

    def __init__(self, tokenizer: Tokenizer | None, *answers: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[list[int]] = []
        self._answers = list(answers)

    def stream_ids(self, prompts: Any, params: Any = None, **_: Any) -> Iterator[Piece]:
        self.prompts += prompts
        ids = self._answers.pop(0)
        for at in range(0, len(ids), 3):
            last = at + 3 >= len(ids)
            yield Piece(0, tuple(ids[at : at + 3]), "", (), "stop" if last else None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tiny_tekken(tmp_path_factory.mktemp("tokenizer"), "v13"))


def special(tokenizer: Tokenizer, name: str) -> int:
    return cast(int, tokenizer.special_id(name))


def answer(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Ids of texts and, where a part is the name of a control token, of that."""
    ids: list[int] = []
    for part in parts:
        control = tokenizer.special_id(part)
        ids += tokenizer.encode(part) if control is None else [control]
    return ids


def test_pieces_are_text_without_control_tokens_and_reasoning_is_marked(tokenizer):
    ids = answer(tokenizer, "[THINK]", "let me see", "[/THINK]", "it is 你")
    stream = ScriptedGenerator(tokenizer, ids).stream(HELLO)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces if piece.reasoning) == "let me see"
    assert "".join(str(piece) for piece in pieces if not piece.reasoning) == "it is 你"
    assert len(pieces) > 2
    assert stream.reply.message.reasoning == "let me see"
    assert stream.reply.message.content == "it is 你"
    assert stream.reply.new_tokens == len(ids)


def test_the_prompt_is_the_rendered_conversation(tokenizer):
    generator = ScriptedGenerator(tokenizer, answer(tokenizer, "hi"))
    reply = generator.chat([{"role": "system", "content": "be short"}, *HELLO])
    assert generator.prompts == [
        answer(tokenizer, "<s>", "[SYSTEM_PROMPT]", "be short", "[/SYSTEM_PROMPT]", "[INST]", "hello", "[/INST]")
    ]
    assert reply.prompt_tokens == len(generator.prompts[0])
    assert (reply.message.content, reply.finish_reason) == ("hi", "stop")


def test_a_tool_call_is_in_the_reply_and_not_in_the_pieces(tokenizer):
    ids = answer(tokenizer, "I add. ", "[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}')
    stream = ScriptedGenerator(tokenizer, ids).stream(HELLO, tools=TOOLS)
    assert "".join(map(str, stream)) == "I add. "
    (call,) = stream.reply.message.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})


def test_text_that_looks_like_a_control_token_is_text(tokenizer):
    ids = answer(tokenizer, "see ") + tokenizer.encode("[TOOL_CALLS]add[ARGS]{}")
    reply = ScriptedGenerator(tokenizer, ids).chat(HELLO)
    assert reply.message.content == "see [TOOL_CALLS]add[ARGS]{}"
    assert reply.message.tool_calls == ()


def test_a_stop_string_and_what_follows_are_cut(tokenizer):
    stream = ScriptedGenerator(tokenizer, answer(tokenizer, "one two three")).stream(
        HELLO, SamplingParams(stop=("two",))
    )
    assert "".join(map(str, stream)) == "one " == stream.reply.message.content


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer):
    stream = ScriptedGenerator(tokenizer, answer(tokenizer, "one tw")).stream(HELLO, SamplingParams(stop=("two",)))
    assert "".join(map(str, stream)) == "one tw" == stream.reply.message.content


def test_ids_that_the_tokenizer_lacks_have_no_text(tokenizer):
    ids = [*answer(tokenizer, "a"), tokenizer.vocabulary_size + 5, *answer(tokenizer, "b")]
    assert ScriptedGenerator(tokenizer, ids).chat(HELLO).message.content == "ab"


def test_a_prompt_that_leaves_reasoning_open_is_answered_with_reasoning(tokenizer):
    messages = [*HELLO, {"role": "assistant", "prefix": True, "content": [
        {"type": "thinking", "thinking": "well", "closed": False}]}]  # fmt: skip
    generator = ScriptedGenerator(tokenizer, answer(tokenizer, " then", "[/THINK]", "yes"))
    message = generator.chat(messages).message
    assert special(tokenizer, "[/THINK]") not in generator.prompts[0]
    assert (message.reasoning, message.content) == (" then", "yes")


def test_a_reply_half_way_holds_what_has_come(tokenizer):
    stream = ScriptedGenerator(tokenizer, answer(tokenizer, "one two three four")).stream(HELLO)
    first = next(iter(stream))
    assert isinstance(first, ChatPiece)
    assert stream.reply.message.content == first.text != ""


def test_no_tokenizer_is_refused():
    with pytest.raises(RequestError, match="needs the model's tokenizer"):
        ScriptedGenerator(None).stream(HELLO)


def test_what_mistral_common_refuses_is_refused_before_any_work(tokenizer):
    with pytest.raises(TokenizerError):
        ScriptedGenerator(tokenizer).stream([{"role": "poet", "content": "hello"}])


def test_images_are_refused_by_a_text_model(tokenizer):
    class WithImages:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode_chat(self, *_: Any, **__: Any) -> Any:
            return type("Tokens", (), {"tokens": [1], "images": (1, 2)})

    generator = ScriptedGenerator(tokenizer)
    generator.model = tiny_model()
    generator.tokenizer = WithImages()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="2 images in the conversation"):
        ChatStream(generator, HELLO)


def ask(session: ChatSession, text: str) -> str:
    stream = session.ask(text)
    said = "".join(map(str, stream))
    session.keep(stream)
    return said


def test_a_session_remembers_what_was_said(tokenizer):
    generator = ScriptedGenerator(tokenizer, answer(tokenizer, "hi"), answer(tokenizer, "fine"))
    session = ChatSession(generator, system="be kind")
    assert (ask(session, "hello"), ask(session, "how are you?")) == ("hi", "fine")
    expected = tokenizer.encode_chat(
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "how are you?"},
        ]
    )
    assert generator.prompts[1] == expected.tokens


def test_a_session_that_is_reset_keeps_its_system_prompt(tokenizer):
    generator = ScriptedGenerator(tokenizer, answer(tokenizer, "hi"), answer(tokenizer, "hi"))
    session = ChatSession(generator, system="be kind")
    ask(session, "hello")
    session.reset()
    ask(session, "hello")
    assert generator.prompts[0] == generator.prompts[1]


def test_a_message_without_an_answer_is_as_if_never_sent(tokenizer):
    generator = ScriptedGenerator(tokenizer, [], answer(tokenizer, "hi"))
    session = ChatSession(generator)
    ask(session, "are you there?")
    ask(session, "hello")
    assert generator.prompts[1] == tokenizer.encode_chat(HELLO).tokens


def test_results_of_tools_are_answered(tokenizer):
    call = answer(tokenizer, "[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}')
    generator = ScriptedGenerator(tokenizer, call, answer(tokenizer, "it is 2"))
    session = ChatSession(generator, tools=TOOLS)
    first = session.ask("add")
    assert "".join(map(str, first)) == ""
    (made,) = session.keep(first).message.tool_calls
    second = session.give_results({made.id: "2"})
    assert "".join(map(str, second)) == "it is 2"
    session.keep(second)
    assert generator.prompts[1][-len(answer(tokenizer, "[TOOL_RESULTS]", "2", "[/TOOL_RESULTS]")) :] == answer(
        tokenizer, "[TOOL_RESULTS]", "2", "[/TOOL_RESULTS]"
    )
    assert [message["role"] for message in session.messages] == ["user", "assistant", "tool", "assistant"]
