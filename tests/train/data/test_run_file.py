"""The data section of a run's YAML file, ours and mistral-finetune's."""

import pytest

from ministral_jax.errors import MinistralError
from train.data.config import DataConfig
from train.data.run_file import RunFile, read_run_file


def read(tmp_path, text: str) -> RunFile:
    (tmp_path / "run.yaml").write_text(text)
    return read_run_file(tmp_path / "run.yaml")


THEIRS = """
data:
  instruct_data: "a.jsonl:2,b/"
  data: ""
  eval_instruct_data: "c.jsonl"
model_id_or_path: /models/7B
lora: {rank: 64}
seq_len: 32768
batch_size: 2
num_microbatches: 4
max_steps: 300
"""


def test_mistral_finetunes_file_selects_its_rules(tmp_path):
    file = read(tmp_path, THEIRS)
    rules = {"packing": "mistral-finetune", "tools_trained": "last"}
    assert file.config == DataConfig(instruct_data="a.jsonl:2,b/", tool_prefixes=True, **rules)
    assert file.evaluation == DataConfig(instruct_data="c.jsonl", shuffle=False, epochs=1, **rules)
    assert (file.seq_len, file.rows_per_step, file.max_steps, file.model) == (32768, 8, 300, "/models/7B")


def test_its_switches_are_read(tmp_path):
    file = read(tmp_path, "model_id_or_path: m\ndata: {instruct_data: a, instruct: {dynamic_chunk_fn_call: false}}")
    assert (file.config.shuffle, file.config.tool_prefixes) == (True, False)
    file = read(tmp_path, "model_id_or_path: m\ndata: {instruct_data: a, instruct: {shuffle: false}}")
    assert (file.config.shuffle, file.config.tool_prefixes) == (False, False)


def test_our_file_takes_the_fields_of_the_config(tmp_path):
    file = read(tmp_path, "model: m\ndata: {data: t.jsonl, packing: none, epochs: 2}\n")
    assert file.config == DataConfig(data="t.jsonl", packing="none", epochs=2)
    assert (file.evaluation, file.seq_len, file.rows_per_step, file.max_steps) == (None, None, 1, None)


def test_pairs_are_two_rows_each(tmp_path):
    file = read(tmp_path, "data: {preference_data: p, eval_preference_data: e}\nbatch_size: 3\nnum_microbatches: 2\n")
    assert file.rows_per_step == 12
    assert file.evaluation == DataConfig(preference_data="e").for_evaluation()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data: {instruct_dta: a}", "data.instruct_dta: unknown"),
        ("data: {instruct: {shuffle: true}}", "data.instruct: unknown"),
        ("data: 3", "data: int, expected keys"),
        ("data: {instruct_data: [a]}", "data.instruct_data"),
        ("data: {packing: best}", "data.packing: 'best'"),
        ("model_id_or_path: m\ndata: {instruct: {shuffle: 2}}", "data.instruct.shuffle: 2"),
        ("seq_len: long", "seq_len: 'long'"),
        ("batch_size: true", "batch_size: True"),
        ("- a", "list, expected keys"),
        ("{a: ]", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, reason):
    with pytest.raises(MinistralError, match=reason):
        read(tmp_path, text)
