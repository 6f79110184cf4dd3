"""What commands show: notes and progress on stderr, text and JSON documents on stdout."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHOW_AFTER_SECONDS = 2.0


_only_trouble = False


def speak_only_of_trouble() -> None:
    """From now on shows warnings and failures alone, as every process but the first of several does."""
    global _only_trouble
    _only_trouble = True


def note(message: str) -> None:
    """A line on stderr that is no failure."""
    if not _only_trouble:
        _say(message)


def _say(message: str) -> None:
    print(f"ministral: {message}", file=sys.stderr, flush=True)


def note_to_people(message: str) -> None:
    """A line on stderr when a person sees it: nothing when stderr is no terminal."""
    if sys.stderr.isatty():
        note(message)


class _Notes(logging.Handler):
    """Log records as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or not _only_trouble:
            _say(record.getMessage())


def take_any_text() -> None:
    """Has characters that a terminal's encoding lacks shown as `?`, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def log_as_notes() -> Iterator[None]:
    """Shows what the four packages log, as notes."""
    loggers = [logging.getLogger(name) for name in ("ministral_jax", "pallas_kernels", "infer", "train")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    notes = _Notes()
    for logger in loggers:
        logger.addHandler(notes)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(notes)
            logger.setLevel(level)
            logger.propagate = propagate


def write(text: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def size(n_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least one."""
    amount, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:,.2f} {unit}" if unit != "B" else f"{n_bytes} B"


def write_json(document: Any) -> None:
    """The one JSON document of a command, on one line of stdout; ASCII, which every terminal and pipe can take."""
    write(json.dumps(document, allow_nan=False) + "\n")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows on stderr that `what` is under way, once it has taken two seconds; quiet when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    shown = threading.Thread(target=_show_until, args=(what, over), daemon=True)
    shown.start()
    try:
        yield
    finally:
        over.set()
        shown.join()


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """Yields a function of bytes done and in all, shown as a bar on stderr; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show_until(what: str, over: threading.Event) -> None:
    """A moving line with the seconds so far, from two seconds on until `over`; it is gone afterwards."""
    if over.wait(SHOW_AFTER_SECONDS):
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        over.wait()
