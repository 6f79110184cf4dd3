"""`ministral generate`: its JSON contract, streams, batches. Greedy tokens are held against scoring."""

import io
import json

import pytest

from ministral_jax.cli import main
from ministral_jax.tokenizer import Tokenizer
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.tekken_files import write_tiny_tekken

PROMPT = "5,60,7"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints on stdout."""
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def greedy_by_scoring(capsys, model: str, prompt: str, n: int) -> list[int]:
    """The likeliest continuation, a whole pass over the sequence for every token."""
    ids = [int(token) for token in prompt.split(",")]
    for _ in range(n):
        document = json.loads(run(capsys, "score", model, "--ids", ",".join(map(str, ids)), "--json"))
        ids.append(document["top"][-1][0])
    return ids[-n:]


def test_json_holds_the_new_ids_alone(bare_checkpoint, capsys):
    model = str(bare_checkpoint)
    out = run(capsys, "generate", model, "--ids", PROMPT, "--max-tokens", "8", "--temperature", "0", "--json")
    expected = greedy_by_scoring(capsys, model, PROMPT, 8)
    assert json.loads(out) == {"ids": expected, "text": None, "finish_reason": "length"}
    assert list(json.loads(out)) == ["ids", "text", "finish_reason"]
    assert out.count("\n") == 1


def test_ids_without_a_tokenizer_stop_at_stop_ids_alone(bare_checkpoint, capsys):
    model = str(bare_checkpoint)
    ids = json.loads(run(capsys, "generate", model, "--ids", PROMPT, "--max-tokens", "8", "--json"))["ids"]
    stop = next(token for i, token in enumerate(ids) if i > 1 and token not in ids[:i])
    out = run(capsys, "generate", model, "--ids", PROMPT, "--max-tokens", "8", "--stop-ids", str(stop), "--json")
    assert json.loads(out) == {"ids": ids[: ids.index(stop)], "text": None, "finish_reason": "stop"}


def test_ids_with_a_tokenizer_give_its_text(checkpoint, capsys):
    document = json.loads(run(capsys, "generate", str(checkpoint), "--ids", PROMPT, "--max-tokens", "8", "--json"))
    assert document["text"] == Tokenizer.load(checkpoint).decode(document["ids"])


def test_ids_beyond_the_tokenizer_have_no_text(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path, tiny_config("ministral", vocab_size=2048))
    write_tiny_tekken(tmp_path)
    out = run(capsys, "generate", str(tmp_path), "--ids", PROMPT, "--max-tokens", "12", "--json")
    document, tokenizer = json.loads(out), Tokenizer.load(tmp_path)
    known = [token for token in document["ids"] if token < tokenizer.vocabulary_size]
    assert len(document["ids"]) == 12 > len(known)
    assert document["text"] == tokenizer.decode(known)


def test_a_text_prompt_is_continued_after_bos(checkpoint, capsys):
    ids = ",".join(map(str, Tokenizer.load(checkpoint).encode("the thing", bos=True)))
    as_text = run(capsys, "generate", str(checkpoint), "--prompt", "the thing", "--max-tokens", "8", "--json")
    assert as_text == run(capsys, "generate", str(checkpoint), "--ids", ids, "--max-tokens", "8", "--json")


def test_a_prompt_is_read_from_stdin(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the thing")))
    piped = run(capsys, "generate", str(checkpoint), "--prompt", "-", "--max-tokens", "8", "--json")
    assert piped == run(capsys, "generate", str(checkpoint), "--prompt", "the thing", "--max-tokens", "8", "--json")


def test_a_stream_is_the_text_of_the_document(checkpoint, capsys):
    arguments = ["generate", str(checkpoint), "--prompt", "the thing", "--max-tokens", "8"]
    assert run(capsys, *arguments) == json.loads(run(capsys, *arguments, "--json"))["text"] + "\n"


def test_a_stream_without_a_tokenizer_is_the_ids(bare_checkpoint, capsys):
    arguments = ["generate", str(bare_checkpoint), "--ids", PROMPT, "--max-tokens", "8"]
    ids = json.loads(run(capsys, *arguments, "--json"))["ids"]
    assert run(capsys, *arguments) == ",".join(map(str, ids)) + "\n"


@pytest.mark.parametrize("content", ["5,60,7\n\n9 10\n", "[[5, 60, 7], [9, 10]]"])
def test_a_file_of_ids_is_a_batch(bare_checkpoint, capsys, tmp_path, content):
    (tmp_path / "ids").write_text(content)
    arguments = ["generate", str(bare_checkpoint), "--max-tokens", "6", "--json"]
    batch = json.loads(run(capsys, *arguments, "--ids-file", str(tmp_path / "ids")))
    alone = [json.loads(run(capsys, *arguments, "--ids", ids)) for ids in (PROMPT, "9,10")]
    assert batch == alone


@pytest.mark.parametrize("content", ["", "5,six", "[[5], 6]", "[1.5]", "[-1]", "[[]]", "{}", "[1, 2"])
def test_a_file_that_holds_no_ids_is_wrong_usage(bare_checkpoint, capsys, tmp_path, content):
    (tmp_path / "ids").write_text(content)
    assert main(["generate", str(bare_checkpoint), "--ids-file", str(tmp_path / "ids")]) == 2
    assert "expected lines of token ids" in capsys.readouterr().err


def test_logprobs_are_those_of_scoring(bare_checkpoint, capsys):
    model = str(bare_checkpoint)
    out = run(capsys, "generate", model, "--ids", PROMPT, "--max-tokens", "4", "--logprobs", "1", "--json")
    document = json.loads(out)
    ids = ",".join(map(str, [5, 60, 7, *document["ids"]]))
    score = json.loads(run(capsys, "score", model, "--ids", ids, "--json"))
    for i, entry in enumerate(document["logprobs"]):
        assert entry["id"] == document["ids"][i]
        assert entry["logprob"] == pytest.approx(score["logprobs"][3 + i], abs=1e-4)
        assert entry["top"] == [[score["top"][2 + i][0], pytest.approx(score["top"][2 + i][1], abs=1e-4)]]


def test_a_seed_fixes_what_is_drawn(bare_checkpoint, capsys):
    arguments = ["generate", str(bare_checkpoint), "--ids", PROMPT, "--max-tokens", "8", "--json", "--temperature", "1"]
    first, again, other = (run(capsys, *arguments, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_a_prompt_without_room_for_an_answer_is_refused(bare_checkpoint, capsys):
    assert main(["generate", str(bare_checkpoint), "--ids", PROMPT, "--max-length", "3"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "prompt 0 has 3 tokens: expected at most 2" in captured.err


def test_a_stop_string_needs_a_tokenizer(bare_checkpoint, capsys):
    assert main(["generate", str(bare_checkpoint), "--ids", PROMPT, "--stop", "x"]) == 1
    assert "stop strings need a tokenizer" in capsys.readouterr().err


def test_options_that_are_not_allowed_are_wrong_usage(bare_checkpoint, capsys):
    assert main(["generate", str(bare_checkpoint), "--ids", PROMPT, "--temperature", "-1"]) == 2
    assert "temperature=-1.0 is not allowed" in capsys.readouterr().err
    assert main(["generate", str(bare_checkpoint), "--ids", PROMPT, "--logprobs", "2"]) == 2
    assert "--logprobs needs --json" in capsys.readouterr().err
