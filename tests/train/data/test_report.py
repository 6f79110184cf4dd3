"""What `validate` tells: tokens and rows as the batches have them, corrected copies, a marked sample."""

import json

import numpy as np
import pytest

from ministral_jax.errors import MinistralError
from tests.tokenizers import tokenizer
from tests.train.data.lines import CHAT, EVERY_VERSION, PAIR, TEXT, TOOLS
from train.data.config import DataConfig
from train.data.pipeline import open_data
from train.data.report import validate
from train.data.sources import parse_sources

KIND = "tiny-v13"
BAD = '{"messages": [{"role": "me", "content": "x"}]}'


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("packing", ["first-fit", "mistral-finetune", "none"])
@pytest.mark.parametrize("long", ["cut", "drop"])
def test_rows_and_tokens_are_those_of_one_pass_of_the_batches(tmp_path, packing, long):
    lines = [{"messages": [*CHAT["messages"][:3], {"role": "assistant", "content": "a" * n}]} for n in range(1, 90, 7)]
    path = written(tmp_path / "a.jsonl", *lines, TOOLS)
    config = DataConfig(instruct_data=str(path), packing=packing, long=long, epochs=1, shuffle=False, read_threads=0)
    report = validate(parse_sources(str(path)), tokenizer(KIND), config, seq_len=96)
    batches = open_data(config, tokenizer(KIND), seq_len=96, batch_size=1)
    rows = list(batches)
    assert report.packing is not None
    assert report.packing.rows == len(rows)
    assert report.packing.tokens == sum(int((batch.segment_ids > 0).sum()) for batch in rows)
    assert report.packing.trained == sum(int(np.count_nonzero(batch.loss_weights)) for batch in rows)
    assert report.packing.fill_rate == batches.fill_rate


def test_each_source_has_its_own_lines_tokens_and_longest_sample(tmp_path):
    first = written(tmp_path / "a.jsonl", TEXT, BAD, {"text": "ab"})
    second = written(tmp_path / "b.jsonl", PAIR)
    report = validate(parse_sources(f"{first}:2,{second}"), tokenizer(KIND), DataConfig(), seq_len=20)
    ids = [len(tokenizer(KIND).encode(line["text"])) + 1 for line in (TEXT, {"text": "ab"})]
    a, b = report.sources
    assert (a.path, a.weight, a.lines, a.good) == (str(first), 2.0, 3, 2)
    assert (a.tokens, a.trained, a.longest, a.too_long) == (sum(ids), sum(ids), max(ids), 1)
    answers = [len(tokenizer(KIND).encode(text)) + 1 for text in ("Hello!", "No.")]
    assert (b.weight, b.trained) == (None, sum(answers))


def test_the_kind_of_a_source_decides_what_a_line_with_both_keys_is(tmp_path):
    path = written(tmp_path / "a.jsonl", {**CHAT, "text": "ab"})
    trained = []
    for kind in ("pretrain", "instruct", None):
        report = validate(parse_sources(str(path), kind), tokenizer(KIND), DataConfig())
        trained.append(report.sources[0].trained)
    assert trained[0] == 3
    assert trained[1] == trained[2] == len(tokenizer(KIND).encode("Blue.")) + 1


def test_the_sample_shows_what_is_trained(tmp_path):
    path = written(tmp_path / "a.jsonl", BAD, CHAT)
    report = validate(parse_sources(str(path)), tokenizer(KIND), DataConfig())
    before = "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Name a colour.[/INST]Red.</s>[INST]Another.[/INST]"
    assert report.sample == [(before, False), ("Blue.</s>", True)]


def test_line_numbers_count_blank_lines_too(tmp_path):
    path = written(tmp_path / "a.jsonl", TEXT, "", "  ", BAD, "", BAD)
    report = validate(parse_sources(str(path)), tokenizer(KIND), DataConfig())
    assert [problem.line for problem in report.problems] == [4, 6]


@pytest.mark.parametrize(("value", "found"), [("NaN", "nan"), ("-Infinity", "-inf"), ("1e999", "inf")])
def test_numbers_that_are_no_json_are_told_wherever_they_stand(tmp_path, value, found):
    schema = {"type": "object", "properties": {"town": {"default": "?"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    line = json.dumps({**TOOLS, "tools": [TOOLS["tools"][0], tool]}).replace('"?"', value)
    path = written(tmp_path / "a.jsonl", line)
    (problem,) = validate(parse_sources(str(path)), tokenizer(KIND), DataConfig()).problems
    assert problem.field == "tools[1].function.parameters.properties.town.default"
    assert (problem.kind, problem.found) == ("json", found)


def test_without_a_tokenizer_the_shape_of_lines_is_checked_and_no_token_counted(tmp_path):
    path = written(tmp_path / "a.jsonl", *EVERY_VERSION.values(), BAD)
    report = validate(parse_sources(str(path)), None, DataConfig(), seq_len=8)
    assert report.kinds == {"message": 1}
    assert (report.sources[0].good, report.sources[0].tokens) == (len(EVERY_VERSION), None)
    assert report.packing is None
    assert report.sample is None


def test_corrected_copies_hold_the_good_lines_to_the_byte(tmp_path):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    good = json.dumps(CHAT).replace(": ", " :  ")
    written(folder / "a.jsonl", good, BAD, "", TEXT)
    written(folder / "inner" / "b.jsonl", BAD)
    before = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    report = validate(parse_sources(str(folder)), tokenizer(KIND), DataConfig(), corrected=tmp_path / "out")
    copy = tmp_path / "out" / "data" / "a.jsonl"
    assert copy.read_text() == f"{good}\n{json.dumps(TEXT)}\n"
    assert (tmp_path / "out" / "data" / "inner" / "b.jsonl").read_bytes() == b""
    assert sorted(report.corrected) == sorted(str(path) for path in (tmp_path / "out").rglob("*.jsonl"))
    assert {path: path.read_bytes() for path in folder.rglob("*.jsonl")} == before
    again = validate(parse_sources(str(copy)), tokenizer(KIND), DataConfig())
    assert again.problems == []


def test_corrected_copies_overwrite_nothing(tmp_path):
    path = written(tmp_path / "a.jsonl", BAD)
    for target in (tmp_path, path.parent):
        with pytest.raises(MinistralError, match="exists already"):
            validate(parse_sources(str(path)), None, DataConfig(), corrected=target)
    other = tmp_path / "other"
    other.mkdir()
    twin = written(other / "a.jsonl", BAD)
    with pytest.raises(MinistralError, match="two files of this name"):
        validate(parse_sources(f"{path},{twin}"), None, DataConfig(), corrected=tmp_path / "out")
    assert not (tmp_path / "out").exists()
