"""Rows of metrics on their way: files, TensorBoard, wandb; nothing twice after a run is gone on with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ministral_jax.errors import MinistralError
from ministral_jax.sharding import hosts
from train.config import RunConfig, run_config
from train.metrics import EVAL_FILE, TRAIN_FILE, MetricsFile
from train.run import run
from train.sinks import TENSORBOARD_FOLDER, metric_rows, require_sinks

from .event_files import scalars


class FakeWandb(ModuleType):
    """What is used of wandb, keeping what it was told. Like wandb it takes no step that is before its last."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []
        self.logins, self.refuses = 0, False

    def login(self) -> bool:
        if self.refuses:
            raise self.Error("No key.\nLog in.")
        self.logins += 1
        return True

    def init(self, **options: Any) -> FakeWandb:
        self.begun.append(options)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        assert not self.logged or step >= self.logged[-1][0]
        self.logged.append((step, values))

    def finish(self, *, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def config_of(folder: Path, **more: Any) -> RunConfig:
    return run_config({"model": "m", "run_dir": str(folder), "max_steps": 9, **more}).config


def tell(config: RunConfig, folder: Path, steps: range, *, version: float, evaluated: tuple[int, ...] = ()) -> None:
    """A run of these steps; `version` makes their losses differ from those of the same steps told before."""
    with metric_rows(config, folder, steps.start - 1) as rows:
        for step in steps:
            rows.add("train", {"step": step, "loss": step + version, "mfu": None, "gradient_norm": float("nan")})
            if step in evaluated:
                rows.add("eval", {"step": step, "loss": -step - version})


def test_tensorboard_has_the_rows_of_the_files_once_after_resuming(tmp_path: Path) -> None:
    config = config_of(tmp_path, tensorboard=True)
    tell(config, tmp_path, range(1, 6), version=0.25, evaluated=(2, 5))
    tell(config, tmp_path, range(3, 7), version=0.5, evaluated=(6,))
    written = scalars(tmp_path / TENSORBOARD_FOLDER)
    assert written["train/loss"] == [(1, 1.25), (2, 2.25), (3, 3.5), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert written["eval/loss"] == [(2, -2.25), (6, -6.5)]
    for kind, name in (("train", TRAIN_FILE), ("eval", EVAL_FILE)):
        assert written[f"{kind}/loss"] == [(row["step"], row["loss"]) for row in MetricsFile(tmp_path / name).rows()]
    assert "train/mfu" not in written


def test_a_scalar_is_on_the_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    with metric_rows(config_of(tmp_path, tensorboard=True), tmp_path, 0) as rows:
        rows.add("train", {"step": 1, "loss": 2.0})
        assert scalars(tmp_path / TENSORBOARD_FOLDER) == {"train/loss": [(1, 2.0)]}


def test_a_sink_that_comes_later_gets_the_rows_there_are(tmp_path: Path, wandb: FakeWandb) -> None:
    tell(config_of(tmp_path), tmp_path, range(1, 5), version=0.25, evaluated=(2,))
    assert not (tmp_path / TENSORBOARD_FOLDER).exists()
    tell(config_of(tmp_path, tensorboard=True, wandb={"project": "p"}), tmp_path, range(4, 6), version=0.5)
    assert [step for step, _ in scalars(tmp_path / TENSORBOARD_FOLDER)["train/loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in wandb.logged] == [1, 2, 2, 3, 4, 5]
    assert wandb.logged[2] == (2, {"eval/loss": -2.25})


def test_wandb_goes_on_with_its_run_and_is_told_nothing_twice(tmp_path: Path, wandb: FakeWandb) -> None:
    config = config_of(tmp_path, wandb={"project": "p", "offline": True})
    tell(config, tmp_path, range(1, 6), version=0.0, evaluated=(2, 4))
    tell(config, tmp_path, range(3, 8), version=0.0, evaluated=(5, 6))
    first, second = wandb.begun
    assert first == second
    assert first["config"] == config.document()
    del first["config"], first["id"]
    home = {"dir": str(tmp_path), "name": tmp_path.name}
    assert first == home | {"project": "p", "resume": None, "mode": "offline", "job_type": "training"}
    trained = [(step, values["train/loss"]) for step, values in wandb.logged if "train/loss" in values]
    assert trained == [(step, float(step)) for step in range(1, 8)]
    assert [step for step, values in wandb.logged if "eval/loss" in values] == [2, 4, 5, 6]
    assert wandb.ended == [0, 0]


def test_wandb_hears_of_a_run_that_failed(tmp_path: Path, wandb: FakeWandb) -> None:
    config = config_of(tmp_path, wandb={"project": "p", "run_name": "n"})
    with pytest.raises(KeyError, match="lost"), metric_rows(config, tmp_path, 0):
        raise KeyError("lost")
    assert wandb.ended == [1]
    assert (wandb.begun[0]["name"], wandb.begun[0]["mode"], wandb.begun[0]["resume"]) == ("n", None, "allow")


def test_an_account_is_asked_for_before_anything_is_loaded(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_sinks(config_of(tmp_path, wandb={"project": "p"}))
    assert wandb.logins == 1
    wandb.refuses = True
    with pytest.raises(MinistralError, match=r"^wandb: No key\. Log in; wandb\.offline: true needs no account"):
        run(config_of(tmp_path / "new", wandb={"project": "p"}))
    require_sinks(config_of(tmp_path, wandb={"project": "p", "offline": True}))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    require_sinks(config_of(tmp_path, wandb={"project": "p"}))


@pytest.mark.parametrize(
    ("package", "key", "value"), [("tensorboardX", "tensorboard", True), ("wandb", "wandb", {"project": "p"})]
)
def test_a_missing_package_is_said_before_anything_is_loaded(
    package: str, key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MinistralError, match=rf"{package} cannot be imported .*ministral-jax\[{key}\]"):
        run(config_of(tmp_path / "new", **{key: value}))
    assert not (tmp_path / "new").exists()


def test_of_several_processes_the_first_alone_tells(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(config_of(tmp_path), tmp_path, range(1, 3), version=0.0)
    monkeypatch.setattr(hosts, "process_id", lambda: 1)
    with metric_rows(config_of(tmp_path, tensorboard=True, wandb={"project": "p"}), tmp_path, 0):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [TRAIN_FILE]
    assert len(list(MetricsFile(tmp_path / TRAIN_FILE).rows())) == 2
    assert wandb.begun == []
