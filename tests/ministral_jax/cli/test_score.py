"""`ministral score`: its JSON contract, texts, and files in blocks. Numbers are held against the model's logits."""

import io
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ministral_jax.checkpoints.load import load_model
from ministral_jax.cli import main
from ministral_jax.tokenizer import Tokenizer
from tests.checkpoint_files import layout_tensors, tiny_config, write_tiny_checkpoint

IDS = [5, 60, 7, 101, 33, 8, 90, 12, 44, 71, 3, 15]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints on stdout."""
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_json_holds_the_logprob_of_each_id_and_the_best_next_one(bare_checkpoint, capsys):
    document = json.loads(run(capsys, "score", str(bare_checkpoint), "--ids", ",".join(map(str, IDS)), "--json"))
    model = load_model(bare_checkpoint, dtype="float32")
    logits = np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray([IDS]))[0], np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert list(document) == ["ids", "logprobs", "top"]
    assert document["ids"] == IDS
    assert document["logprobs"][0] is None
    np.testing.assert_allclose(
        document["logprobs"][1:], [expected[i, token] for i, token in enumerate(IDS[1:])], rtol=0, atol=1e-4
    )
    assert [token for token, _ in document["top"]] == expected.argmax(-1).tolist()
    np.testing.assert_allclose([value for _, value in document["top"]], expected.max(-1), rtol=0, atol=1e-4)


def test_one_id_has_a_best_next_one_and_no_logprob(bare_checkpoint, capsys):
    document = json.loads(run(capsys, "score", str(bare_checkpoint), "--ids", "9", "--json"))
    assert document["logprobs"] == [None]
    assert len(document["top"]) == 1


def test_a_text_is_scored_after_bos(checkpoint, capsys):
    document = json.loads(run(capsys, "score", str(checkpoint), "--text", "the thing", "--json"))
    assert document["ids"] == Tokenizer.load(checkpoint).encode("the thing", bos=True)


def test_a_file_longer_than_max_length_is_scored_in_blocks_after_bos(checkpoint, capsys, tmp_path):
    text = "the thing, the other thing and the last. " * 3
    (tmp_path / "text.txt").write_text(text)
    file = str(tmp_path / "text.txt")
    document = json.loads(run(capsys, "score", str(checkpoint), "--file", file, "--max-length", "20", "--json"))
    tokenizer = Tokenizer.load(checkpoint)
    ids = tokenizer.encode(text)
    blocks = [[tokenizer.bos_id, *ids[at : at + 19]] for at in range(0, len(ids), 19)]
    assert document["ids"] == [token for block in blocks for token in block]
    starts = [i for i, value in enumerate(document["logprobs"]) if value is None]
    assert starts == [20 * n for n in range(len(blocks))]
    second = json.loads(run(capsys, "score", str(checkpoint), "--ids", ",".join(map(str, blocks[1])), "--json"))
    np.testing.assert_allclose(document["logprobs"][21:40], second["logprobs"][1:], rtol=0, atol=1e-5)


def test_the_summary_of_a_text_is_the_mean_of_its_logprobs(checkpoint, capsys):
    document = json.loads(run(capsys, "score", str(checkpoint), "--text", "the thing", "--json"))
    mean = -sum(document["logprobs"][1:]) / len(document["logprobs"][1:])
    last = run(capsys, "score", str(checkpoint), "--text", "the thing").splitlines()[-1]
    assert last == f"4 tokens scored: {mean:.4f} nats each, perplexity {math.exp(mean):.4f}"


def test_a_text_is_read_from_stdin(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the thing")))
    piped = run(capsys, "score", str(checkpoint), "--file", "-", "--json")
    assert piped == run(capsys, "score", str(checkpoint), "--text", "the thing", "--json")


def test_more_ids_than_the_context_are_refused(bare_checkpoint, capsys):
    assert main(["score", str(bare_checkpoint), "--ids", "1,2,3", "--max-length", "2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("ministral: 3 tokens to score: expected at most 2")


def test_a_length_beyond_the_models_context_is_refused(bare_checkpoint, capsys):
    assert main(["score", str(bare_checkpoint), "--ids", "1,2,3", "--max-length", "257"]) == 1
    assert "--max-length 257: expected at most 256" in capsys.readouterr().err


def test_text_needs_a_tokenizer_and_says_so(bare_checkpoint, capsys):
    assert main(["score", str(bare_checkpoint), "--text", "hello"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no tokenizer file" in captured.err


def test_windows_replace_those_of_the_file(bare_checkpoint, capsys):
    arguments = ["score", str(bare_checkpoint), "--ids", ",".join(map(str, IDS)), "--json"]
    as_published, full, listed = (
        json.loads(run(capsys, *arguments, *more))["logprobs"]
        for more in ([], ["--windows", "full"], ["--windows", "none,5,5,5"])
    )
    assert as_published == listed
    np.testing.assert_allclose(as_published[1:5], full[1:5], rtol=0, atol=1e-4)
    assert max(abs(a - b) for a, b in zip(as_published[6:], full[6:], strict=True)) > 1e-3


def test_weights_that_are_not_numbers_give_an_error_and_no_json(tmp_path: Path, capsys):
    weights = write_tiny_checkpoint(tmp_path, tiny_config("ministral"))
    write_with_nan(tmp_path, weights)
    assert main(["score", str(tmp_path), "--ids", "1,2,3", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "not finite" in captured.err


def write_with_nan(folder: Path, weights: dict[str, np.ndarray]) -> None:
    tensors = layout_tensors(weights, tiny_config("ministral"), "mistral")
    tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)
    save_file(tensors, folder / "consolidated.safetensors")
