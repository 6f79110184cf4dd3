"""How a command fails: one line on stderr and an exit code. Knows no command."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from ..errors import MinistralError

FAILED, WRONG_USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141  # the last two as shells report SIGINT and SIGPIPE

_LONGEST_MESSAGE = 2000


class UsageError(MinistralError):
    """Arguments that cannot be meant, found after parsing."""


def run_guarded(command: Callable[[], int], *, debug: bool) -> int:
    """Runs a command and returns its exit code; what it raises becomes a line on stderr, with `debug` a traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has left, which is no reason to complain
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("\nministral: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"ministral: {describe(error)}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def describe(error: BaseException) -> str:
    """One line about a failure: its reason if it was foreseen, else its type and how to see where it happened."""
    if isinstance(error, MinistralError):
        return _one_line(str(error))
    if isinstance(error, OSError) and error.strerror:
        return _one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if _is_out_of_memory(error):
        return (
            "out of memory: try --max-length N or a smaller batch; "
            f"`ministral inspect MODEL --context N` shows what is needed ({_one_line(str(error))[:200]})"
        )
    message = _one_line(str(error))
    named = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"unexpected {named} (a fault of this program: run again with --debug for the traceback)"


def _is_out_of_memory(error: BaseException) -> bool:
    from_device = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (from_device and str(error).startswith("RESOURCE_EXHAUSTED"))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."
