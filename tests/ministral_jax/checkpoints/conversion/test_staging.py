"""Between runs of one conversion: what a run that was cut off leaves, and when the next may go on with it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ministral_jax.checkpoints import safetensors_writer
from ministral_jax.checkpoints.conversion import convert as module
from ministral_jax.checkpoints.conversion import staging
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.staging import Staging
from ministral_jax.errors import CheckpointError, MinistralError
from tests.architecture_files import EXAMPLES, hf_tensors, write_example
from tests.ministral_jax.checkpoints.conversion.test_convert import WEIGHTS, assert_same_tensors, tensors_of


@pytest.fixture
def source(tmp_path) -> Path:
    write_example(tmp_path / "a", EXAMPLES["ministral"](), "mistral")
    return tmp_path / "a"


def interrupted(source: Path, target: Path, monkeypatch, **options: Any) -> None:
    """A run that ends after its second file."""
    with monkeypatch.context() as patch:
        calls = iter([module.write_streamed, module.write_streamed])

        def write(*arguments: Any) -> str:
            try:
                return next(calls)(*arguments)
            except StopIteration:
                raise KeyboardInterrupt from None

        patch.setattr(module, "write_streamed", write)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, to="hf", max_shard_bytes=40_000, **options)
    assert not target.exists()


def test_finished_files_are_taken_over(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", monkeypatch)
    report = convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000, verify=True)
    assert [name[:11] for name in report.resumed] == ["model-00001", "model-00002"]
    assert_same_tensors(tensors_of(tmp_path / "b"), hf_tensors(EXAMPLES["ministral"]()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_finished_file_that_was_damaged_meanwhile_is_written_again(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", monkeypatch)
    victim = sorted((tmp_path / "b.partial" / "new").glob("model-00001*"))[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    assert len(convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000).resumed) == 1
    assert_same_tensors(tensors_of(tmp_path / "b"), hf_tensors(EXAMPLES["ministral"]()))


def test_a_changed_source_is_told_and_begun_anew_only_by_force(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", monkeypatch)
    path = source / WEIGHTS["mistral"]
    path.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"b\.partial: was begun from other files: consolidated\.safetensors"):
        convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000)
    assert not (tmp_path / "b").exists()
    assert not convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000, force=True).resumed


def test_other_options_are_told(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", monkeypatch)
    with pytest.raises(CheckpointError, match=r"b\.partial: was begun with other options"):
        convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000, dtype="float32")


def test_a_source_that_changes_under_the_run_gets_no_name(source, tmp_path, monkeypatch):
    path, write = source / WEIGHTS["mistral"], module.write_streamed

    def writing(*arguments: Any) -> str:
        written = write(*arguments)
        path.write_bytes(path.read_bytes())
        return written

    monkeypatch.setattr(module, "write_streamed", writing)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        convert(source, tmp_path / "b", to="hf")
    assert not (tmp_path / "b").exists()


def test_a_torn_last_line_of_the_journal_counts_for_nothing(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "b", monkeypatch)
    journal = tmp_path / "b.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert len(convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000).resumed) == 1


def test_a_run_killed_right_after_the_renaming_is_finished(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_remove", lambda partial: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "b", to="hf")
    assert (tmp_path / "b").is_dir()
    convert(source, tmp_path / "b", to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(CheckpointError, match="exists"):
        convert(source, tmp_path / "b", to="hf")


def test_a_checkpoint_moved_aside_by_a_killed_run_comes_back(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "b", to="hf")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b").rename(tmp_path / "b.partial" / "replaced")
    interrupted(source, tmp_path / "b2", monkeypatch)
    convert(source, tmp_path / "b", to="mistral")
    assert (tmp_path / "b" / "params.json").is_file()
    assert not (tmp_path / "b.partial").exists()


def test_two_runs_at_once_are_refused(source, tmp_path):
    with (
        Staging(tmp_path / "b", {"source": {}}, force=False),
        pytest.raises(CheckpointError, match="another conversion is writing here"),
    ):
        convert(source, tmp_path / "b", to="hf")


def test_a_full_disk_is_one_line_and_the_rest_goes_on_later(source, tmp_path, monkeypatch):
    real, count = safetensors_writer._write, iter(range(100))

    def failing(write: Any, *rest: Any) -> None:
        if next(count) == 2:
            write = lambda piece: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
        real(write, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer, "_write", failing)
        with pytest.raises(CheckpointError, match=r"model-00003.*cannot be written \(No space left on device\)"):
            convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000)
    assert not (tmp_path / "b").exists()
    assert len(convert(source, tmp_path / "b", to="hf", max_shard_bytes=40_000).resumed) == 2


def test_a_disk_without_room_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the disk has 1000 bytes free, expected [0-9]+ for the rest"):
        convert(source, tmp_path / "b", to="hf")


@pytest.mark.parametrize("place", ["/proc/nowhere/b", "/dev/null/b"])
def test_a_place_that_cannot_be_written_is_one_line(source, place):
    with pytest.raises(MinistralError, match=r"cannot be written") as caught:
        convert(source, place, to="hf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["[1]", '"a"', '{"layer": "much"}', '{"layer": null}'])
def test_notes_come_back_with_their_file_unless_they_are_damaged(tmp_path, damage):
    def begun() -> Staging:
        return Staging(tmp_path / "b", {"source": {}}, force=False)

    with begun() as first:
        (first.folder / "x").write_bytes(b"abc")
        first.record("x", staging.sha256_of(first.folder / "x"), {"layer": 0.5})
    with begun() as second:
        assert (list(second.finished), second.notes) == (["x"], {"x": {"layer": 0.5}})
    journal = tmp_path / "b.partial" / staging.JOURNAL
    journal.write_text(journal.read_text().replace('{"layer": 0.5}', damage))
    with pytest.raises(CheckpointError, match=r"journal\.jsonl: damaged; remove"):
        begun()
