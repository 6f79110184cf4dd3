"""`ministral chat`: one turn for scripts, a conversation at a terminal. Answers are scripted where they matter."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from infer.answer import Piece
from infer.generate import Generator
from ministral_jax.cli import main
from ministral_jax.tokenizer import Tokenizer

TOOL_CALL = ("[TOOL_CALLS]", "add", "[ARGS]", '{"a": 1}')


class Terminal:
    """Stands in for a person: lines that `input` gives, or exceptions that it raises; then the end of input."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self.asked: list[str] = []

    def input(self, prompt: str = "") -> str:
        self.asked.append(prompt)
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, checkpoint: Any) -> Any:
    """Makes the model answer with given parts (control tokens by name); returns the prompts it saw."""
    tokenizer = Tokenizer.load(checkpoint)

    def set_answers(*answers: Sequence[str]) -> list[list[int]]:
        prompts: list[list[int]] = []
        remaining = iter(answers)

        def stream_ids(self: Generator, asked: Any, *_: Any, **__: Any) -> Iterator[Piece]:
            prompts.extend(asked)
            for part in next(remaining):
                if part == "Ctrl-C":
                    raise KeyboardInterrupt
                control = tokenizer.special_id(part)
                yield Piece(0, tuple(tokenizer.encode(part) if control is None else [control]), "", (), None)

        monkeypatch.setattr(Generator, "stream_ids", stream_ids)
        return prompts

    return set_answers


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command at a terminal where these lines are typed; gives what it wrote and what it asked for."""

    def converse(*lines: str | type[BaseException], options: Sequence[str] = ()) -> tuple[str, list[str]]:
        terminal = Terminal(*lines)
        monkeypatch.setattr("builtins.input", terminal.input)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        assert main(["chat", str(checkpoint), *options]) == 0
        return capsys.readouterr().out, terminal.asked

    return converse


def test_one_turn_of_the_model_is_its_greedy_continuation_of_the_rendered_prompt(checkpoint, capsys):
    assert main(["chat", str(checkpoint), "--prompt", "hello", "--max-tokens", "6"]) == 0
    chat = capsys.readouterr().out
    tokenizer = Tokenizer.load(checkpoint)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}]).tokens
    assert main(["generate", str(checkpoint), "--ids", ",".join(map(str, ids)), "--max-tokens", "6"]) == 0
    assert chat == capsys.readouterr().out


def test_piped_stdin_is_the_message(checkpoint, capsys, monkeypatch, script):
    prompts = script(["hi"], ["hi"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    assert main(["chat", str(checkpoint)]) == 0
    assert capsys.readouterr().out == "hi\n"
    assert main(["chat", str(checkpoint), "--prompt", "hello\n"]) == 0
    assert prompts[0] == prompts[1]


def test_json_tells_text_reasoning_and_calls_apart(checkpoint, capsys, script):
    script(["[THINK]", "hm", "[/THINK]", "I add.", *TOOL_CALL])
    assert main(["chat", str(checkpoint), "--prompt", "add", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (call,) = document["tool_calls"]
    assert (document["content"], document["reasoning"]) == ("I add.", "hm")
    assert (call["name"], call["arguments"], len(call["id"])) == ("add", {"a": 1}, 9)


def test_reasoning_goes_to_stderr(checkpoint, capsys, script):
    script(["[THINK]", "hm", "[/THINK]", "yes"])
    assert main(["chat", str(checkpoint), "--prompt", "is it?"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "yes\n"
    assert captured.err.endswith("hm")


def test_tools_are_shown_to_the_model_and_its_calls_printed(checkpoint, capsys, script, tmp_path):
    prompts = script(TOOL_CALL)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    assert main(["chat", str(checkpoint), "--prompt", "add", "--tools", str(tmp_path / "tools.json")]) == 0
    call = json.loads(capsys.readouterr().out)
    assert (call["name"], call["arguments"]) == ("add", {"a": 1})
    expected = Tokenizer.load(checkpoint).encode_chat([{"role": "user", "content": "add"}], tools)
    assert prompts == [expected.tokens]


@pytest.mark.parametrize("content", ["[", "{}", '[{"type": "function"}]'])
def test_a_file_that_holds_no_tools_is_one_line(checkpoint, capsys, tmp_path, content):
    (tmp_path / "tools.json").write_text(content)
    assert main(["chat", str(checkpoint), "--prompt", "add", "--tools", str(tmp_path / "tools.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tools" in captured.err.splitlines()[-1]


def test_a_conversation_goes_on_until_exit(talk, script, checkpoint):
    prompts = script(["hi"], ["fine"])
    out, asked = talk("hello", "", "how are you?", "/exit", "never read")
    assert out == "hi\nfine\n"
    assert asked == ["> "] * 4
    expected = Tokenizer.load(checkpoint).encode_chat(
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "how are you?"},
        ]
    )
    assert prompts[1] == expected.tokens


def test_reset_forgets(talk, script):
    prompts = script(["hi"], ["hi"])
    talk("hello", "/reset", "hello")
    assert prompts[0] == prompts[1]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk, script, checkpoint):
    prompts = script(["one ", "Ctrl-C", "two"], ["fine"])
    out, _ = talk("count", "go on")
    assert out == "one \nfine\n\n"
    expected = Tokenizer.load(checkpoint).encode_chat(
        [
            {"role": "user", "content": "count"},
            {"role": "assistant", "content": "one "},
            {"role": "user", "content": "go on"},
        ]
    )
    assert prompts[1] == expected.tokens


def test_ctrl_c_leaves_when_pressed_twice_in_a_row(talk, script):
    script(["hi"])
    out, asked = talk(KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt, "never read")
    assert out.count("hi\n") == 1
    assert len(asked) == 4


def test_ctrl_c_in_an_answer_and_then_at_the_prompt_leaves(talk, script):
    script(["one", "Ctrl-C"])
    _, asked = talk("count", KeyboardInterrupt, "never read")
    assert len(asked) == 2


def test_the_user_is_asked_for_the_results_of_tools(talk, script, checkpoint):
    prompts = script(TOOL_CALL, ["it is 2"])
    out, asked = talk("add", "2")
    assert asked[1] == "result of add > "
    assert out.splitlines()[1] == "it is 2"
    assert "2" in Tokenizer.load(checkpoint).decode(prompts[1], keep_special=True).partition("[TOOL_RESULTS]")[2]


def test_calls_without_results_are_forgotten(talk, script):
    prompts = script(TOOL_CALL, ["hi"], ["hi"])
    talk("add", KeyboardInterrupt, "hello", "/reset", "hello")
    assert prompts[1] == prompts[2]


def test_a_message_that_is_too_long_does_not_end_the_conversation(talk):
    out, asked = talk("a" * 600, "/exit", options=["--max-tokens", "2"])
    assert out == ""
    assert len(asked) == 2
