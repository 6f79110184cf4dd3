"""The process that stands over one of several: it outlives it, so that it can say last why it ended. Knows no jax.

When a peer is lost, jax's coordination service aborts the process from C++ (`LOG(QFATAL)`, then SIGABRT) within
milliseconds if the lost one was process 0, otherwise after the heartbeat timeout. Python is not asked: the callback
that jaxlib takes for it fails in C++ (std::bad_cast, in jaxlib 0.10.2 and 0.11.2), and `jax_enable_recoverability`
does not cover process 0. Nothing inside can therefore have the last word; a parent can, and it also gives the exit code
that a shell, Slurm, or Kubernetes sees. So the process forks before jax is used: the child goes on with the work, the
parent passes on what C++ wrote and reads in it who was lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator

from .roll_call import named

FAILED = 1
_KEPT_BYTES = 64 * 1024
_DRAIN_SECONDS = 2.0  # for what a child of the child still writes
_READ_BYTES = 64 * 1024
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux

_PASSED_ON = (signal.SIGINT, signal.SIGTERM)

_UNHEALTHY = re.compile(r"tasks are unhealthy \(stopped sending heartbeats\):\n((?:\d+\n)+)")
_COORDINATOR_GONE = "Failed to send RPC to coordination service"


def supervise(coordinator: str, processes: int, process_id: int) -> None:
    """Forks. Returns in the child, which goes on; the parent ends when the child has, with its exit code.

    Python's stdout and stderr stay the real ones in process 0; in the others stdout is void and stderr comes through
    the parent, each line marked with the process it is from. What native code writes to stderr comes through the
    parent as well. What it writes to stdout is dropped: gloo says there of every device how many it is connected to
    (for the log of NCCL there is NCCL_DEBUG_FILE).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # one that comes before the parent is ready waits for it
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.close(reading)
        _end_with_parent(parent)
        _take_streams(writing, speaks=process_id == 0)
        return
    os.close(writing)
    os._exit(_stand_over(child, reading, coordinator, processes, process_id))


def lost_processes(text: str) -> list[int]:
    """The processes that jax's coordination service says are gone, from what it wrote before it aborted."""
    found = _UNHEALTHY.findall(text)
    if found:
        return sorted({int(line) for line in found[-1].split()})
    return [0] if _COORDINATOR_GONE in text else []


def last_line(text: str, signal_number: int, coordinator: str, processes: int) -> tuple[str, int]:
    """Why a process that ended by a signal did so, and the exit code to give."""
    lost = lost_processes(text) if signal_number == signal.SIGABRT else []
    if lost:
        where = f" (the coordinator, {coordinator})" if lost == [0] else ""
        return (
            f"{named(lost)} of {processes}{where} is lost: killed, out of memory, or its machine or network failed"
            " (its own stderr may say which)"
        ).replace(" is lost", " are lost" if len(lost) > 1 else " is lost"), FAILED
    name = signal.Signals(signal_number).name
    hint = ", as the system does when memory runs out" if signal_number == signal.SIGKILL else ""
    return f"ended by {name}{hint}", 128 + signal_number


def _end_with_parent(parent: int) -> None:
    """Has the system kill this process when its parent dies, however it dies; else a killed one would work on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(FAILED)


def _take_streams(writing: int, *, speaks: bool) -> None:
    if speaks:
        sys.stdout = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
        sys.stderr = open(  # noqa: SIM115
            os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1
        )
    else:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, 1)
    os.dup2(writing, 2)
    os.close(void)
    os.close(writing)


def _stand_over(child: int, reading: int, coordinator: str, processes: int, process_id: int) -> int:
    """The parent's life; returns its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child as well
    signal.signal(signal.SIGTERM, lambda number, frame: _signal(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    mark = f"[process {process_id}] ".encode() if process_id else b""
    kept = b""
    for line in _lines(reading, child):
        kept = (kept + line)[-_KEPT_BYTES:]
        _write(mark + line)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    reason, code = last_line(kept.decode(errors="replace"), -code, coordinator, processes)
    _write(mark + f"ministral: {reason}\n".encode())
    return code


def _lines(reading: int, child: int) -> Iterator[bytes]:
    """What comes through the pipe, by lines, until the child and all that it started have closed it.

    What the child started may live on: past its end we wait for _DRAIN_SECONDS only.
    """
    rest = b""
    ended: float | None = None
    while ended is None or time.monotonic() < ended + _DRAIN_SECONDS:
        if select.select([reading], [], [], 0.5)[0]:
            read = os.read(reading, _READ_BYTES)
            if not read:
                break
            *lines, rest = (rest + read).split(b"\n")
            yield from (line + b"\n" for line in lines)
        elif ended is None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            ended = time.monotonic()
    if rest:
        yield rest + b"\n"


def _signal(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _write(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads our stderr any more
        while text:
            text = text[os.write(2, text) :]
