"""`ministral plot`: the losses and rates of fine-tuning runs as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Commands, new_command
from .failures import UsageError
from .output import write, write_json

if TYPE_CHECKING:
    from train.plot import Curves

PICTURE = "plot.png"  # in the folder of the run

_DESCRIPTION = """\
Draws what the runs in the folders RUN (run_dir of `ministral finetune`) have told so far:
losses of training and evaluation, learning rate and tokens per second, as a PNG. A run may be
in progress. Several runs share the axes, a colour each.

Needs matplotlib: pip install 'ministral-jax[plot]'."""

_EXAMPLE = """\
examples:
  ministral plot runs/8b
  ministral plot runs/rank16 runs/rank64 -o ranks.png"""


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "plot", "draw losses and rates of runs", _DESCRIPTION, _EXAMPLE)
    parser.set_defaults(run=run)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run")
    parser.add_argument(
        "-o", "--output", metavar="FILE.png", help=f"the picture to write (default: {PICTURE} in RUN, if it is one)"
    )
    parser.add_argument("--json", action="store_true", help="print the file and the last of every curve as JSON")


def run(arguments: argparse.Namespace) -> int:
    target = _target(arguments)
    from train.plot import read_curves, write_plot

    curves = [read_curves(Path(folder)) for folder in arguments.runs]
    write_plot(curves, target)
    if arguments.json:
        write_json(_document(target, curves))
    else:
        write(f"{target}\n")
    return 0


def _target(arguments: argparse.Namespace) -> Path:
    if arguments.output is None:
        if len(arguments.runs) > 1:
            raise UsageError(f"{len(arguments.runs)} runs: expected -o FILE.png, the picture to write")
        return Path(arguments.runs[0]) / PICTURE
    target = Path(arguments.output)
    if target.suffix.lower() != ".png":
        raise UsageError(f"-o {arguments.output}: expected a name that ends in .png")
    return target


def _document(target: Path, curves: list[Curves]) -> dict[str, Any]:
    return {"file": str(target), "bytes": target.stat().st_size, "runs": [each.document() for each in curves]}
