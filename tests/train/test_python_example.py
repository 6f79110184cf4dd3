"""examples/finetune_instruct.py on the bundled model, with fewer and smaller steps than it takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ministral_jax.cli.demo import BUNDLED_MODEL
from train.config import run_config

HOME = Path(__file__).parents[2]


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_instruct", HOME / "examples" / "finetune_instruct.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_configuration_is_one_that_a_file_could_have(example: ModuleType) -> None:
    config = example.configuration("m", "chats.jsonl", "runs/1")
    assert run_config(config.document()).config == config


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Puts back what the example changes in logging."""
    root, train = logging.getLogger(), logging.getLogger("train")
    handlers, level = root.handlers[:], train.level
    yield
    root.handlers[:] = handlers
    train.setLevel(level)


@pytest.mark.long
@pytest.mark.usefixtures("own_logging")
def test_it_trains_and_answers_before_and_after(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": example.QUESTION}, {"role": "assistant", "content": "12"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    monkeypatch.setattr(example, "STEPS", 30)
    whole = example.configuration

    def small(*names: str) -> Any:
        config = whole(*names)
        return dataclasses.replace(
            config, seq_len=64, optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-3)
        )

    monkeypatch.setattr(example, "configuration", small)
    monkeypatch.setattr(
        sys, "argv", ["finetune_instruct.py", str(BUNDLED_MODEL), str(tmp_path / "chats.jsonl"), str(tmp_path / "run")]
    )
    example.main()
    told, logged = capsys.readouterr()
    assert "training 233,472 parameters, of adapters\n" in logged
    assert "step 30/30  loss" in told
    assert told.splitlines()[-1] == "after:  12"
    assert told.splitlines()[-2] != "before: 12"
