"""`ministral data`: exit codes, what is shown, the JSON documents, and where tokens per second lead."""

import json

import pytest

from ministral_jax.cli import build_parser, main
from ministral_jax.config_files import read_config
from ministral_jax.memory import count_parameters
from tests.tokenizers import shipped_file
from tests.train.data.lines import CHAT, TEXT

TOKENIZER = str(shipped_file("v3"))
BAD = {"messages": [{"role": "user", "content": "x"}, {"role": "asistant", "content": "y"}]}


def run(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["data", *arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (CHAT, BAD, TEXT)))
    return path


def test_bad_lines_are_shown_by_kind_with_line_and_field_and_give_exit_code_1(chats, capsys):
    code, out = run(capsys, "validate", str(chats), "--tokenizer", TOKENIZER)
    assert code == 1
    assert "message: 1 bad line\n" in out
    assert f'{chats} line 2: messages[1].role: "asistant", expected one of' in out
    assert f"{chats}: 2 of 3 lines good" in out
    assert "[INST]▁Be▁brief.<0x0A><0x0A>Another.[/INST]⟦▁Blue.</s>⟧" in out


def test_good_lines_give_exit_code_0_and_a_document(chats, capsys):
    chats.write_text(json.dumps(CHAT) + "\n" + json.dumps(TEXT) + "\n")
    arguments = ("--tokenizer", TOKENIZER, "--seq-len", "32", "--batch-size", "2", "--tokens-per-second", "8")
    code, out = run(capsys, "validate", str(chats), *arguments, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["lines"], document["good"], document["kinds"], document["problems"]) == (2, 2, {}, [])
    rows, steps = document["packing"]["rows"], document["steps"]
    assert steps["per_pass"] == -(-rows // 2)
    assert steps["seconds"] == steps["per_pass"] * 2 * 32 / 8
    assert document["sources"][0]["trained"] == document["packing"]["trained"]


def test_a_yaml_file_says_what_to_read_how_to_pack_and_how_long_it_runs(chats, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"model_id_or_path: nowhere\ndata: {{instruct_data: {chats}}}\nseq_len: 16\nbatch_size: 2\nmax_steps: 10\n"
    )
    code, out = run(capsys, "validate", str(tmp_path / "run.yaml"), "--tokenizer", TOKENIZER, "--json")
    document = json.loads(out)
    assert code == 1
    assert document["kinds"] == {"record": 1, "message": 1}  # a source of conversations holds no text
    steps = document["steps"]
    assert (steps["rows_per_step"], steps["max_steps"]) == (2, 10)
    assert steps["passes"] == 20 / document["packing"]["rows"]


def test_data_of_evaluation_is_checked_and_fills_no_rows(tmp_path, capsys):
    lines = tmp_path / "chats.jsonl"
    lines.write_text(json.dumps(CHAT) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"data: {{instruct_data: {lines}, eval_instruct_data: {lines}}}\nseq_len: 64\nmax_steps: 3\n"
    )
    code, out = run(capsys, "validate", str(tmp_path / "run.yaml"), "--tokenizer", TOKENIZER, "--json")
    document = json.loads(out)
    assert (code, document["lines"], document["packing"]["rows"]) == (0, 2, 1)


def test_the_speed_is_estimated_from_the_size_of_the_model(chats, checkpoint, capsys):
    arguments = ("--model", str(checkpoint), "--seq-len", "512", "--teraflops", "2", "--json")
    document = json.loads(run(capsys, "validate", str(chats), *arguments)[1])
    parameters = count_parameters(read_config(checkpoint)).active
    tokens = document["packing"]["rows"] * 512
    assert document["steps"]["seconds"] == pytest.approx(tokens * 4 * parameters / 2e12)


def test_a_size_without_a_model_is_wrong_usage(chats, capsys):
    assert main(["data", "validate", str(chats), "--tokenizer", TOKENIZER, "--seq-len", "64", "--teraflops", "1"]) == 2
    assert "--teraflops: needs the size of a model" in capsys.readouterr().err


def test_control_characters_of_the_data_do_not_reach_the_terminal(chats, checkpoint, capsys):
    chats.write_text(json.dumps({"text": "a\x1b[2Jb\x9bc\td\ne\x00"}) + "\n")
    out = run(capsys, "validate", str(chats), "--model", str(checkpoint))[1]
    assert "a\ufffd[2Jb\ufffdc\td\ne\ufffd" in out


def test_copies_of_the_good_lines_are_written_and_named(chats, tmp_path, capsys):
    code, out = run(capsys, "validate", str(chats), "--write-corrected", str(tmp_path / "good"))
    assert code == 1
    assert f"good lines: {tmp_path / 'good' / 'chats.jsonl'}" in out
    assert run(capsys, "validate", str(tmp_path / "good" / "chats.jsonl"))[0] == 0


def test_conversion_tells_what_became_of_the_records(tmp_path, capsys):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c"}, {"instruction": 1, "output": "d"}]
    (tmp_path / "theirs.json").write_text(json.dumps(records))
    code, out = run(capsys, "convert", str(tmp_path / "theirs.json"), str(tmp_path / "ours.jsonl"))
    assert code == 1
    assert "theirs.json line 3: instruction: 1, expected text" in out
    assert "alpaca: 3 records read, 1 written; 1 without an answer and 1 bad left out; the end cut off 0" in out
    assert run(capsys, "validate", str(tmp_path / "ours.jsonl"))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("validate", "nowhere.jsonl"), 1),
        (("validate", " "), 2),
        (("validate", "nowhere.yaml"), 1),
        (("convert", "nowhere.json", "out.jsonl"), 1),
    ],
)
def test_what_is_not_there_is_one_line(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unexpected" not in error


def test_rows_without_a_tokenizer_are_wrong_usage(chats, capsys):
    assert main(["data", "validate", str(chats), "--seq-len", "8"]) == 2
    assert "--model or --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("action", [("validate", "a"), ("convert", "a", "b")])
def test_no_action_hides_debug(action):
    assert build_parser().parse_args(["data", *action, "--debug"]).debug
