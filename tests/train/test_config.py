"""The configuration of a run: what a file may say, what is refused, and mistral-finetune's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ministral_jax.errors import MinistralError
from ministral_jax.lora import LoraConfig
from train.config import CheckpointConfig, EvalConfig, RunConfig, WandbConfig, read_run_config, run_config
from train.data.config import DataConfig
from train.objective import PreferenceConfig
from train.optimizer import OptimizerConfig, compat_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
OURS: dict[str, Any] = {"model": "m", "run_dir": "r", "data": {"instruct_data": "a.jsonl"}, "max_steps": 5}

PAIRS: dict[str, Any] = {"data": {"preference_data": "p.jsonl", "eval_preference_data": "e.jsonl"}}
WANDB = {"tensorboard": True, "wandb": {"project": "p", "offline": True}}

# The file that mistral-finetune gives as its example, with every other key it knows.
THEIRS = """
data:
  instruct_data: "chats.jsonl"
  data: ""
  eval_instruct_data: "eval.jsonl"
model_id_or_path: "/models/7B"
lora:
  rank: 64
seq_len: 32768
batch_size: 2
max_steps: 300
optim:
  lr: 6.e-5
  weight_decay: 0.1
  pct_start: 0.05
seed: 7
log_freq: 2
eval_freq: 100
no_eval: False
ckpt_freq: 50
num_ckpt_keep: 4
num_microbatches: 3
max_norm: 0.5
checkpoint: false
save_adapters: False
run_dir: "/runs/1"
wandb:
  project: "tuning"
  run_name: ""
  key: "secret"
  offline: True
mlflow: {tracking_uri: null}
"""


def read(tmp_path: Path, text: str, *settings: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return read_run_config(tmp_path / "run.yaml", settings).config


def test_a_file_becomes_the_configuration_with_the_settings_in_place_of_its_own(tmp_path: Path) -> None:
    text = yaml.safe_dump(OURS | {"lora": {"rank": 4, "alpha": 8}, "optimizer": {"learning_rate": 1e-3}})
    settings = ("lora.rank=8", "optimizer.learning_rate=1e-4", "eval.every=2", "lora.targets=[q_proj, wo]", "mesh=auto")
    assert read(tmp_path, text, *settings) == RunConfig(
        model="m",
        run_dir="r",
        data=DataConfig(instruct_data="a.jsonl"),
        lora=LoraConfig(rank=8, alpha=8, targets=("wq", "wo")),
        optimizer=OptimizerConfig(learning_rate=1e-4, steps=5),
        eval=EvalConfig(every=2),
        mesh="auto",
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"full": True},
        {"lora": {"rank_pattern": {"wq": 3}}, "eval": {"batches": 2}},
        PAIRS | {"preference": {"label_smoothing": 0.1}, "samples": {"prompts": ["Hello"]}},
        WANDB,
    ],
)
def test_the_resolved_configuration_is_read_back_the_same(more: dict[str, Any]) -> None:
    config = run_config(OURS | more).config
    assert run_config(yaml.safe_load(yaml.safe_dump(config.document()))).config == config
    assert (config.lora is None) == ("full" in more)


def test_wandb_is_left_out_where_their_file_names_no_project() -> None:
    theirs = {"model_id_or_path": "m", "run_dir": "r"}
    for wandb in ({"project": ""}, {"project": None, "offline": True}):
        config, notes = run_config(theirs | {"wandb": wandb})
        assert config.wandb is None
        assert any(note.startswith("wandb.project: names none") for note in notes)
    assert not any("wandb" in note for note in run_config(theirs).notes)
    config = run_config(theirs | {"wandb": {"project": "p", "run_name": "n"}, "tensorboard": True}).config
    assert (config.wandb, config.tensorboard) == (WandbConfig("p", "n"), True)
    with pytest.raises(MinistralError, match=r"wandb\.name: unknown key"):
        run_config(theirs | {"wandb": {"name": "p"}})


def test_a_prompt_is_taken_as_it_stands_and_targets_are_names(tmp_path: Path) -> None:
    settings = ("samples.prompts='Why, and how?\n'", "lora.targets=q_proj, wo")
    config = read(tmp_path, yaml.safe_dump(OURS), *settings)
    assert config.samples.prompts == ("Why, and how? ",)  # a line's end in YAML's quotes is a space
    assert config.lora is not None
    assert config.lora.targets == ("wq", "wo")


def test_data_of_pairs_is_learned_from_as_preferences() -> None:
    config = run_config(OURS | PAIRS).config
    assert config.preference == PreferenceConfig()
    assert config.evaluation == DataConfig(preference_data="e.jsonl").for_evaluation()
    assert run_config(OURS).config.preference is None


def test_mistral_finetunes_file_runs_by_its_rules(tmp_path: Path) -> None:
    config = read(tmp_path, THEIRS)
    rules = {"packing": "mistral-finetune", "tools_trained": "last"}
    assert config == RunConfig(
        model="/models/7B",
        run_dir="/runs/1",
        data=DataConfig(instruct_data="chats.jsonl", tool_prefixes=True, **rules),
        eval_data="eval.jsonl",
        lora=LoraConfig(rank=64, scaling=2.0),
        optimizer=compat_config(learning_rate=6e-5, steps=300, weight_decay=0.1, warmup_share=0.05, clip_norm=0.5),
        seq_len=32768,
        batch_size=2,
        batch_per_device=True,
        rows_per_mean=2,
        num_microbatches=3,
        eval=EvalConfig(every=100),
        checkpoints=CheckpointConfig(every=50, keep=4, best=False),
        log_every=2,
        wandb=WandbConfig(project="tuning", offline=True),
        seed=7,
        remat="none",
    )
    assert run_config(config.document()).config == config


def test_what_means_nothing_or_differs_is_said_once() -> None:
    notes = run_config(yaml.safe_load(THEIRS)).notes
    assert len(notes) == len(set(notes))
    for start in ("read as a file of mistral-finetune", "wandb.key:", "mlflow:", "save_adapters:"):
        assert sum(note.startswith(start) for note in notes) == 1
    assert run_config(OURS).notes == []


def test_its_defaults_are_its_own() -> None:
    config = run_config({"model_id_or_path": "m", "run_dir": "r", "data": {"eval_instruct_data": "e"}}).config
    assert (config.max_steps, config.optimizer.learning_rate, config.optimizer.weight_decay) == (100, 1e-4, 0.1)
    assert (config.seq_len, config.batch_size, config.lora) == (2048, 1, LoraConfig(rank=16, scaling=2.0))
    assert config.evaluation is None  # no_eval is true there
    assert run_config({"model_id_or_path": "m", "run_dir": "r", "lora": {"enable": False}}).config.lora is None


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"batchsize": 3}, "batchsize: unknown key; the nearest is batch_size"),
        ({"lora": {"rnak": 3}}, "lora.rnak: unknown key; the nearest is lora.rank"),
        ({"optimizer": {"lr": 3}}, "optimizer.lr: unknown key; the nearest is optimizer."),
        ({"data": {"instruct": {}}}, "data.instruct: unknown key; the nearest is data.instruct_data"),
        ({"eval": {"evry": 1}}, "eval.evry: unknown key; the nearest is eval.every"),
        ({"model_id_or_path": "m", "optim": {"learning_rate": 1}}, "unknown key; the nearest is"),
        ({"seq_len": "long"}, "seq_len: 'long', expected a whole number"),
        ({"seq_len": 0}, "seq_len: 0, expected a whole number of at least 1"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: 'fast', expected a number"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate=-1.0 is not allowed"),
        ({"lora": {"rank": 0}}, "lora.rank=0: expected"),
        ({"lora": 3}, "lora: 3, expected keys with values"),
        ({"remat": "some"}, "remat: 'some', expected one of"),
        ({"full": True, "lora": {"rank": 3}}, "lora: full: true trains every weight"),
        ({"max_steps": None}, "max_steps: missing"),
        ({"model": None}, "model: None, expected text"),
        (PAIRS | {"full": True}, "preference: the reference is the model without adapters, so full: true"),
        (PAIRS | {"preference": {"beta": 0}}, "preference.beta: 0.0, expected a number above 0"),
        (PAIRS | {"rows_per_mean": 1}, "rows_per_mean: has no meaning with preference"),
        ({"preference": {"beta": 1}}, "preference: learns from data.preference_data alone"),
        ({"data": {"preference_data": "p", "data": "t"}}, "preference: learns from data.preference_data alone"),
        ({"data": {"instruct_data": "a", "eval_preference_data": "e"}}, "data.eval_preference_data: is not what this"),
        ({"data": {"preference_data": "p", "eval_instruct_data": "e"}}, "data.eval_instruct_data: is not what this"),
        ({"samples": {"max_tokens": 0}}, "samples.max_tokens: 0, expected a whole number of at least 1"),
        ({"samples": {"prompts": [""]}}, "samples.prompts: one is empty"),
        ({"samples": {"every": 5}}, "samples.every: 5, but samples.prompts has none"),
        ({"tensorboard": "yes"}, "tensorboard: 'yes', expected true or false"),
        ({"wandb": {}}, "wandb.project: missing"),
        ({"wandb": {"project": ""}}, "wandb.project: empty, expected the name"),
        ({"wandb": {"project": "p", "key": "secret"}}, "wandb.key: unknown key; the nearest is wandb."),
    ],
)
def test_what_is_unknown_or_not_allowed_is_refused_in_one_line(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(MinistralError, match=r".") as caught:
        run_config(OURS | more)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_and_a_bad_setting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MinistralError, match="run_dir: missing"):
        run_config({"model": "m", "max_steps": 1})
    for setting in ("lora.rank", "=3", "lora..rank=3", "model.x=1", "lora.rank=[", "lora.rnk=1"):
        with pytest.raises(MinistralError):
            read(tmp_path, yaml.safe_dump(OURS), setting)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_configuration(path: Path) -> None:
    config, notes = read_run_config(path)
    assert notes == []
    assert config.lora is not None
    assert config.evaluation is not None


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 5
