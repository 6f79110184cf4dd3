"""What a run leaves to others: all weights of a model, with what was not trained beside them."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ministral_jax.checkpoints.load import load_model, load_vision
from ministral_jax.config_files import Layout
from tests.architecture_files import VISION, make, write_example
from tests.checkpoint_files import tiny_config
from tests.tekken_files import write_tiny_tekken
from train.config import RunConfig
from train.data.config import DataConfig
from train.export import export
from train.optimizer import Optimizer, OptimizerConfig
from train.step import TrainStep, trained_specs


@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "images"])
def test_all_weights_are_written_with_the_tower_that_was_not_trained(
    layout: Layout, sees: bool, tmp_path: Path
) -> None:
    """Before the first step: every tensor is that of the base, by name, dtype and value."""
    config = tiny_config("ministral3", n_layers=3, vision=VISION if sees else None)
    base, result = tmp_path / "base", tmp_path / "result"
    written = write_example(base, make(config), layout)
    write_tiny_tekken(base)
    model = load_model(base, stacked=True)
    optimizer = OptimizerConfig(learning_rate=1e-4, steps=1)
    step = TrainStep(model, Optimizer(optimizer, trained_specs(model)))
    run = RunConfig(model=str(base), run_dir="unused", data=DataConfig(), lora=None, optimizer=optimizer)
    export(result, step, step.initial_state(model, jax.random.key(0)), base, run)
    found = load_file(next(result.glob("*.safetensors")))
    assert found.keys() == written.keys()
    for name, array in written.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].view(np.uint16), array.view(np.uint16), err_msg=name)
    assert (result / "tekken.json").read_bytes() == (base / "tekken.json").read_bytes()
    again = load_model(result)
    assert (again.config.vision is not None) == sees
    assert bool(load_vision(base)) == sees
