"""One program on several hosts: finding the others, starting jax over all of them, meeting, failing, ending together.

Every process runs the same program; jax joins their devices. Whether the processes agree is agreement.py's business.
What happens when one of them dies is described in supervisor.py. Without several processes all of this does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import HostsError
from .roll_call import call_roll, named, split_address
from .supervisor import FAILED, supervise

COORDINATOR, PROCESSES, PROCESS_ID = "MINISTRAL_COORDINATOR", "MINISTRAL_PROCESSES", "MINISTRAL_PROCESS_ID"

# A peer is taken for lost after this silence. Threads of C++ send the heartbeats, which neither compiling nor Python
# holds up; jax's own 100 s would keep the survivors waiting for longer than a minute.
HEARTBEAT_SECONDS = 40
START_SECONDS = 300  # hosts of a cluster start minutes apart
MEETING_SECONDS = 300

_FAILURE = "ministral/failure"
_LEFT = "ministral/left/"
_OWN_WORDS_SECONDS = 2.0  # for a process that fails like its peer to say so itself
_LEAVE_SECONDS = 10.0  # for the peers to hear of a failure before the coordinator goes
_WATCH_MILLISECONDS = 10_000
# What jax's own errors say where a peer broke the connection in the middle of a collective.
_LIKE_A_LOST_PEER = ("gloo", "nccl", "connection", "unavailable", "aborted", "deadline")


@dataclass(frozen=True)
class HostOptions:
    """How this process is to find the others; what is None comes from the environment, or from the cluster.

    `coordinator` is host:port of process 0. `heartbeat_seconds` is the silence after which a peer counts as lost,
    `start_seconds` how long to wait for all to come. Raises HostsError for values that cannot be.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = HEARTBEAT_SECONDS
    start_seconds: int = START_SECONDS

    def __post_init__(self) -> None:
        for name in ("heartbeat_seconds", "start_seconds"):
            if getattr(self, name) < 1:
                raise HostsError(f"{name}={getattr(self, name)}: expected at least 1 second")


@dataclass(frozen=True)
class Place:
    """This process among the others. `local_devices` restricts it to some of its host's, None to none of them."""

    coordinator: str
    processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        split_address(self.coordinator)
        if self.processes < 1:
            raise HostsError(f"{self.processes} processes: expected at least 1")
        if not 0 <= self.process_id < self.processes:
            raise HostsError(
                f"process id {self.process_id} of {self.processes} processes: expected 0 to {self.processes - 1}"
            )


def find_place(options: HostOptions, environment: Mapping[str, str] = os.environ) -> Place | None:
    """Where this process stands, or None if it is alone.

    From the options, each missing one from MINISTRAL_COORDINATOR, MINISTRAL_PROCESSES and MINISTRAL_PROCESS_ID; with
    none of them, from the cluster that jax detects: Open MPI, Slurm, Cloud TPU (GKE or VM), Kubernetes jobs.
    Raises HostsError for values that cannot be, or if only some of the three are given.
    """
    coordinator = options.coordinator or environment.get(COORDINATOR) or None
    processes = _number(options.processes, PROCESSES, environment)
    process_id = _number(options.process_id, PROCESS_ID, environment)
    if processes == 1 and coordinator is None and process_id in (None, 0):
        return None
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if all(value is None for value in given.values()):
        place = _detected(options.start_seconds, environment)
    elif coordinator is None or processes is None or process_id is None:
        variables = dict(zip(given, (COORDINATOR, PROCESSES, PROCESS_ID), strict=True))
        lacking = " and ".join(f"{name} ({variables[name]})" for name, value in given.items() if value is None)
        raise HostsError(f"{lacking} not given: several processes need all of {', '.join(given)}")
    else:
        place = Place(coordinator, processes, process_id)
    return place if place is not None and place.processes > 1 else None


def start(options: HostOptions | None = None, *, supervised: bool = False) -> Place | None:
    """Joins this process with the others; returns its place, or None if it is alone, and then nothing has happened.

    To be called before jax is used for anything. With `supervised`, as on the command line, the process forks and the
    parent never returns from here: see supervisor.py. In a program of your own, where forking may not do, what ends
    the others when one is lost is jax's own abort, with its words.
    Raises HostsError in one line, within `start_seconds`, if the others do not come.
    """
    global _watcher
    options = options or HostOptions()
    place = find_place(options)
    if place is None:
        return None
    _require_fresh()
    if supervised:
        supervise(place.coordinator, place.processes, place.process_id)
    call_roll(place.coordinator, place.processes, place.process_id, options.start_seconds)
    _initialize(place, options)
    _watcher = threading.Thread(target=_end_with_failed_peer, daemon=True)
    _watcher.start()
    return place


def process_id() -> int:
    """This process's number; 0 if it is alone."""
    return _state().process_id if _client() else 0


def n_processes() -> int:
    """How many processes there are; 1 if this one is alone."""
    return _state().num_processes if _client() else 1


def sync(name: str, seconds: float = MEETING_SECONDS) -> None:
    """Waits until every process has come to the point called `name`, each name once in a run.

    Raises HostsError naming those that have not come within `seconds`.
    """
    client = _client()
    if client is None:
        return
    client.key_value_set(f"ministral/sync/{name}/{process_id()}", "here")
    try:
        client.wait_at_barrier(f"ministral/sync/{name}", int(seconds * 1000))
    except _runtime_error() as error:
        come = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"ministral/sync/{name}")}
        missing = [i for i in range(n_processes()) if i not in come]
        if not missing:
            raise HostsError(f"the processes did not meet at {name}: {_short(error)}") from None
        raise HostsError(f"{named(missing)} of {n_processes()} did not come to {name} within {seconds:g} s") from None


def shared(name: str, value: str, seconds: float = MEETING_SECONDS) -> str:
    """Process 0's `value`, in every process; each name once in a run."""
    client = _client()
    if client is None:
        return value
    if process_id() == 0:
        client.key_value_set(f"ministral/shared/{name}", value)
        return value
    return wait_for(f"ministral/shared/{name}", f"process 0 of {n_processes()} did not say its {name}", seconds)


def wait_for(key: str, otherwise: str, seconds: float) -> str:
    """What another process gives to `key`. Raises HostsError, saying `otherwise`, if nothing comes within `seconds`."""
    try:
        return _client().blocking_key_value_get(key, max(int(seconds * 1000), 1))
    except _runtime_error() as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise HostsError(f"{otherwise} within {seconds:g} s") from None


def tell(key: str, value: str) -> None:
    """Gives `key` a value that the others can wait for."""
    _client().key_value_set(key, value)


def stop() -> None:
    """Ends jax's runtime over several hosts, all together, when everyone's work is done."""
    if _client() is None:
        return
    sync("the end")
    _ending.set()
    import jax

    jax.distributed.shutdown()
    if (
        _watcher is not None
    ):  # else it may come back from C++ into an interpreter that is gone, which aborts the process
        _watcher.join(_WATCH_MILLISECONDS / 1000)


def announce_failure(reason: str, error: BaseException | None = None) -> None:
    """Tells the others that this process fails, and why, so that they end as well instead of waiting for it.

    If `error` is one that jax raises where a peer broke a connection, the loss of that peer is waited for first, which
    ends this process with the right reason. To be followed by `leave`.
    """
    client = _client()
    if client is None or _ending.is_set():
        return
    if error is not None and _may_be_a_lost_peer(error):
        time.sleep(_heartbeat_seconds + _LEAVE_SECONDS)
    _ending.set()
    with contextlib.suppress(Exception):  # the first failure counts; nobody can hear of one when process 0 is gone
        client.key_value_set(_FAILURE, json.dumps({"process": process_id(), "reason": reason}))


def leave(code: int) -> None:
    """Ends a failed process at once where there are several, its last word spoken: jax would wait for the others first.

    Process 0 goes last, since with it goes what the others hear of a failure through.
    """
    client = _client()
    if code == 0 or client is None:
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        if process_id() == 0:
            _wait_until(lambda: len(client.key_value_dir_get(_LEFT)) >= n_processes() - 1, _LEAVE_SECONDS)
        else:
            client.key_value_set(_LEFT + str(process_id()), "left")
    os._exit(code)


_ending = threading.Event()
_watcher: threading.Thread | None = None
_heartbeat_seconds: float = HEARTBEAT_SECONDS


def _end_with_failed_peer() -> None:
    """Waits, in a thread of its own, for a peer to announce that it fails, and ends this process then."""
    client = _client()
    failure = None
    while failure is None and not _ending.is_set():
        try:
            failure = json.loads(client.blocking_key_value_get(_FAILURE, _WATCH_MILLISECONDS))
        except _runtime_error() as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return
    if failure is None or failure["process"] == process_id() or _ending.wait(_OWN_WORDS_SECONDS):
        return
    print(f"ministral: process {failure['process']} of {n_processes()} failed: {failure['reason']}", file=sys.stderr)
    leave(FAILED)


def _initialize(place: Place, options: HostOptions) -> None:
    """Starts jax's runtime. CPU devices of several processes talk through gloo."""
    global _heartbeat_seconds
    import jax

    _heartbeat_seconds = options.heartbeat_seconds
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process_id,
            local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=options.start_seconds,
            heartbeat_timeout_seconds=options.heartbeat_seconds,
            shutdown_timeout_seconds=MEETING_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise HostsError(f"process {place.process_id} of {place.processes} cannot start: {_short(error)}") from error


def _require_fresh() -> None:
    from jax._src import xla_bridge

    if _client() is not None:
        raise HostsError("several hosts: this process has joined the others before")
    if xla_bridge.backends_are_initialized():
        raise HostsError("several hosts: jax has been used before this process joined the others; join them first")


def _number(given: int | None, variable: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(variable)
    if given is not None or not text:
        return given
    if not (text.isascii() and text.isdigit()):
        raise HostsError(f"{variable}={text[:40]!r}: expected a whole number")
    return int(text)


def _detected(seconds: int, environment: Mapping[str, str]) -> Place | None:
    """The place that the cluster gives, as jax finds it; None where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a lone pod is told to install the client of Kubernetes
            coordinator, processes, process_id, devices = _ask_jax(seconds)
    except OSError:
        return None  # a machine with TPUs outside Google's cloud: there is no server of metadata to ask
    except Exception as error:
        if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" not in environment:
            return None  # a lone pod
        raise HostsError(
            f"the cluster's description of its processes cannot be read ({_short(error)}); give --coordinator, "
            "--processes and --process-id, or --processes 1 to run alone"
        ) from error
    if coordinator is None or processes is None or process_id is None:
        return None
    return Place(coordinator, processes, process_id, tuple(devices) if devices else None)


def _ask_jax(seconds: int) -> tuple[Any, Any, Any, Any]:
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)


def _state() -> Any:
    from jax._src import distributed

    return distributed.global_state


def _client() -> Any:
    """jax's connection to its coordination service; None in a process that is alone."""
    return _state().client if "jax" in sys.modules else None


def _runtime_error() -> type[Exception]:
    import jax

    return jax.errors.JaxRuntimeError


def _may_be_a_lost_peer(error: BaseException) -> bool:
    return isinstance(error, _runtime_error()) and any(word in str(error).lower() for word in _LIKE_A_LOST_PEER)


def _wait_until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
