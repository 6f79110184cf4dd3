"""`ministral plot`: which file it writes, what it prints, how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ministral_jax.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"step": 1, "loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 10.0, "mfu": None}
    (folder / "metrics.train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2, "loss": None}))
    return folder


def test_one_run_has_its_picture_in_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'plot.png'}\n"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("*.partial"))


def test_json_says_what_was_written_and_the_last_of_every_curve(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "both.PNG"
    assert main(["plot", str(run), str(run), "-o", str(target), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    last = {"loss": 2.5, "eval_loss": None, "learning_rate": 1e-4, "tokens_per_second": 10.0}
    told = {"run": str(run), "rows": 2, "evaluations": 0, "step": 2, "max_steps": None} | last
    assert document == {"file": str(target), "bytes": target.stat().st_size, "runs": [told, told]}


def test_what_is_wrong_is_said_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, reason in (
        ([str(run), str(run)], 2, "2 runs: expected -o FILE.png"),
        ([str(run), "-o", "curves.pdf"], 2, "expected a name that ends in .png"),
        ([str(run.parent)], 1, "no metrics.train.jsonl there"),
        ([str(run), "-o", str(run / "no" / "a.png")], 1, "No such file or directory"),
    ):
        assert main(["plot", *arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert reason in captured.err


def test_without_matplotlib_the_extra_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(run)]) == 1
    assert "pip install 'ministral-jax[plot]'" in capsys.readouterr().err
    assert not (run / "plot.png").exists()
