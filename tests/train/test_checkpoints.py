"""A run's state survives the disk, and goes on from there on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ministral_jax.errors import CheckpointError
from ministral_jax.sharding.layout import Layout, layout_for
from ministral_jax.sharding.meshes import make_mesh
from tests.checkpoint_files import tiny_config
from train.checkpoints import StateWriter, restore_state
from train.step import TrainState, TrainStep

from .test_step import batch_of, in_microbatches, model_of, stepper

MESHES = (None, "fsdp=4,tensor=2", "data=2,tensor=2")


def begun(mesh: str | None) -> tuple[TrainStep, TrainState]:
    """A step and a state that has taken one, on a mesh or on one device."""
    layout: Layout | None = None
    if mesh is not None:
        layout = layout_for(tiny_config("ministral3", n_layers=2, windows=(5, 5)), make_mesh(mesh))
    model = model_of(rank=4, layout=layout)
    step = stepper(model)
    state, _ = step(step.initial_state(model, jax.random.key(1)), in_microbatches(batch_of(), 1))
    return step, state


def save_state(folder: Path, state: TrainState) -> None:
    writer = StateWriter()
    try:
        writer.begin(folder, state)
        writer.wait()
    finally:
        writer.close()


def assert_same(found: TrainState, expected: TrainState) -> None:
    """Values, bit for bit; keys by their numbers."""
    for one, other in ((found.trained, expected.trained), (found.moments, expected.moments)):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))
    assert int(found.step) == int(expected.step) == 1
    np.testing.assert_array_equal(jax.random.key_data(found.key), jax.random.key_data(expected.key))


def test_a_state_is_restored_bit_for_bit(tmp_path: Path) -> None:
    step, state = begun(None)
    save_state(tmp_path / "1", state)
    fresh = step.initial_state(model_of(rank=4), jax.random.key(9))
    assert_same(restore_state(tmp_path / "1", fresh), state)


def test_a_state_that_is_being_written_may_be_used_up_by_the_next_steps(tmp_path: Path) -> None:
    """What is on the disk in the end is the state as it was."""
    step, state = begun(None)
    before = jax.tree.map(lambda array: np.array(array), (state.trained, state.moments))
    writer = StateWriter()
    assert writer.idle
    writer.begin(tmp_path / "1", state)
    for _ in range(3):
        state, _ = step(state, in_microbatches(batch_of(), 1))
    writer.begin(tmp_path / "4", state)  # waits for the first
    writer.wait()
    assert writer.idle
    writer.close()
    first = restore_state(tmp_path / "1", state)
    jax.tree.map(np.testing.assert_array_equal, (first.trained, first.moments), before)
    assert (int(first.step), int(restore_state(tmp_path / "4", state).step)) == (1, 4)


class Interrupted:
    """What is being written, when Ctrl-C ends the waiting for it."""

    def result(self) -> None:
        raise KeyboardInterrupt

    def done(self) -> bool:
        return False


def test_an_interrupted_wait_does_not_take_a_state_for_written() -> None:
    """Else a checkpoint could get its name half-written."""
    writer: Any = StateWriter()
    writer._written = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        writer.wait()
    assert not writer.idle
    writer.close()


class FullDisk:
    """A checkpointer that fails in the background."""

    def save(self, *_: Any) -> None: ...

    def wait_until_finished(self) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None: ...


def test_what_keeps_a_state_from_the_disk_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    _, state = begun(None)
    writer: Any = StateWriter()
    writer._checkpointer.close()
    writer._checkpointer = FullDisk()
    writer.begin(tmp_path / "1", state)
    with pytest.raises(CheckpointError, match=r"1: cannot be written: .*No space left"):
        writer.begin(tmp_path / "2", state)
    writer.begin(tmp_path / "2", state)
    with pytest.raises(CheckpointError, match=r"2: cannot be written: .*No space left"):
        writer.wait()
    writer.close()


@pytest.mark.long
@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("source", MESHES)
def test_a_state_is_restored_on_another_mesh_and_goes_on_as_before(
    source: str | None, target: str | None, tmp_path: Path
) -> None:
    step, state = begun(source)
    save_state(tmp_path / "1", state)
    other_step, other = begun(target)
    restored = restore_state(tmp_path / "1", other)
    assert_same(restored, state)
    for name, array in restored.trained.items():
        assert array.sharding.is_equivalent_to(other.trained[name].sharding, array.ndim), name
    batch = in_microbatches(batch_of(seed=1), 1)
    _, metrics = other_step(restored, batch)
    _, expected = step(state, batch)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)


def test_what_is_no_checkpoint_of_this_run_is_refused_in_one_line(tmp_path: Path) -> None:
    _, state = begun(None)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        restore_state(tmp_path / "1", state)
    save_state(tmp_path / "1", state)
    with pytest.raises(CheckpointError, match="exists: expected a new folder"):
        save_state(tmp_path / "1", state)
    wider = model_of(rank=5)
    with pytest.raises(
        CheckpointError, match=r"cannot be restored as this run's state: .* is float32\[.*\] there, float32\[.*\] here"
    ) as caught:
        restore_state(tmp_path / "1", stepper(wider).initial_state(wider, jax.random.key(1)))
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore_state(tmp_path / "empty", state)
