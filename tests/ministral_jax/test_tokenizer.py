"""Loading tokenizer files, good and bad, and plain text to ids and back."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.fim.request import FIMRequest

from ministral_jax.errors import TokenizerError
from ministral_jax.tokenizer import TextStream, Tokenizer
from tests.tekken_files import tiny_tekken, write_tiny_tekken
from tests.tokenizers import KINDS, mistral_tokenizer, shipped_file, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_its_ids_are_mistral_commons(kind: str) -> None:
    found, oracle = tokenizer(kind), mistral_tokenizer(kind).instruct_tokenizer.tokenizer
    text = "  Hëllo 你好 👍🏽\n\tthe end "
    assert found.encode(text, bos=True, eos=True) == oracle.encode(text, bos=True, eos=True)
    assert found.decode(found.encode(text, bos=True, eos=True)) == text
    assert (found.bos_id, found.eos_id, found.vocabulary_size) == (1, 2, oracle.n_words)
    assert found.version == oracle.version.value


def test_control_tokens_are_found_by_name() -> None:
    assert tokenizer("v3").special_id("[TOOL_CALLS]") == 5
    assert tokenizer("v3-tekken").special_id("[TOOL_CALLS]") == 9
    assert tokenizer("tiny-v13").special_id("[THINK]") == 22
    assert tokenizer("v1").special_id("[INST]") is None
    assert tokenizer("v3").special_id("[THINK]") is None
    assert tokenizer("v3").special_id("the") is None
    assert tokenizer("v3").pad_id is None
    assert tokenizer("v3-tekken").pad_id == 11


@pytest.mark.parametrize("kind", ["v1", "tiny-v13"])
@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_named(kind: str, token_id: int) -> None:
    found = tokenizer(kind)
    for reading in (
        lambda: found.decode([1, token_id]),
        lambda: TextStream(found).feed(token_id),
        lambda: found.token_bytes(token_id),
        lambda: found.is_special(token_id),
    ):
        with pytest.raises(TokenizerError, match=f"token id {token_id} is not in the vocabulary"):
            reading()


@pytest.mark.parametrize("kind", ["v1", "tiny-v13"])
def test_a_lone_surrogate_is_refused(kind: str) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        tokenizer(kind).encode("a\ud800b")
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        tokenizer("v3").encode_infill("a", "a\ud800b")
    with pytest.raises(TokenizerError, match=r"messages\[1\]: .* surrogates not allowed"):
        tokenizer(kind).encode_chat([{"role": "user", "content": text} for text in ("a", "a\ud800b")])


@pytest.mark.parametrize("kind", ["v3", "v3-tekken", "v7", "tiny-v13"])
@pytest.mark.parametrize("suffix", ["return x", None])
def test_infilling_is_mistral_commons(kind: str, suffix: str | None) -> None:
    expected = mistral_tokenizer(kind).encode_fim(FIMRequest(prompt="def f(", suffix=suffix)).tokens
    assert tokenizer(kind).encode_infill("def f(", suffix) == expected


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_infilling_needs_its_control_tokens(kind: str) -> None:
    with pytest.raises(TokenizerError, match="PREFIX"):
        tokenizer(kind).encode_infill("def f(", "return x")


def test_importing_the_tokenizer_imports_neither_jax_nor_mistral_common() -> None:
    code = "import sys, ministral_jax.tokenizer, ministral_jax.parsing; "
    code += "print([name for name in ('jax', 'mistral_common', 'torch') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["v1", "v3-tekken", "tiny-v13"])
def test_token_bytes_put_together_are_the_text(kind: str) -> None:
    found = tokenizer(kind)
    ids = found.encode("Hëllo 你好 👍🏽 end")
    data = b"".join(found.token_bytes(token_id, first=place == 0) for place, token_id in enumerate(ids))
    assert data.decode() == "Hëllo 你好 👍🏽 end"
    assert found.token_bytes(found.eos_id) == b""


# ---- loading


def same_ids(path: Path, kind: str) -> bool:
    """Whether the file renders and encodes as the published file of that kind does."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found, expected = Tokenizer.load(path), tokenizer(kind)
    return (found.version, found.encode_chat(messages).tokens) == (
        expected.version,
        expected.encode_chat(messages).tokens,
    )


@pytest.mark.parametrize("kind", ["v1", "v3", "v7"])
def test_a_bare_sentencepiece_file_has_its_version_from_its_control_pieces(kind: str, tmp_path: Path) -> None:
    shutil.copy(shipped_file(kind), tmp_path / "tokenizer.model")
    assert same_ids(tmp_path, kind)
    assert same_ids(tmp_path / "tokenizer.model", kind)


def test_the_file_that_7b_v03_publishes_is_read_as_v3(tmp_path: Path) -> None:
    # Its bytes are those that mistral-common ships for v2: no [PREFIX], so pieces cannot tell v2 from v3.
    shutil.copy(shipped_file("v2"), tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path).version == "v3"


def test_a_directory_is_read_by_mistral_commons_preference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "params.json").write_text("{}")
    shutil.copy(shipped_file("v1"), tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path).version == "v1"
    shutil.copy(shipped_file("v3"), tmp_path / "tokenizer.model.v3")
    assert Tokenizer.load(str(tmp_path)).path == tmp_path / "tokenizer.model.v3"
    assert caplog.text == ""  # both are published together: nothing to warn of
    write_tiny_tekken(tmp_path, "v13")
    assert Tokenizer.load(tmp_path).path == tmp_path / "tekken.json"


def refusal(path: Path) -> str:
    """The one line that loading the file fails with, less its name."""
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(path)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_a_missing_file_is_named_with_what_was_expected(tmp_path: Path) -> None:
    assert "no such file or directory" in refusal(tmp_path / "nowhere")
    assert "no tokenizer file; expected tekken.json" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not read" in refusal(tmp_path)
    assert "not a name that mistral-common reads" in refusal(tmp_path / "tokenizer.json")


def test_a_sentencepiece_file_that_lacks_its_versions_control_pieces_is_refused(tmp_path: Path) -> None:
    for kind, name, lacking in [("v1", "v3", "[INST]"), ("v3", "v7", "[SYSTEM_PROMPT]"), ("v7", "v11", "[ARGS]")]:
        path = tmp_path / f"tokenizer.model.{name}"
        shutil.copy(shipped_file(kind), path)
        assert refusal(path) == f"version {name} needs the control token {lacking}"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_a_sentencepiece_file_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    data, path = shipped_file("v3").read_bytes(), tmp_path / name
    for length in [0, 1, 7, 1000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        assert "mistral-common refuses it" in refusal(path)


def test_a_tekken_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tiny_tekken(tmp_path, "v13")
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        assert refusal(path).startswith("not a JSON document: ")


DAMAGE: list[tuple[str, Any, str]] = [
    ("config", None, "config is missing"),
    ("config.version", "v99", "config.version is 'v99', expected one of v1, v2, v3"),
    ("config.version", ["v3"], "config.version is ['v3']"),
    ("config.pattern", None, "config.pattern is missing or null, expected a regular expression"),
    ("config.pattern", "", "config.pattern does not split text into words without loss"),
    ("config.pattern", "x", "config.pattern does not split text into words without loss"),
    ("config.pattern", r"\S+|\s*", "config.pattern does not split text into words without loss"),
    ("config.pattern", "(", "config.pattern is not a regular expression that splits text: missing )"),
    ("config.default_vocab_size", "314", "config.default_vocab_size is '314', expected a positive integer"),
    ("config.default_vocab_size", 314.0, "config.default_vocab_size is 314.0"),
    ("config.default_vocab_size", 10**9, "config.default_vocab_size is 1000000000, expected"),
    ("config.default_vocab_size", 200, "config.default_vocab_size is 200, expected"),
    ("config.default_num_special_tokens", -1, "config.default_num_special_tokens is -1"),
    ("config.default_num_special_tokens", 20, "config.default_vocab_size is 314, expected 20"),
    ("vocab", {}, "vocab is {}, expected a list"),
    ("vocab.7", "x", "vocab[7] is 'x'"),
    ("vocab.7.rank", 8, "vocab[7].rank is 8, expected 7"),
    ("vocab.260.token_bytes", "AA==", "vocab[260].token_bytes is 'AA==', which is there already"),
    ("vocab.260.token_bytes", "?", "vocab[260].token_bytes is '?', expected base64"),
    ("special_tokens", None, "mistral-common refuses it: Special tokens not found"),
    ("special_tokens.3", 3, "special_tokens[3] is 3"),
    ("special_tokens.3.rank", 4, "special_tokens[3].rank is 4, expected 3"),
    ("special_tokens.3.token_str", "<s>", "special_tokens[3].token_str is '<s>', which is there already"),
    ("special_tokens.3.token_str", "[X]", "mistral-common refuses it: Unknown control token [INST]"),
    ("special_tokens.2.token_str", "[X]", "version v13 needs the control token </s>"),
    ("image.image_patch_size", 0, "mistral-common refuses it: image_patch_size must be > 0"),
    ("image", {"size": 3}, "mistral-common refuses it: "),
    ("model_settings_builder", {}, "mistral-common refuses it: model_settings_builder is not supported"),
]


def with_field(document: Any, field: str, value: Any) -> Any:
    """The document with the field at a dotted path replaced."""
    *parents, last = (int(part) if part.isdigit() else part for part in field.split("."))
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return document


@pytest.mark.parametrize(("field", "value", "line"), DAMAGE)
def test_a_damaged_field_of_a_tekken_file_is_named(field: str, value: Any, line: str, tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(with_field(tiny_tekken("v13"), field, value)))
    assert refusal(path).startswith(line)


def fields_of(value: Any, at: str = "") -> list[str]:
    """The dotted path of every field in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [at] if at else []
    for name, entry in inner:
        found += fields_of(entry, f"{at}.{name}" if at else str(name))
    return found


def loaded_or_refused(path: Path) -> Tokenizer | None:
    """The tokenizer, or None if it is refused in one line that names the file; any other error passes through."""
    try:
        return Tokenizer.load(path)
    except TokenizerError:
        refusal(path)
        return None


@settings(max_examples=300)
@given(data=st.data())
def test_any_value_in_any_field_loads_or_is_one_line(data: st.DataObject) -> None:
    version = data.draw(st.sampled_from(["v3", "v11", "v13", "v15"]))
    document = tiny_tekken(version)
    fields = fields_of(document)
    rare = [field for field in fields if not field.startswith("vocab.")]  # most fields are those of the vocabulary
    field = data.draw(st.sampled_from(fields) | st.sampled_from(rare))
    values = [None, True, -1, 0, 3, 2**70, 0.5, "", "x", "v7", [], [None], {}, {"x": 1}]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tekken.json"
        path.write_text(json.dumps(with_field(document, field, data.draw(st.sampled_from(values)))))
        found = loaded_or_refused(path)
        assert found is None or found.decode(found.encode("the end")) == "the end"


@settings(max_examples=100)
@given(data=st.data())
def test_any_bytes_in_a_sentencepiece_file_load_or_are_one_line(data: st.DataObject) -> None:
    content = bytearray(shipped_file("v3").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([300, len(content)]))
        content[data.draw(st.integers(0, near - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.model.v3"
        path.write_bytes(content)
        found = loaded_or_refused(path)
        assert found is None or found.encode("the end")
