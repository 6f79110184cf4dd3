"""Lists of sources, and lines of files however they end."""

import random

import pytest

from ministral_jax.errors import MinistralError
from train.data import sources
from train.data.sources import LineFile, parse_sources


def test_a_list_names_files_and_folders_with_weights(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    files = [tmp_path / "folder" / "inner" / "c.jsonl", tmp_path / "folder" / "b.jsonl", tmp_path / "a:2"]
    for file in (*files, tmp_path / "folder" / "notes.txt"):
        file.write_text("{}\n")
    text = f" {tmp_path / 'folder'}:0.5 , {tmp_path / 'a:2'}:3,"
    folder, single = parse_sources(text, "instruct")
    assert (folder.path, folder.weight, folder.kind) == (tmp_path / "folder", 0.5, "instruct")
    assert folder.files == (files[1], files[0])
    assert (single.path, single.weight, single.files) == (files[2], 3.0, (files[2],))
    assert parse_sources(str(files[0]))[0].weight is None
    assert parse_sources("") == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{0}/none.jsonl", "no such file"),
        ("{0}/a.jsonl:many", "'many' is not a weight"),
        ("{0}/a.jsonl:0", "weight 0"),
        ("{0}/a.jsonl:nan", "weight nan"),
        ("{0}/a.jsonl:-1", "weight -1"),
        ("{0}/a.jsonl,{0}/a.jsonl:2", "named twice"),
        ("{0}/a.jsonl,{0}", "named twice"),
        ("{0}/empty", "without .jsonl files"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(tmp_path, text, reason):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MinistralError, match=reason):
        parse_sources(text.format(tmp_path))


@pytest.mark.parametrize("block", [1, 3, 1 << 22])
def test_lines_and_their_numbers_are_those_of_splitting_at_line_breaks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "_BLOCK", block)
    draw = random.Random(1)
    pieces = [b"{}", b" ", b"\n", b"\r\n", b"\t", b"\0", b"\x0b", b'{"a": "\xe4\xbd\xa0"}', b"\n\n", b"\xef\xbb\xbf"]
    for number in range(60):
        content = b"".join(draw.choice(pieces) for _ in range(number % 17))
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        expected = [(place, line) for place, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        lines = LineFile(path)
        assert len(lines) == len(expected)
        assert list(lines) == [line.rstrip(b"\r\n") for _, line in expected]
        assert [lines[place] for place in range(len(lines))] == list(lines)
        assert lines.numbers.tolist() == [place for place, _ in expected]


def test_the_digest_is_of_every_byte(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    (tmp_path / "b").write_bytes(b'{"a": 1}\n{"b": 3}\n')
    (tmp_path / "c").write_bytes(b'{"a": 1}\n{"b": 2}\n')
    a, b, c = (LineFile(tmp_path / name).digest for name in "abc")
    assert a == c != b
