"""`ministral diff`: two checkpoints of any layouts, tensor by tensor."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from .arguments import Commands, new_command
from .output import progress_bar, write, write_json

if TYPE_CHECKING:
    from ..checkpoints.conversion.compare import Comparison, TensorDifference

_DESCRIPTION = """\
Compares the tensors of two folders, models or adapters, in any layouts: which are missing,
shapes, dtypes, and how many elements differ by how much. Elements of one dtype are compared
by their bits. Names are the mistral layout's.

Exit codes: 0 all the same, 1 different."""

_EXAMPLE = """\
example:
  ministral diff ./Ministral-8B ./Ministral-8B-hf"""

DIFFERENT = 1


def add_command(commands: Commands) -> None:
    parser = new_command(commands, "diff", "compare two checkpoints of any layouts", _DESCRIPTION, _EXAMPLE)
    parser.add_argument("a", metavar="A", help="a folder with a model or an adapter")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--base", metavar="MODEL", help="the model of a PEFT adapter: a folder or a published name")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.conversion.compare import compare
    from ..checkpoints.conversion.opening import open_checkpoint
    from ..checkpoints.hub import resolve

    with (
        open_checkpoint(resolve(arguments.a), base=arguments.base) as a,
        open_checkpoint(resolve(arguments.b), base=arguments.base) as b,
        progress_bar("comparing") as progress,
    ):
        comparison = compare(a, b, progress=progress)
    if arguments.json:
        write_json(_document(comparison))
    else:
        _show(comparison)
    return 0 if comparison.same else DIFFERENT


def _document(comparison: Comparison) -> dict[str, Any]:
    entries = [_entry(difference) for difference in comparison.differences]
    return {"same": comparison.same, "tensors": comparison.tensors, "differences": entries}


def _entry(difference: TensorDifference) -> dict[str, Any]:
    gap = difference.max_abs
    return {
        "name": difference.name,
        "a": difference.in_a,
        "b": difference.in_b,
        "elements": difference.elements,
        "different": difference.different,
        # JSON has no infinity; null with elements that differ means that one side is not finite.
        "max_abs": gap if gap is None or math.isfinite(gap) else None,
    }


def _show(comparison: Comparison) -> None:
    for difference in comparison.differences:
        write(f"{difference}\n")
    count = len(comparison.differences)
    write(f"{comparison.tensors} tensors, {f'{count} of them different' if count else 'all the same'}\n")
