"""Damage to every field of valid lines: each bad line is told by file, line and field, and the others survive."""

import json
import random
from pathlib import Path

import pytest

from tests.mutation import Damage, damaged_bytes, damaged_documents, randomly_damaged_documents
from tests.tokenizers import tokenizer
from tests.train.data.lines import EVERY_LINE, TEXT
from train.data.config import DataConfig
from train.data.report import KINDS, DataReport, validate
from train.data.reshape import SHAPES, convert
from train.data.sources import parse_sources

GOOD = json.dumps(TEXT)


def field_of(path: tuple[str | int, ...]) -> str:
    """A path as reports write it."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return "".join(parts).removeprefix(".")


def report_of(path: Path, lines: list[str], kind: str) -> DataReport:
    """The report of a file where a good line follows each of `lines`."""
    path.write_text("".join(f"{line}\n{GOOD}\n" for line in lines))
    return validate(parse_sources(str(path)), tokenizer(kind), DataConfig())


def is_told_in_its_place(damage: Damage, field: str, kind: str) -> bool:
    """Whether a report's field is the damaged one, one around or inside it, or a thing that the damage contradicts."""
    damaged = field_of(damage.path)
    if damaged.startswith(field) or field.startswith(damaged):
        return True
    beside = field.rpartition(".")[0]  # of two keys that mean the same, or where one of two is needed
    if beside and damaged.startswith(beside):
        return True
    if damage.path[0] in ("chosen", "rejected", "prompt"):  # they have to begin alike
        return field in ("rejected", "chosen", "prompt", "messages")
    return kind == "chat" and field.startswith(("messages", "interactions"))  # an order of roles, ids that answer


@pytest.mark.parametrize("kind", ["v3", "tiny-v11", "tiny-v13"])
@pytest.mark.parametrize("name", EVERY_LINE)
def test_damage_is_told_by_line_and_field_and_spares_the_other_lines(tmp_path, name, kind):
    damages = list(damaged_documents(EVERY_LINE[name], seed=len(name), per_field=5))
    path = tmp_path / "lines.jsonl"
    report = report_of(path, [damage.text for damage in damages], kind)
    assert report.sources[0].lines == 2 * len(damages)
    assert report.sources[0].good == 2 * len(damages) - len(report.problems)
    assert len({problem.line for problem in report.problems}) == len(report.problems)
    exact = 0
    for problem in report.problems:
        assert problem.line % 2 == 1, "a good line was told"
        assert problem.file == str(path)
        assert problem.kind in KINDS
        assert problem.found
        assert problem.expected
        assert "\n" not in str(problem)
        damage = damages[problem.line // 2]
        assert is_told_in_its_place(damage, problem.field, problem.kind), (field_of(damage.path), str(problem))
        exact += problem.field == field_of(damage.path)
    assert exact > len(damages) / 3


@pytest.mark.parametrize("name", EVERY_LINE)
def test_damage_in_many_fields_at_once_spares_the_other_lines(tmp_path, name):
    damages = randomly_damaged_documents(EVERY_LINE[name], seed=2, count=40)
    report = report_of(tmp_path / "lines.jsonl", [damage.text for damage in damages], "tiny-v13")
    assert all(problem.line % 2 == 1 for problem in report.problems)


def test_damaged_bytes_are_bad_lines_and_nothing_worse(tmp_path):
    whole = "".join(json.dumps(line) + "\n" for line in EVERY_LINE.values()).encode()
    path = tmp_path / "lines.jsonl"
    told = 0
    for damaged in damaged_bytes(whole, seed=5, count=8):
        path.write_bytes(damaged)
        report = validate(parse_sources(str(path)), tokenizer("tiny-v13"), DataConfig())
        lines = [line for line in damaged.split(b"\n") if line.strip()]
        assert report.sources[0].lines == len(lines)
        whole_lines = sum(line in whole.split(b"\n") for line in lines)
        assert report.sources[0].good >= whole_lines
        told += len(report.problems)
    assert told > 20


FOREIGN = {
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Rain in Oslo?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'},
            {"from": "observation", "value": "yes"},
            {"from": "gpt", "value": "It rains."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "weather", "description": "", "parameters": {}}]',
    },
    "openai": {
        "messages": [
            {"role": "user", "content": "Rain in Oslo?"},
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}},
            {"role": "function", "name": "weather", "content": "yes"},
            {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "no"},
            {"role": "assistant", "content": "It rained."},
        ],
        "functions": [{"name": "weather", "description": "", "parameters": {}}],
    },
    "alpaca": {
        "instruction": "Add.",
        "input": "2 2",
        "output": "4",
        "system": "Count.",
        "history": [["Add. 1 1", "2"]],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_damaged_records_of_other_formats_are_told_and_the_others_converted(tmp_path, shape):
    damages = list(damaged_documents(FOREIGN[shape], seed=4, per_field=8))
    source, target = tmp_path / "theirs.jsonl", tmp_path / "ours.jsonl"
    whole = json.dumps(FOREIGN[shape])
    source.write_text("".join(f"{damage.text}\n{whole}\n" for damage in damages))
    report = convert(source, target, shape)
    assert all(problem.line % 2 == 1 and problem.field for problem in report.problems)
    assert report.read == report.written + report.empty + len(report.problems) == 2 * len(damages)
    assert len(report.problems) > len(damages) / 5
    checked = validate(parse_sources(str(target)), tokenizer("tiny-v13"), DataConfig())
    assert checked.sources[0].good >= len(damages)


def test_damaged_bytes_of_other_formats_never_crash_the_conversion(tmp_path):
    draw = random.Random(3)
    for shape in SHAPES:
        whole = (json.dumps(FOREIGN[shape]) + "\n").encode() * 2
        for number, damaged in enumerate(damaged_bytes(whole, seed=draw.randrange(99), count=5)):
            source = tmp_path / f"{shape}{number}.jsonl"
            source.write_bytes(damaged if damaged.strip() else b"{}")
            report = convert(source, tmp_path / f"{shape}{number}.out", shape)
            assert report.read == report.written + report.empty + len(report.problems)
