"""Text that comes token by token, against the text of all the ids together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from ministral_jax.tokenizer import TextStream
from tests.tokenizers import KINDS, mistral_tokenizer, tokenizer


def streamed(kind: str, ids: list[int], *, continuing: bool = False) -> list[str]:
    stream = TextStream(tokenizer(kind), continuing=continuing)
    return [*(stream.feed(token_id) for token_id in ids), stream.finish()]


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids, those of bytes and control tokens and of a lone space far more often than chance has it."""
    found = tokenizer(kind)
    special = [token_id for token_id in range(40) if found.is_special(token_id)]
    first_byte = {"v1": 3}.get(kind, 1000 if found.is_tekken and kind == "v3-tekken" else 771)
    if kind.startswith("tiny"):
        first_byte = 48
    space = found.encode(" ")
    anything = st.integers(0, found.vocabulary_size - 1)
    some_byte = st.integers(first_byte, first_byte + 255)
    high_byte = st.integers(first_byte + 0x80, first_byte + 0xF7)
    return st.lists(anything | some_byte | high_byte | st.sampled_from(special + space), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streamed_pieces_are_the_decoded_text(kind: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    assert "".join(streamed(kind, ids)) == mistral_tokenizer(kind).decode(ids)


@pytest.mark.parametrize("kind", ["v1", "v3", "v3-tekken"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_comes_whole_without_replacement_characters(kind: str, text: str) -> None:
    text = "a" + text.replace("\ufffd", "")
    ids = tokenizer(kind).encode(text)
    pieces = streamed(kind, ids)
    assert "".join(pieces) == tokenizer(kind).decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_text_keeps_its_spaces_at_every_split(kind: str) -> None:
    found = tokenizer(kind)
    ids = found.encode("The capital of 法国 is  Paris,\n and so on")
    whole = found.decode(ids)
    for split in range(1, len(ids)):
        if "\ufffd" in found.decode(ids[:split]):
            continue  # the prompt would end inside a character
        assert found.decode(ids[:split]) + "".join(streamed(kind, ids[split:], continuing=True)) == whole


def test_a_character_is_held_back_until_it_is_whole() -> None:
    found = tokenizer("tiny-v13")
    byte = {value: 48 + value for value in range(256)}
    assert streamed("tiny-v13", [byte[0xF0], byte[0x9F], byte[0x91], byte[0x8D]]) == ["", "", "", "👍", ""]
    assert streamed("tiny-v13", [byte[0xF0], byte[0x9F], found.eos_id, byte[0x41]]) == ["", "", "\ufffd", "A", ""]
    assert streamed("tiny-v13", [byte[0xF0], byte[0x9F]]) == ["", "", "\ufffd"]


def test_sentencepiece_writes_one_replacement_for_each_byte() -> None:
    byte = {value: 3 + value for value in range(256)}
    assert streamed("v1", [byte[0xF0], byte[0x9F]]) == ["", "", "\ufffd\ufffd"]
    assert tokenizer("v1").decode([byte[0xF0], byte[0x9F]]) == "\ufffd\ufffd"


def test_streaming_never_decodes_the_text_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = SentencePieceTokenizer.decode
    monkeypatch.setattr(
        SentencePieceTokenizer,
        "decode",
        lambda self, tokens, *policy: (lengths.append(len(tokens)), decode(self, tokens, *policy))[1],
    )
    ids = tokenizer("v2").encode("one two three four " * 200)
    assert "".join(streamed("v2", ids)) == "one two three four " * 200
    assert max(lengths) <= 2
    assert len(lengths) < 50  # each distinct token once, not each occurrence
