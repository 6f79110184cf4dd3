"""Whole runs of other kinds than LoRA on a dense base: quantised bases, every weight, files of mistral-finetune."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import ministral_jax
from ministral_jax.checkpoints.conversion.quantize import quantize
from ministral_jax.linear import projections
from ministral_jax.lora import adapted
from ministral_jax.parameters import parameters
from ministral_jax.quantization import LinearFormat
from train.config import RunConfig, read_run_config
from train.metrics import EVAL_FILE
from train.optimizer import OptimizerConfig
from train.run import FINAL, run

from .test_run import STEPS, base, config_of, learned, rows, stopped_after

__all__ = ["base"]  # a fixture

TOKENS = jnp.arange(24)[None] * 7 % 300
STORED = {
    "nf4": LinearFormat("nf4", double=True),
    # Activations are rounded too, as `ministral quantize --format int8` has it.
    "int8": LinearFormat("int8_channel", "dynamic"),
}


def quantised(base: Path, folder: Path, kind: str) -> Path:
    """The base with its projections in fewer bits, and the conversations beside it."""
    quantize(base, folder / kind, stored=STORED[kind])
    return folder / kind


def runs(config: RunConfig, parent: Path) -> tuple[Path, Path]:
    """The folders of one that nothing interrupted, and of one that was stopped and gone on with."""
    whole, stopped = (dataclasses.replace(config, run_dir=str(parent / name)) for name in ("whole", "stopped"))
    assert run(whole).step == STEPS
    stopped_after(2, stopped)
    assert run(stopped, resume=True).step == STEPS
    return parent / "whole", parent / "stopped"


def assert_same_result(one: Path, other: Path) -> None:
    """Losses, gradients and every byte of what was written in the end."""
    assert learned(one) == learned(other)
    for file in (one / FINAL).iterdir():
        assert file.read_bytes() == (other / FINAL / file.name).read_bytes(), file.name


def assert_learns(folder: Path, share: float = 0.9) -> None:
    losses = [row["loss"] for row in rows(folder)]
    assert losses[-1] < share * losses[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", STORED)
def test_adapters_learn_over_a_quantised_base_and_load_on_it(base: Path, tmp_path: Path, kind: str) -> None:
    few_bits = quantised(base, tmp_path, kind)
    config = config_of(base, tmp_path, model=str(few_bits), num_microbatches=1, remat="none")  # the quickest to compile
    whole, stopped = runs(config, tmp_path)
    assert_learns(whole)
    assert_same_result(whole, stopped)
    model = ministral_jax.load(few_bits, adapter=whole / FINAL)
    assert {linear.stored for linear in projections(model).values()} == {STORED[kind]}
    assert len(adapted(model)) == len(projections(model))
    plain = ministral_jax.load(few_bits)(TOKENS)
    assert float(jnp.abs(model(TOKENS) - plain).max()) > 0.1
    # The dense base is not what the adapter was trained on.
    assert float(jnp.abs(ministral_jax.load(base, adapter=whole / FINAL)(TOKENS) - model(TOKENS)).max()) > 1e-3


@pytest.mark.long
def test_every_weight_learns_and_what_is_written_is_the_last_state(base: Path, tmp_path: Path) -> None:
    slow = OptimizerConfig(learning_rate=0.003, steps=STEPS)
    config = config_of(base, tmp_path, lora=None, num_microbatches=1, optimizer=slow)
    whole, stopped = runs(config, tmp_path)
    assert_learns(whole)
    assert_same_result(whole, stopped)
    before, after = (load_file(folder / "consolidated.safetensors") for folder in (base, whole / FINAL))
    assert after.keys() == before.keys()
    assert all(np.any(after[name] != before[name]) for name in before)
    assert ministral_jax.Tokenizer.load(whole / FINAL).vocabulary_size > 0
    found = parameters(ministral_jax.load(whole / FINAL))
    for name, array in last_state(config, whole).items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def last_state(config: RunConfig, folder: Path) -> dict[str, np.ndarray]:
    """Every weight in the last checkpoint, under a checkpoint's names: read by orbax alone, without a model."""
    import orbax.checkpoint as ocp

    from ministral_jax.config_files import read_config
    from ministral_jax.stacked import Unstacked, pattern

    state = folder / "checkpoints" / f"step_{STEPS:06d}" / "state"
    tree: Any = ocp.StandardCheckpointer().restore(state.absolute())
    found = Unstacked(tree["trained"], pattern(read_config(Path(config.model))))
    return {name: np.asarray(found[name]) for name in found}


@pytest.mark.long
@pytest.mark.parametrize("enable", [True, False], ids=["adapters", "all weights"])
def test_a_file_of_mistral_finetune_runs_from_its_yaml_to_the_result(base: Path, tmp_path: Path, enable: bool) -> None:
    """Its example's keys, with text and conversations together, evaluated on the way."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "the thing " * 20}) + "\n" for _ in range(8)))
    document = {
        "data": {
            "data": f"{tmp_path / 'text.jsonl'}:0.3",
            "instruct_data": f"{base / 'chats.jsonl'}:0.7",
            "eval_instruct_data": str(base / "chats.jsonl"),
        },
        "model_id_or_path": str(base),
        "run_dir": str(tmp_path / "run"),
        "lora": {"enable": enable, "rank": 4},
        "seq_len": 32,
        "batch_size": 2,
        "num_microbatches": 2,
        "max_steps": 8,
        "optim": {"lr": 0.02 if enable else 0.003, "weight_decay": 0.1, "pct_start": 0.2},
        "seed": 0,
        "log_freq": 1,
        "eval_freq": 4,
        "no_eval": False,
        "ckpt_freq": 4,
        "save_adapters": True,
        "wandb": {"project": None, "offline": True},
    }
    file = tmp_path / "7B.yaml"
    file.write_text(yaml.safe_dump(document))
    config, notes = read_run_config(file)
    assert any(note.startswith("wandb.project: names none") for note in notes)
    result = run(config)
    assert result.step == 8
    assert [row["step"] for row in rows(tmp_path / "run", EVAL_FILE)] == [4, 8]
    evaluated = [row["loss"] for row in rows(tmp_path / "run", EVAL_FILE)]
    assert evaluated[1] < evaluated[0]
    rates = [row["learning_rate"] for row in rows(tmp_path / "run")]
    assert max(rates) == pytest.approx(document["optim"]["lr"], rel=0.2)
    assert rates[-1] < rates[0] < max(rates)
    loaded = ministral_jax.load(base, adapter=result.result) if enable else ministral_jax.load(tmp_path / "run" / FINAL)
    assert bool(jnp.isfinite(loaded(TOKENS)).all())
    assert float(jnp.abs(loaded(TOKENS) - ministral_jax.load(base)(TOKENS)).max()) > 0.1
