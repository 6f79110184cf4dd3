"""Whole runs on a tiny model: what they write, and that stopping and going on changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import ministral_jax
from infer.sampling import SamplingParams
from ministral_jax.errors import ConfigError, MinistralError
from ministral_jax.lora import LoraConfig
from tests.checkpoint_files import tiny_config
from train.config import CheckpointConfig, EvalConfig, RunConfig, SamplesConfig
from train.data.config import DataConfig
from train.loop import Loop
from train.memory_estimate import MemoryEstimate, require_fits
from train.metrics import EVAL_FILE, SAMPLES_FILE, TRAIN_FILE, MetricsFile, step_flops
from train.objective import PreferenceConfig
from train.optimizer import OptimizerConfig
from train.run import FINAL, RunResult, run
from train.run_folder import Checkpoint

from .event_files import scalars
from .test_step import batch_of
from .tiny_run import learned, rows, write_base

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


def config_of(base: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Dropout and microbatches, so that each step depends on the run's key and on the order of its rows."""
    config = RunConfig(
        model=str(base),
        run_dir=str(run_dir),
        data=DataConfig(instruct_data=str(base / "chats.jsonl")),
        lora=LoraConfig(rank=4, dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=0.03, steps=STEPS),
        seq_len=32,
        batch_size=4,
        num_microbatches=2,
        checkpoints=CheckpointConfig(every=2, keep=2),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, evaluated on the way."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    evaluated = config_of(
        base,
        folder,
        eval_data=str(base / "chats.jsonl"),
        eval=EvalConfig(every=3),
        samples=SamplesConfig(every=4, prompts=("the 0", "the 10, and more"), max_tokens=8),
        tensorboard=True,
    )
    assert run(evaluated) == RunResult(STEPS, folder / FINAL)
    return folder


def stopped_after(step: int, config: RunConfig, number: int = signal.SIGTERM, **options: Any) -> RunResult:
    """A run that gets a signal when it tells of a step: it ends after the next."""

    def report(row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), number)

    return run(config, report=report, **options)


def assert_same_adapter(one: Path, other: Path) -> None:
    assert (one / FINAL / "lora.safetensors").read_bytes() == (other / FINAL / "lora.safetensors").read_bytes()


def test_the_loss_falls_and_the_adapter_changes_what_the_base_computes(base: Path, whole: Path) -> None:
    losses = [row["loss"] for row in rows(whole)]
    assert [row["step"] for row in rows(whole)] == list(range(1, STEPS + 1))
    assert losses[-1] < 0.8 * losses[0]
    tokens = jnp.arange(8)[None] + 60
    adapted = ministral_jax.load(base, adapter=whole / FINAL)(tokens)
    assert float(jnp.abs(adapted - ministral_jax.load(base)(tokens)).max()) > 0.1
    assert {array.dtype for array in load_file(whole / FINAL / "lora.safetensors").values()} == {np.dtype("float32")}


def test_evaluation_tells_loss_and_perplexity_in_nats(whole: Path) -> None:
    evaluated = rows(whole, EVAL_FILE)
    assert [row["step"] for row in evaluated] == [3, STEPS]
    assert evaluated[1]["loss"] < evaluated[0]["loss"]
    for row in evaluated:
        np.testing.assert_allclose(row["perplexity"], np.exp(row["loss"]), rtol=1e-6)


def test_tensorboard_shows_what_the_files_have(whole: Path) -> None:
    shown = scalars(whole / "tb")
    for tag, file, column in (("train/loss", TRAIN_FILE, "loss"), ("eval/perplexity", EVAL_FILE, "perplexity")):
        told = [(row["step"], row[column]) for row in rows(whole, file)]
        assert [step for step, _ in shown[tag]] == [step for step, _ in told]
        np.testing.assert_allclose([value for _, value in shown[tag]], [value for _, value in told], rtol=1e-6)


def test_the_last_checkpoints_are_kept(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


def test_samples_are_what_the_adapted_model_generates(base: Path, whole: Path) -> None:
    """Computed otherwise: by a generator with pages, after the run."""
    told = rows(whole, SAMPLES_FILE)
    assert [(row["step"], row["prompt"]) for row in told] == [
        (step, prompt) for step in (4, STEPS) for prompt in ("the 0", "the 10, and more")
    ]
    tokenizer = ministral_jax.Tokenizer.load(base)
    generator = ministral_jax.Generator(ministral_jax.load(base, adapter=whole / FINAL), tokenizer)
    prompts = [list(tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}]).tokens) for row in told[2:]]
    expected = generator.generate(prompts, SamplingParams(max_tokens=8))
    assert [row["text"] for row in told[2:]] == [tokenizer.decode(answer.ids, keep_special=True) for answer in expected]
    assert [row["text"] for row in told[:2]] != [row["text"] for row in told[2:]]


@pytest.mark.long
def test_a_signal_in_the_last_step_ends_a_run_as_none_does(base: Path, whole: Path, tmp_path: Path) -> None:
    """Evaluated, sampled and exported."""
    samples = SamplesConfig(prompts=("the 0",), max_tokens=8)
    config = config_of(base, tmp_path / "run", eval_data=str(base / "chats.jsonl"), samples=samples)
    assert stopped_after(STEPS - 1, config) == RunResult(STEPS, tmp_path / "run" / FINAL)
    assert rows(tmp_path / "run", EVAL_FILE) == rows(whole, EVAL_FILE)[-1:]
    assert rows(tmp_path / "run", SAMPLES_FILE)[0] == rows(whole, SAMPLES_FILE)[2]
    assert Checkpoint.read(tmp_path / "run/checkpoints/step_000006").eval_loss == rows(whole, EVAL_FILE)[-1]["loss"]


@pytest.mark.long
def test_data_that_fails_is_told_after_what_was_learned_is_saved(base: Path, tmp_path: Path) -> None:
    """Its checkpoint is the start of a run that ends as one in which nothing failed."""
    config, failing = config_of(base, tmp_path / "run", checkpoints=CheckpointConfig()), [3]

    def following(loop: Loop, number: int) -> Any:
        if number in failing:
            raise MinistralError("the data is gone")
        return original(loop, number)

    original = Loop._next
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_next", following)
        with pytest.raises(MinistralError, match="the data is gone"):
            run(config)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000003"]
    assert run(config, resume=True).step == STEPS


@pytest.mark.long
def test_a_run_learns_from_preferences_and_goes_on_as_if_nothing_had_been(base: Path, tmp_path: Path) -> None:
    def config(folder: str) -> RunConfig:
        pairs = str(base / "pairs.jsonl")
        return config_of(
            base,
            tmp_path / folder,
            data=DataConfig(preference_data=pairs),
            eval_data=pairs,
            preference=PreferenceConfig(beta=0.5),
            checkpoints=CheckpointConfig(every=2),
        )

    assert run(config("whole")).step == STEPS
    told, evaluated = rows(tmp_path / "whole"), rows(tmp_path / "whole", EVAL_FILE)
    assert told[0]["accuracy"] == 0  # nothing is learned yet
    assert told[-1]["chosen_reward"] > told[-1]["rejected_reward"]
    assert evaluated[-1]["accuracy"] > 0.8
    assert evaluated[-1]["pairs"] == 24
    assert "perplexity" not in evaluated[-1]
    stopped_after(3, config("stopped"))
    run(config("stopped"), resume=True)
    assert learned(tmp_path / "stopped") == learned(tmp_path / "whole")
    assert_same_adapter(tmp_path / "stopped", tmp_path / "whole")


def test_samples_that_leave_no_room_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path / "run", samples=SamplesConfig(prompts=("the",), max_tokens=64))
    with pytest.raises(ConfigError, match=r"samples: a prompt of .* and max_tokens=64 are more than .* context of 64"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(base: Path, whole: Path, tmp_path: Path) -> None:
    """Also where it had told of steps that no checkpoint has, as a killed one may."""
    config = config_of(base, tmp_path / "run", tensorboard=True)
    assert stopped_after(2, config) == RunResult(3, None, signal.SIGTERM)
    with (tmp_path / "run" / TRAIN_FILE).open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.0}) + '\n{"step": 5, "lo')
    (tmp_path / "run" / "checkpoints" / "step_000005.partial").mkdir()
    assert run(config, resume=True).result == tmp_path / "run" / FINAL
    assert learned(tmp_path / "run") == learned(whole)
    assert scalars(tmp_path / "run/tb")["train/loss"] == scalars(whole / "tb")["train/loss"]
    assert_same_adapter(tmp_path / "run", whole)


@pytest.mark.long
def test_a_run_goes_on_over_another_mesh(base: Path, whole: Path, tmp_path: Path) -> None:
    """The same batches in the same order, and losses to rounding; dropout is the same too."""
    config = config_of(base, tmp_path / "run")
    stopped_after(2, config)
    run(dataclasses.replace(config, mesh="fsdp=4,tensor=2"), resume=True)
    np.testing.assert_allclose(learned(tmp_path / "run"), learned(whole), rtol=1e-5)
    assert [row["tokens"] for row in rows(tmp_path / "run")] == [row["tokens"] for row in rows(whole)]


def test_a_run_that_exists_or_was_another_is_refused(base: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; --resume goes on with it"):
        run(config_of(base, whole))
    with pytest.raises(ConfigError, match=r"seed: 1, but .* has 0; a run with other values"):
        run(config_of(base, whole, seed=1), resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"no config\.yaml, so it is no run"):
        run(config_of(base, tmp_path), resume=True)
    with pytest.raises(ConfigError, match="seq_len: 65, expected at most 64"):
        run(config_of(base, tmp_path / "new", seq_len=65))
    assert not (tmp_path / "new").exists()


def test_a_step_that_cannot_fit_is_refused_with_numbers() -> None:
    needed = MemoryEstimate(weights=16 * 2**30, trained=2**30, moments=2**31, temporary=6 * 2**30)
    require_fits(needed, 25 * 2**30)
    require_fits(needed, None)
    with pytest.raises(ConfigError, match=r"needs 25\.00 GiB .*weights 16\.00.* and there are 24\.00 GiB"):
        require_fits(needed, 24 * 2**30)


def test_operations_are_counted_by_what_a_token_sees() -> None:
    """By loops over the layers' products, tokens and keys."""
    model, batch = tiny_config("ministral"), batch_of(rows=2)
    matrices = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96  # wq, wo; wk, wv; the feed-forward
    expected = 4 * batch.tokens.size * (4 * matrices + 128 * 64)
    for window in model.windows:
        for position in batch.positions.flat:
            keys = [key for key in range(position + 1) if window is None or key > position - window]
            expected += 12 * 4 * 16 * len(keys)
    assert step_flops(model, batch, full=False) == expected
    assert step_flops(model, batch, full=False, reference=True) > 1.3 * expected


def test_rows_past_a_step_are_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        file.add({"step": step, "loss": float("nan")})
    file.cut_after(2)
    assert list(file.rows()) == [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
