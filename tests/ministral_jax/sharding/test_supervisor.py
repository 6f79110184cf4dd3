"""The process over a process: what it passes on, and its last line. No jax runs here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ministral_jax.sharding.supervisor import last_line, lost_processes

REPOSITORY = Path(__file__).parents[3]

# As jaxlib 0.10.2 and 0.11.2 write them.
PEERS_GONE = """\
F1121 06:12:15.756230    1986 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
12
1
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.

RPC: /xla.coordination.CoordinationService/PollForError
"""
FIRST_GONE = """\
F1121 06:05:28.790801   31439 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted
"""


def supervised(body: str, process_id: int = 0) -> subprocess.Popen[str]:
    """A program that runs `body` as the child of a supervisor."""
    program = (
        "import ctypes, os, signal, sys, time\n"
        "from ministral_jax.sharding.supervisor import supervise\n"
        f"supervise('host:8476', 3, {process_id})\n"
    ) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_lost_are_read_from_what_jax_says():
    assert lost_processes(PEERS_GONE) == [1, 12]
    assert lost_processes(FIRST_GONE) == [0]
    assert lost_processes("a sentence of another kind") == []


def test_a_signal_that_is_not_jaxs_own_is_given_as_it_is():
    assert last_line("", signal.SIGKILL, "h:1", 2) == ("ended by SIGKILL, as the system does when memory runs out", 137)
    assert last_line("", signal.SIGABRT, "h:1", 2) == ("ended by SIGABRT", 134)
    assert last_line(FIRST_GONE, signal.SIGSEGV, "h:1", 2) == ("ended by SIGSEGV", 139)
    assert last_line(FIRST_GONE, signal.SIGABRT, "h:1", 2)[1] == 1


def test_the_first_process_speaks_and_the_chatter_of_native_code_stays_off_stdout():
    body = """
        print("answer")
        print("a note", file=sys.stderr)
        sys.stdout.flush()
        os.write(1, b"[Gloo] Rank 3 is connected to 7 peer ranks.\\n")
        os.write(2, b"native words\\n")
        sys.exit(7)
    """
    out, err = (process := supervised(body)).communicate(timeout=20)
    assert (process.returncode, out) == (7, "answer\n")
    assert sorted(err.splitlines()) == ["a note", "native words"]


def test_the_others_are_silent_on_stdout_and_marked_on_stderr():
    body = 'print("answer"); print("trouble", file=sys.stderr); os.write(2, b"half a line")'
    out, err = (process := supervised(body, process_id=2)).communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "[process 2] trouble\n[process 2] half a line\n")


@pytest.mark.parametrize(("text", "who"), [(PEERS_GONE, "processes 1 and 12 of 3 are lost"), (FIRST_GONE, "")])
def test_the_last_line_names_the_lost_after_an_abort(text, who):
    body = f"os.write(2, {text.encode()!r}); os.abort()"
    _, err = (process := supervised(body)).communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith(text)
    who = who or "process 0 of 3 (the coordinator, host:8476) is lost"
    assert err.splitlines()[-1].startswith(f"ministral: {who}: killed, out of memory, or its machine")


def test_what_the_child_leaves_running_does_not_hold_the_end_up():
    body = """
        if os.fork() == 0:
            time.sleep(8)
            os._exit(0)
        os.abort()
    """
    began = time.monotonic()
    process = supervised(body)
    assert process.wait(timeout=20) == 134
    assert time.monotonic() - began < 7
    for pipe in (process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


def test_a_killed_supervisor_takes_its_child_along():
    process = supervised("print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # the child held these pipes
    deadline = time.monotonic() + 10
    while (Path("/proc") / str(child)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_to_end_reaches_the_child():
    body = """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", flush=True)
        time.sleep(60)
    """
    process = supervised(body)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 5
