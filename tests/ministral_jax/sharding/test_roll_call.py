"""Processes that meet before jax is there, as threads."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ministral_jax.errors import HostsError
from ministral_jax.sharding.roll_call import call_roll, named


def free_address() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def told(calls: list[tuple[int, int]], seconds: float = 5.0) -> list[str | None]:
    """What each of the processes (id, how many it thinks there are) is told; None: all are there."""
    address = free_address()

    def one(call: tuple[int, int]) -> str | None:
        try:
            call_roll(address, call[1], call[0], seconds)
        except HostsError as error:
            return str(error).replace(address, "ADDRESS").replace("\n", "LINE BREAK")
        return None

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_all_go_on_when_all_have_come():
    assert told([(0, 4), (1, 4), (2, 4), (3, 4)]) == [None] * 4


def test_all_are_told_who_did_not_come():
    line = "processes 2 and 3 of 4 did not come to ADDRESS within 0.5 s: is the command running there, and is that "
    assert told([(0, 4), (1, 4)], 0.5) == [line + "port open?"] * 2


def test_a_missing_first_process_is_named():
    (line,) = told([(1, 2)], 0.4)
    assert line is not None
    assert line.startswith("process 0 of 2 did not come: nobody answers at ADDRESS within 0.4 s (Connection refused)")


def test_two_processes_with_one_id_are_told():
    lines = told([(0, 3), (1, 3), (1, 3)])
    assert set(lines) == {"two processes were started as process 1 of 3: each needs an id of its own"}


def test_processes_that_disagree_on_their_number_are_told():
    assert set(told([(0, 2), (1, 3)])) == {"process 1 was started as one of 3, process 0 as one of 2"}


def test_strangers_at_the_port_are_ignored():
    address = free_address()
    host, port = address.split(":")
    first = threading.Thread(target=call_roll, args=(address, 2, 0, 10.0))
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"ministral one two\n", b"", b"\xff" * 5000):
        while True:
            try:
                stranger = socket.create_connection((host, int(port)))
                break
            except ConnectionRefusedError:
                continue
        stranger.sendall(words)
        stranger.close()
    call_roll(address, 2, 1, 10.0)
    first.join()


def test_a_taken_port_is_one_line():
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostsError, match=f"process 0 cannot listen at port {port} .*in use.*; choose another"):
            call_roll(f"127.0.0.1:{port}", 2, 0, 1.0)


def test_long_lists_of_processes_are_cut():
    assert named([3]) == "process 3"
    assert named([1, 2, 5]) == "processes 1, 2 and 5"
    assert named(list(range(20))) == "processes 0, 1, 2, 3, 4, 5, 6 and 13 more"
