"""The command line `ministral`: reads the arguments and runs one command. Each command is a module beside this one.

Nothing heavy is imported until a command runs, so that `ministral --help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from ..neighbours import require_neighbour
from . import chat, convert, data, demo, diff, finetune, generate, inspect, merge, plot, quantize, score
from .failures import run_guarded
from .hosts import joined, leave
from .output import log_as_notes, take_any_text

_COMMANDS = (demo, chat, generate, score, inspect, convert, diff, quantize, merge, data, finetune, plot)

_DESCRIPTION = """\
The Mistral open-weight family in JAX.

MODEL is a folder as published (params.json or config.json with its weights) or a
Hugging Face id such as mistralai/Ministral-8B-Instruct-2410."""

_EPILOG = """\
`ministral COMMAND --help` shows a command's options and an example.

Exit codes: 0 done, 1 failed with a one-line reason on stderr, 2 wrong usage, 130 interrupted."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command. A parsed command has `run`, the function that does it."""
    parser = argparse.ArgumentParser(
        prog="ministral",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ministral {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, or raises SystemExit for help, version and wrong usage."""
    arguments = build_parser().parse_args(argv)
    take_any_text()
    with log_as_notes():
        code = run_guarded(lambda: _run(arguments), debug=arguments.debug)
    leave(arguments, code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    for package in ("infer", "train"):
        require_neighbour(package)
    with joined(arguments):
        return arguments.run(arguments)
