"""Who is there: processes meet over plain sockets before jax joins them. Knows nothing of jax.

jax waits for its processes too, but when one does not come it aborts the others without saying which. Here process 0
listens at the coordinator's address, which jax takes over afterwards, and answers everyone with what it found: all are
there, or one line on what is wrong.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time

from ..errors import HostsError

_GO = "go"
_LONGEST_LINE = 1000
_RETRY_SECONDS = 0.2
_GREETING_SECONDS = 2.0  # for whoever connects to say who it is: the others wait for it
_ANSWER_SECONDS = 10.0  # longer than process 0 itself waits


def call_roll(coordinator: str, processes: int, process_id: int, seconds: float) -> None:
    """Returns once all `processes` are there, each calling this with its own id; `coordinator` is host:port.

    Raises HostsError in one line, in every process that came, when one does not come within `seconds`, when two come
    with one id, or when they disagree on their number.
    """
    deadline = time.monotonic() + seconds
    if process_id == 0:
        _listen(coordinator, processes, deadline, seconds)
    else:
        _report(coordinator, processes, process_id, deadline, seconds)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[address]:port". Raises HostsError for anything else."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise HostsError(
            f"coordinator {address[:80]!r}: expected the host name or address of process 0 and a free port there, "
            "such as 10.0.0.1:8476"
        )
    return match[1].strip("[]"), int(match[2])


def _listen(coordinator: str, processes: int, deadline: float, seconds: float) -> None:
    """Process 0's part."""
    with contextlib.ExitStack() as closing:
        listener = closing.enter_context(_listener(coordinator))
        arrived: dict[int, socket.socket] = {}
        problem = None
        while problem is None and len(arrived) < processes - 1:
            peer = _next_connection(listener, deadline)
            if peer is None:
                missing = [i for i in range(1, processes) if i not in arrived]
                problem = f"{named(missing)} of {processes} did not come to {coordinator} within {seconds:g} s"
                problem += ": is the command running there, and is that port open?"
                break
            closing.enter_context(peer)
            greeting = re.fullmatch(r"ministral (\d{1,9}) (\d{1,9})\n", _read_line(peer))
            if greeting:
                process_id, count = int(greeting[1]), int(greeting[2])
                problem = _problem_with(process_id, count, processes, arrived)
                arrived[peer.fileno() + processes if problem else process_id] = peer
        for peer in arrived.values():
            _say(peer, problem or _GO)
    if problem:
        raise HostsError(problem)


def _problem_with(process_id: int, count: int, processes: int, arrived: dict[int, socket.socket]) -> str | None:
    if count != processes:
        return f"process {process_id} was started as one of {count}, process 0 as one of {processes}"
    if process_id in arrived or not 0 < process_id < processes:
        return f"two processes were started as process {process_id} of {processes}: each needs an id of its own"
    return None


def _report(coordinator: str, processes: int, process_id: int, deadline: float, seconds: float) -> None:
    """The part of every other process."""
    with _connection(coordinator, processes, deadline, seconds) as peer:
        _say(peer, f"ministral {process_id} {processes}")
        peer.settimeout(max(deadline - time.monotonic(), 0) + _ANSWER_SECONDS)
        answer = _read_line(peer).strip()
    if not answer:
        raise HostsError(f"process 0 of {processes} at {coordinator} ended, or fell silent, while others were awaited")
    if answer != _GO:
        raise HostsError(answer)


def _listener(coordinator: str) -> socket.socket:
    _, port = split_address(coordinator)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise HostsError(
            f"coordinator {coordinator}: process 0 cannot listen at port {port} ({error.strerror}); choose another"
        ) from None


def _next_connection(listener: socket.socket, deadline: float) -> socket.socket | None:
    listener.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        peer, _ = listener.accept()
    except TimeoutError:
        return None
    peer.settimeout(_GREETING_SECONDS)
    return peer


def _connection(coordinator: str, processes: int, deadline: float, seconds: float) -> socket.socket:
    """A connection to process 0, which may start later than we."""
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection(split_address(coordinator), timeout=max(left, _RETRY_SECONDS))
        except OSError as error:
            if left <= 0:
                raise HostsError(
                    f"process 0 of {processes} did not come: nobody answers at {coordinator} within {seconds:g} s "
                    f"({error.strerror or error}); is the command running there, and is that port open?"
                ) from None
            time.sleep(_RETRY_SECONDS)


def _say(peer: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # whoever has left needs no answer
        peer.sendall(line.encode() + b"\n")


def _read_line(peer: socket.socket) -> str:
    """A line with its end; less if the connection ends or is silent before."""
    text = b""
    with contextlib.suppress(OSError):
        while not text.endswith(b"\n") and len(text) < _LONGEST_LINE and (read := peer.recv(_LONGEST_LINE)):
            text += read
    return text.decode(errors="replace")


def named(process_ids: list[int]) -> str:
    """ "process 3", "processes 1, 2 and 5", or with many of them the first few."""
    if len(process_ids) == 1:
        return f"process {process_ids[0]}"
    shown = process_ids if len(process_ids) <= 8 else process_ids[:7]
    last = str(shown[-1]) if shown == process_ids else f"{len(process_ids) - 7} more"
    first = shown[:-1] if shown == process_ids else shown
    return f"processes {', '.join(map(str, first))} and {last}"
