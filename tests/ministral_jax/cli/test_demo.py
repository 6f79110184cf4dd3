"""`ministral demo`: what it hides and asks, how it judges and counts. Answers are scripted, the model is random."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer.answer import Piece
from infer.generate import Generator
from ministral_jax.cli import demo, main
from ministral_jax.tokenizer import Tokenizer
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint
from tests.tekken_files import tiny_tekken, write_tiny_tekken

TEXT = " ".join(f"This is sentence {letter} of a letter." for letter in "abcdefghij")


@pytest.fixture(autouse=True)
def bundled_model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model in the bundled one's place, so that these tests say nothing about how well that one is trained."""
    folder = tmp_path_factory.mktemp("bundled")
    words = tiny_tekken("v3")["config"]["default_vocab_size"]
    write_tiny_checkpoint(
        folder, tiny_config("ministral", vocab_size=words, windows=(None, 32, 32, 32), max_length=2048)
    )
    write_tiny_tekken(folder, "v3")
    monkeypatch.setattr(demo, "BUNDLED_MODEL", folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, bundled_model: Path) -> Any:
    """Makes the model answer with a text; returns the prompts it saw, decoded."""
    tokenizer = Tokenizer.load(bundled_model)
    real = Generator.stream_ids

    def answer_with(text: str) -> list[str]:
        prompts: list[str] = []

        def stream_ids(self: Generator, given: Any, *rest: Any, **options: Any) -> Iterator[Piece]:
            prompts.extend(tokenizer.decode(prompt, keep_special=True) for prompt in given)
            for _ in real(self, given, *rest, **options):
                pass  # for its timing and its cache
            yield Piece(0, tuple(tokenizer.encode(text)), "", (), "stop")

        monkeypatch.setattr(Generator, "stream_ids", stream_ids)
        return prompts

    return answer_with


def test_a_random_model_is_wrong_and_the_exit_code_says_so(capsys):
    assert main(["demo", "--key", "48213"]) == 1
    out = capsys.readouterr().out
    assert "\nwrong: it is 48213\n" in out
    assert re.search(r"speed     prefill [\d,]+ tokens/s, decode [\d,]+ tokens/s", out)


def test_a_right_answer_ends_with_0(asked, capsys):
    prompts = asked("48213")
    assert main(["demo", "--key", "48213"]) == 0
    assert "\nanswer    48213\nright\n" in capsys.readouterr().out
    assert all(prompt.endswith("What is the pass key?[/INST]") for prompt in prompts)
    assert "The pass key is 48213." in prompts[0]


def test_the_key_is_hidden_in_the_users_text_between_sentences(asked, tmp_path, capsys):
    prompts = asked("48213")
    (tmp_path / "letter.txt").write_text(TEXT)
    letter = str(tmp_path / "letter.txt")
    for depth, before in (("0", "[INST]"), ("0.5", "sentence e of a letter. "), ("1", "sentence j of a letter. ")):
        assert main(["demo", "--document", letter, "--key", "48213", "--depth", depth]) == 0
        assert f"{before}The pass key is 48213." in prompts[-1]
        assert prompts[-1].replace("The pass key is 48213. ", "").replace(" The pass key is 48213.", "") == (
            f"<s>[INST]{TEXT}\n\nWhat is the pass key?[/INST]"
        )


def test_the_generated_document_has_the_length_that_was_asked_for(asked, capsys):
    asked("1")
    for windows in (4, 7):
        main(["demo", "--windows-long", str(windows)])
        shown = re.search(r"document  (\d+) tokens", capsys.readouterr().out)
        assert shown is not None
        assert 0.6 * windows * 32 <= int(shown[1]) <= windows * 32


def test_a_seed_fixes_the_document(asked, capsys):
    prompts = asked("1")
    for seed in ("1", "1", "2"):
        main(["demo", "--seed", seed])
    assert prompts[0] == prompts[2] != prompts[4]


def test_the_cache_is_compared_with_one_of_full_layers_alone(asked, capsys, monkeypatch, bundled_model):
    asked("1")
    main(["demo"])
    shown = re.search(
        r"cache     ([\d,]+) KiB for (\d+) tokens; if every layer were full, ([\d,]+) KiB", capsys.readouterr().out
    )
    assert shown is not None
    windowed, tokens, full = (int(number.replace(",", "")) for number in shown.groups())
    config = json.loads((bundled_model / "params.json").read_text())
    bytes_of_a_token = 2 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"] * 4
    assert full == pytest.approx((tokens + demo.PAGE_SIZE) * bytes_of_a_token / 1024, abs=1)
    # One layer of four is full; the others hold their window, a chunk and the ends of pages.
    held = 32 - 1 + demo.PREFILL_CHUNK
    assert full * (tokens + 3 * held) / (4 * tokens) <= windowed < 0.7 * full


@pytest.mark.parametrize("options", [["--key", "123"], ["--key", "1234x"], ["--depth", "1.5"], ["--depth", "-0.1"]])
def test_what_cannot_be_hidden_is_wrong_usage(options, capsys):
    assert main(["demo", *options]) == 2
    assert capsys.readouterr().err.startswith(f"ministral: {options[0]}")


def test_a_document_that_is_too_long_is_one_line_with_the_limit(tmp_path, capsys):
    (tmp_path / "book.txt").write_text(TEXT * 20)
    assert main(["demo", "--document", str(tmp_path / "book.txt"), "--key", "48213"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"ministral: .* tokens: expected at most 2047", last)


@pytest.mark.parametrize("content", [b"", b"one word", np.arange(256, dtype=np.uint8).tobytes()])
def test_any_document_is_taken_or_refused_in_one_line(asked, tmp_path, capsys, content):
    asked("48213")
    (tmp_path / "text").write_bytes(content)
    code = main(["demo", "--document", str(tmp_path / "text"), "--key", "48213"])
    error = capsys.readouterr().err
    assert code == (1 if b"\x80" in content else 0)
    assert ("is not UTF-8" in error) == (code == 1)
