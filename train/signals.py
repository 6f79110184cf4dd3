"""Signals that end a run: noted when they come, and asked for between two steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGTERM and SIGINT has come, if one has; the second one acts as usual."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(number, before[signal.Signals(number)])
        logger.info("%s: saving after this step", signal.Signals(number).name)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: got[0] if got else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
