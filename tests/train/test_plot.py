"""Curves of runs: what is read, how it is smoothed, and what of it is in the picture."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ministral_jax.errors import MinistralError
from train.metrics import EVAL_FILE, TRAIN_FILE
from train.plot import Series, figure, read_curves, smoothing_width, write_plot


def write_run(folder: Path, steps: int, *, every: int = 1, **more: Any) -> Path:
    """A run of so many steps, evaluated after every third; `more` are other columns, each a function of the step."""
    folder.mkdir(parents=True)
    columns = {
        "loss": lambda s: 2 + 1 / s,
        "learning_rate": lambda s: s / 1e4,
        "tokens_per_second": lambda s: 100.0 * s,
    }
    rows = [
        {"step": s} | {name: value(s) for name, value in (columns | more).items()}
        for s in range(every, steps + 1, every)
    ]
    (folder / TRAIN_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = [{"step": s, "loss": 3 + 1 / s} for s in range(3, steps + 1, 3)]
    (folder / EVAL_FILE).write_text("".join(json.dumps(row) + "\n" for row in evaluated))
    (folder / "config.yaml").write_text("max_steps: 200\n")
    return folder


def panels(drawn: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in drawn.axes}


def values(line: Any) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def words(legend: Any) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_a_picture_has_every_row_under_its_mean_and_the_evaluations(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "a", 120))
    drawn = figure([curves])
    losses, rate, speed = (panels(drawn)[title] for title in ("Loss", "Learning rate", "Speed"))
    logged, mean, evaluated = losses.lines
    assert values(logged) == [2 + 1 / s for s in range(1, 121)]
    assert values(mean) == curves.loss.smoothed(6).values.tolist()
    assert mean.get_zorder() > logged.get_zorder()
    assert evaluated.get_xdata().tolist() == list(range(3, 121, 3))
    assert evaluated.get_marker() == "o"  # one alone would be no line
    assert values(rate.lines[0]) == [s / 1e4 for s in range(1, 121)]
    assert values(speed.lines[0]) == [100.0 * s for s in range(1, 121)]
    units = [axes.get_ylabel() for axes in (losses, rate, speed)]
    assert units == ["nats per trained token", "learning rate", "tokens per second"]
    assert {axes.get_xlabel() for axes in drawn.axes} == {"step"}
    assert words(drawn.legends[0]) == ["training, as logged", "training, mean over 6 steps", "evaluation"]
    assert drawn.get_suptitle().startswith(
        "a\nstep 120 of 200   training loss 2.008   evaluation loss 3.008, perplexity"
    )


def test_several_runs_share_the_axes_with_a_colour_each(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, 60) for name in ("one/_r$1$", "two/_r$1$", "three")]
    losses = panels(figure([read_curves(folder) for folder in folders]))["Loss"]
    assert words(losses.get_legend()) == [r"one/_r\$1\$", r"two/_r\$1\$", f"{tmp_path.name}/three"]
    colours = [line.get_color() for line in losses.lines]
    assert len(set(colours)) == 3
    assert colours[0] == colours[1] == colours[2]  # a run as logged, its mean, its evaluation
    many = figure([read_curves(folders[0])] * 9)
    assert len({str(handle.get_color()) for handle in panels(many)["Loss"].get_legend().legend_handles}) == 9


def test_losses_of_preferences_are_per_pair_and_have_no_perplexity(tmp_path: Path) -> None:
    pairs = read_curves(write_run(tmp_path / "pairs", 9, chosen_reward=lambda s: 0.1))
    drawn = figure([pairs])
    assert panels(drawn)["Loss"].get_ylabel() == "per pair"
    assert drawn.get_suptitle() == "pairs\nstep 9 of 200   training loss 2.111   evaluation loss 3.111"
    both = figure([pairs, read_curves(write_run(tmp_path / "tokens", 9))])
    assert panels(both)["Loss"].get_ylabel() == "nats per trained token or per pair"


@pytest.mark.parametrize(("every", "width"), [(1, 8), (1, 9), (4, 9)])
def test_a_mean_is_over_the_steps_around_and_leaves_out_what_is_no_number(every: int, width: int) -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1.0, 200.0, every)
    logged = np.where(rng.random(steps.size) < 0.3, math.nan, rng.normal(size=steps.size))
    expected = [
        [value for other, value in zip(steps, logged, strict=True) if abs(other - step) <= width / 2 and value == value]
        for step in steps
    ]
    means = [sum(near) / len(near) if near else math.nan for near in expected]
    np.testing.assert_allclose(Series(steps, logged).smoothed(width).values, means, rtol=1e-12, atol=1e-12)


def test_a_run_of_few_rows_is_not_smoothed_and_one_that_logs_seldom_over_enough_of_them(tmp_path: Path) -> None:
    few = figure([read_curves(write_run(tmp_path / "few", 12))])
    assert words(few.legends[0]) == ["training", "evaluation"]
    seldom = read_curves(write_run(tmp_path / "seldom", 200, every=4))
    assert smoothing_width([seldom]) == 20  # five rows
    assert smoothing_width([read_curves(write_run(tmp_path / "long", 1000)), seldom]) == 50


def test_a_run_in_progress_is_drawn_from_its_whole_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 1)
    with (folder / TRAIN_FILE).open("a") as file:
        file.write('{"step": 2, "lo')
    (folder / EVAL_FILE).unlink()
    (folder / "config.yaml").unlink()
    drawn = figure([read_curves(folder)])
    assert words(drawn.legends[0]) == ["training"]
    assert values(panels(drawn)["Loss"].lines[0]) == [3.0]
    assert drawn.get_suptitle() == "run\nstep 1   training loss 3"
    write_plot([read_curves(folder)], tmp_path / "a.png")


def test_nulls_and_columns_that_are_missing_leave_gaps(tmp_path: Path) -> None:
    odd = {"loss": lambda s: None if s in (2, 12) else 2.0, "tokens_per_second": lambda s: None}
    folder = write_run(tmp_path / "run", 12, **odd)
    curves = read_curves(folder)
    assert (curves.loss.last, curves.tokens_per_second.last) == (2.0, None)
    assert np.isnan(curves.loss.values).nonzero()[0].tolist() == [1, 11]
    write_plot([curves], tmp_path / "a.png")
    for name in (TRAIN_FILE, EVAL_FILE):
        (folder / name).write_text('{"step": 5}\n')
    write_plot([read_curves(folder)], tmp_path / "a.png")


@pytest.mark.parametrize(("lowest", "scale"), [(0.01, "log"), (0.1, "linear"), (0.0, "linear")])
def test_losses_that_fall_far_are_drawn_on_a_logarithmic_axis(lowest: float, scale: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 5, loss=lambda s: 1.0 if s == 1 else lowest)
    (folder / EVAL_FILE).unlink()
    assert panels(figure([read_curves(folder)]))["Loss"].get_yscale() == scale


def test_the_picture_is_a_png_that_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves, target = read_curves(write_run(tmp_path / "run", 5)), tmp_path / "a.png"
    target.write_text("before")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write_plot([curves], target)
    assert target.read_text() == "before"
    write_plot([curves], target)
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1500, 1050]
    assert "matplotlib.pyplot" not in sys.modules  # which would ask for a screen


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MinistralError, match=r"no metrics\.train\.jsonl there, expected the run_dir"):
        read_curves(tmp_path)
    (tmp_path / TRAIN_FILE).write_text('{"step": 1')
    with pytest.raises(MinistralError, match="no step yet"):
        read_curves(tmp_path)
