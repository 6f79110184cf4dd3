"""Curves of runs as a picture: losses, learning rate and tokens per second, out of their metrics. Trains nothing.

write_plot([read_curves(Path("runs/8b"))], Path("runs/8b/plot.png"))
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ministral_jax.errors import MinistralError
from ministral_jax.extras import import_extra

from .data.run_file import read_document
from .metrics import EVAL_FILE, TRAIN_FILE, MetricsFile, duration, perplexity
from .run_folder import CONFIG_FILE

# Told apart by people who do not see all colours as well (Okabe and Ito 2008); the first two are for one run alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INCHES, DOTS_PER_INCH = (10.0, 7.0), 150
LONGEST_NAME = 48  # characters; of longer ones the end is shown

# A smoothed curve is the mean over a twentieth of the steps, and over no fewer than five rows; a run of few has none.
_SMOOTHED_SHARE, _FEWEST_IN_MEAN, _FEWEST_SMOOTHED = 20, 5, 40
_MOST_DOTS = 50  # rows that are shown as dots too
_LOG_RATIO = 30.0  # of losses, from which on a linear axis would show nothing of the lower ones

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Series:
    """Values at steps, both [rows]; NaN where a row has none."""

    steps: Numbers
    values: Numbers

    @property
    def last(self) -> float | None:
        """The last value that there is."""
        there = self.values[np.isfinite(self.values)]
        return float(there[-1]) if there.size else None

    def smoothed(self, width: int) -> Series:
        """The mean over `width` steps around each, as far as there are any; what is no number counts as not there."""
        there = np.isfinite(self.values)
        sums = np.concatenate([[0.0], np.cumsum(np.where(there, self.values, 0.0))])
        counts = np.concatenate([[0], np.cumsum(there)])
        first = np.searchsorted(self.steps, self.steps - width / 2, side="left")
        end = np.searchsorted(self.steps, self.steps + width / 2, side="right")
        number = counts[end] - counts[first]
        means = (sums[end] - sums[first]) / np.maximum(number, 1)
        return Series(self.steps, np.where(number > 0, means, math.nan))


@dataclass(frozen=True)
class Curves:
    """What a run has told so far; `max_steps` None is unknown.

    Losses are in nats per trained token, or where it learns from preferences (`of_pairs`) per pair.
    """

    folder: Path
    loss: Series
    evaluation: Series
    learning_rate: Series
    tokens_per_second: Series
    of_pairs: bool
    max_steps: int | None
    seconds_left: float | None

    @property
    def step(self) -> int:
        """The last that was told."""
        return int(self.loss.steps[-1])

    def document(self) -> dict[str, Any]:
        """The last of every curve, for a script."""
        return {
            "run": str(self.folder),
            "rows": int(self.loss.steps.size),
            "evaluations": int(self.evaluation.steps.size),
            "step": self.step,
            "max_steps": self.max_steps,
            "loss": self.loss.last,
            "eval_loss": self.evaluation.last,
            "learning_rate": self.learning_rate.last,
            "tokens_per_second": self.tokens_per_second.last,
        }


def read_curves(folder: Path) -> Curves:
    """The curves of the run in `folder`, which may be in progress. Raises MinistralError where it has told nothing."""
    if not (folder / TRAIN_FILE).is_file():
        raise MinistralError(f"{folder}: no {TRAIN_FILE} there, expected the run_dir of `ministral finetune`")
    rows = list(MetricsFile(folder / TRAIN_FILE).rows())
    if not rows:
        raise MinistralError(f"{folder / TRAIN_FILE}: no step yet; the first one waits for the compiler")
    evaluations = list(MetricsFile(folder / EVAL_FILE).rows())
    left = rows[-1].get("eta_seconds")
    return Curves(
        folder=folder,
        loss=_series(rows, "loss"),
        evaluation=_series(evaluations, "loss"),
        learning_rate=_series(rows, "learning_rate"),
        tokens_per_second=_series(rows, "tokens_per_second"),
        of_pairs="chosen_reward" in rows[-1],
        max_steps=_max_steps(folder),
        seconds_left=left if isinstance(left, int | float) else None,
    )


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> Series:
    values = [row.get(name) for row in rows]
    numbers = [value if isinstance(value, int | float) else math.nan for value in values]
    return Series(np.array([row["step"] for row in rows], np.float64), np.array(numbers, np.float64))


def _max_steps(folder: Path) -> int | None:
    try:
        steps = read_document(folder / CONFIG_FILE).get("max_steps")
    except MinistralError:  # the curves do not need it
        return None
    return steps if isinstance(steps, int) else None


def write_plot(runs: Sequence[Curves], target: Path) -> None:
    """Draws `runs` into the PNG file `target`, which is replaced when all of the new one is there.

    Raises MinistralError where matplotlib is missing.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a folder's name
        figure(runs).savefig(picture, format="png", dpi=DOTS_PER_INCH)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(picture.getvalue())
    os.replace(partial, target)


def figure(runs: Sequence[Curves]) -> Any:
    """A matplotlib Figure: the losses above, learning rate and tokens per second below, over steps."""
    drawn = import_extra("matplotlib.figure", "plot", "a plot").Figure(figsize=INCHES, layout="constrained")
    axes = drawn.subplot_mosaic([["loss", "loss"], ["rate", "speed"]], height_ratios=[1.7, 1.0])
    names, width, colours = _names(runs), smoothing_width(runs), _colours(len(runs))
    alone = len(runs) == 1
    for run, colour in zip(runs, colours, strict=True):
        _draw_smoothed(axes["loss"], run.loss, colour, width)
        _draw_evaluation(axes["loss"], run.evaluation, COLOURS[1] if alone else colour, alone=alone)
        axes["rate"].plot(run.learning_rate.steps, run.learning_rate.values, **_line(run.learning_rate, colour))
        _draw_smoothed(axes["speed"], run.tokens_per_second, colour, width)
    _label(axes, runs)
    title = f"{names[0]}\n{_state(runs[0])}" if alone else f"{len(runs)} runs"
    drawn.suptitle(title, fontsize=12)
    if not alone:
        axes["loss"].legend(handles=_legend_of_colours(names, colours), loc="upper right", fontsize=9)
    handles = _legend_of_lines(runs, width)
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return drawn


def _colours(number: int) -> list[Any]:
    """As many as there are runs; where they are more than the chosen ones, taken from a range of colours."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return list(import_extra("matplotlib", "plot", "a plot").colormaps["turbo"](np.linspace(0.05, 0.95, number)))


def smoothing_width(runs: Sequence[Curves]) -> int | None:
    """The steps that a smoothed curve is the mean over, for all of `runs`; None where they have too few rows."""
    longest = max(runs, key=lambda run: run.step)
    rows = longest.loss.steps.size
    if rows < _FEWEST_SMOOTHED:
        return None
    return max(longest.step // _SMOOTHED_SHARE, round(_FEWEST_IN_MEAN * longest.step / rows))


def _draw_smoothed(axes: Any, series: Series, colour: Any, width: int | None) -> None:
    """The values themselves, and over them, where there is a `width`, their mean; then they are pale."""
    line = _line(series, colour)
    if width is None:
        axes.plot(series.steps, series.values, **line)
        return
    axes.plot(series.steps, series.values, **line | {"alpha": 0.3, "linewidth": 0.8})
    axes.plot(series.steps, series.smoothed(width).values, color=colour, linewidth=1.8, zorder=3)


def _draw_evaluation(axes: Any, series: Series, colour: Any, *, alone: bool) -> None:
    axes.plot(series.steps, series.values, **_evaluation_line(colour, alone=alone))


def _line(series: Series, colour: Any) -> dict[str, Any]:
    dots = {"marker": ".", "markersize": 5} if series.steps.size <= _MOST_DOTS else {}
    return {"color": colour, "linewidth": 1.5, **dots}


def _evaluation_line(colour: Any, *, alone: bool) -> dict[str, Any]:
    """In a colour of its own where there is one run; else dashed, in that of its run."""
    style = "-" if alone else "--"
    return {"color": colour, "linestyle": style, "linewidth": 1.5, "marker": "o", "markersize": 4.5, "zorder": 4}


def _legend_of_colours(names: Sequence[str], colours: Sequence[Any]) -> list[Any]:
    """Which run has which colour."""
    line = import_extra("matplotlib.lines", "plot", "a plot").Line2D
    return [line([], [], color=colour, label=name) for colour, name in zip(colours, names, strict=True)]


def _legend_of_lines(runs: Sequence[Curves], width: int | None) -> list[Any]:
    """What the lines are, in their colours where there is one run."""
    line = import_extra("matplotlib.lines", "plot", "a plot").Line2D
    alone = len(runs) == 1
    colour, other = COLOURS[:2] if alone else ("0.3", "0.3")
    entries = []
    if width is None:
        entries.append(line([], [], color=colour, label="training"))
    else:
        entries.append(line([], [], color=colour, alpha=0.3, linewidth=0.8, label="training, as logged"))
        entries.append(line([], [], color=colour, linewidth=1.8, label=f"training, mean over {width:,} steps"))
    if any(run.evaluation.steps.size for run in runs):
        entries.append(line([], [], label="evaluation", **_evaluation_line(other, alone=alone)))
    return entries


def _label(axes: Mapping[str, Any], runs: Sequence[Curves]) -> None:
    """Titles, units, and axes that suit the numbers."""
    ticker = import_extra("matplotlib.ticker", "plot", "a plot")
    losses, rate, speed = axes["loss"], axes["rate"], axes["speed"]
    units = {"per pair" if run.of_pairs else "nats per trained token" for run in runs}
    losses.set(title="Loss", ylabel=" or ".join(sorted(units)))
    rate.set(title="Learning rate", ylabel="learning rate")
    speed.set(title="Speed", ylabel="tokens per second")
    if _wants_log(runs):
        losses.set_yscale("log")
        losses.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    last = max(run.step for run in runs)
    for name, each in axes.items():
        each.set_xlabel("step")
        each.set_xlim(0, max(1.02 * last, 2))
        each.xaxis.set_major_locator(ticker.MaxNLocator(10 if name == "loss" else 6, integer=True))
        each.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        each.grid(visible=True, color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for each in (rate, speed):
        each.margins(y=0.1)
        each.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _wants_log(runs: Sequence[Curves]) -> bool:
    values = np.concatenate([series.values for run in runs for series in (run.loss, run.evaluation)])
    values = values[np.isfinite(values)]
    return bool(values.size and values.min() > 0 and values.max() > _LOG_RATIO * values.min())


def _state(run: Curves) -> str:
    """A line on where a run stands."""
    parts = [f"step {run.step:,}" + (f" of {run.max_steps:,}" if run.max_steps else "")]
    if run.loss.last is not None:
        parts.append(f"training loss {run.loss.last:.4g}")
    if run.evaluation.last is not None:
        parts.append(f"evaluation loss {run.evaluation.last:.4g}")
        if not run.of_pairs:
            parts[-1] += f", perplexity {perplexity(run.evaluation.last):.4g}"
    if run.seconds_left and run.step != run.max_steps:
        parts.append(f"{duration(run.seconds_left)} left")
    return "   ".join(parts)


def _names(runs: Sequence[Curves]) -> list[str]:
    """The names of the runs' folders, or as much of their paths as tells them apart."""
    paths = [run.folder.absolute() for run in runs]
    depth = 1
    while depth < max(len(path.parts) for path in paths) and len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_shown("/".join(path.parts[-depth:])) for path in paths]


def _shown(name: str) -> str:
    """A name as matplotlib shows it: formulas stand between dollars, and labels that begin with _ are left out."""
    name = name if len(name) <= LONGEST_NAME else "…" + name[-LONGEST_NAME + 1 :]
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")
