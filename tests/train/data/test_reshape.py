"""Conversion from other formats, each result held against the lines that one would write by hand."""

import json
import re

import pytest

from ministral_jax.errors import MinistralError
from tests.tokenizers import tokenizer
from tests.train.data.test_damaged_lines import FOREIGN
from train.data.formats import read_record
from train.data.reshape import convert
from train.data.tokens import SampleEncoder

TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}


def converted(tmp_path, records, shape=None, name="ours.jsonl"):
    source, target = tmp_path / "theirs.json", tmp_path / name
    source.write_text(json.dumps(records))
    report = convert(source, target, shape)
    return [json.loads(line) for line in target.read_text().splitlines()], report


def ids_of(line):
    """The call ids of a line, each with the one its result gives."""
    calls = [call["id"] for message in line["messages"] for call in message.get("tool_calls", ())]
    return calls, [message["tool_call_id"] for message in line["messages"] if message["role"] == "tool"]


def test_alpaca_becomes_question_and_answer(tmp_path):
    lines, report = converted(tmp_path, [FOREIGN["alpaca"], {"instruction": "Hi", "input": "", "output": "Hello"}])
    assert lines == [
        {
            "messages": [
                {"role": "system", "content": "Count."},
                {"role": "user", "content": "Add. 1 1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "Add.\n\n2 2"},
                {"role": "assistant", "content": "4"},
            ]
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    assert (report.shape, report.read, report.written) == ("alpaca", 2, 2)


def test_sharegpt_becomes_messages_with_tools(tmp_path):
    (line,), report = converted(tmp_path, [FOREIGN["sharegpt"]])
    assert report.shape == "sharegpt"
    assert line["tools"] == [TOOL]
    assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    call = line["messages"][2]["tool_calls"][0]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"town": "Oslo"}
    assert ids_of(line)[0] == ids_of(line)[1]


def test_openai_functions_become_tools_and_calls(tmp_path):
    (line,), report = converted(tmp_path, [FOREIGN["openai"]])
    assert report.shape == "openai"
    assert line["tools"] == [TOOL]
    roles = [message["role"] for message in line["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    calls, results = ids_of(line)
    assert calls == results
    assert len(set(calls)) == 2
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call_id) for call_id in calls)
    assert not {"function_call", "name"} & {key for message in line["messages"] for key in message}


@pytest.mark.parametrize("kind", ["v3", "tiny-v11", "tiny-v13"])
@pytest.mark.parametrize("shape", FOREIGN)
def test_what_is_converted_can_be_trained_on(tmp_path, shape, kind):
    (line,), _ = converted(tmp_path, [FOREIGN[shape]])
    assert SampleEncoder(tokenizer(kind)).encode(read_record(json.dumps(line).encode()))


def test_ids_are_the_same_every_time_and_differ_between_records(tmp_path):
    other = json.loads(json.dumps(FOREIGN["sharegpt"]).replace("Oslo", "Rome"))
    records = [FOREIGN["sharegpt"], other]
    once, again = (converted(tmp_path, records, name=name)[0] for name in ("a.jsonl", "b.jsonl"))
    assert once == again
    assert ids_of(once[0]) != ids_of(once[1])


def test_results_of_parallel_calls_without_ids_answer_them_in_order(tmp_path):
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "done"},
    ]
    (line,), _ = converted(tmp_path, [{"messages": messages}])
    assert ids_of(line)[0] == ids_of(line)[1]


def test_ends_without_an_answer_are_cut_and_records_without_any_left_out(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    records = [{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": []}, {"conversations": 3}, 4]
    lines, report = converted(tmp_path, records)
    assert lines == [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert (report.read, report.written, report.cut, report.empty) == (5, 1, 1, 2)
    assert [(problem.line, problem.field) for problem in report.problems] == [(4, "conversations"), (5, "line")]


def test_json_lines_and_a_json_list_give_the_same(tmp_path):
    records = [FOREIGN["alpaca"], FOREIGN["alpaca"]]
    listed, _ = converted(tmp_path, records)
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    convert(tmp_path / "theirs.jsonl", tmp_path / "lines.out")
    assert (tmp_path / "lines.out").read_text() == (tmp_path / "ours.jsonl").read_text()
    assert len(listed) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no lines in it"),
        ("[1, 2", "begins like a JSON list"),
        ('{"question": "?"}', "say which it is with --from"),
    ],
)
def test_files_that_are_none_of_these_are_refused(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(MinistralError, match=reason):
        convert(tmp_path / "a.json", tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_target_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([FOREIGN["alpaca"]]))
    with pytest.raises(MinistralError, match="exists already"):
        convert(tmp_path / "a.json", tmp_path / "a.json")
