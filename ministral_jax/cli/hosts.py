"""Commands on several hosts: their arguments, and joining the other processes before a command runs."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .arguments import positive, whole
from .failures import UsageError, describe
from .output import speak_only_of_trouble

# What a process may have otherwise than the others: who it is, where its copy of the files lies, what it shows.
_OWN = ("process_id", "model", "adapter", "debug", "run", "command", "file", "ids_file", "coordinator")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """How the command finds the other processes when it is started on several hosts."""
    group = parser.add_argument_group(
        "several hosts", "the same command on each; under Slurm, Open MPI and on Cloud TPUs nothing needs to be given"
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, and a free port there (default: MINISTRAL_COORDINATOR, else as the cluster says)",
    )
    group.add_argument(
        "--processes", type=positive, metavar="N", help="how many there are (default: MINISTRAL_PROCESSES, ...)"
    )
    group.add_argument(
        "--process-id", type=whole, metavar="I", help="of this one, from 0 (default: MINISTRAL_PROCESS_ID, ...)"
    )
    group.add_argument(
        "--heartbeat-timeout",
        type=positive,
        metavar="S",
        help="seconds of silence after which a process is taken for lost and all end (default: 40)",
    )
    group.add_argument(
        "--start-timeout", type=positive, metavar="S", help="seconds to wait for all to come (default: 300)"
    )


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Runs a command together with the other processes, where it has the arguments of `add_hosts` and there are any.

    Versions and options are compared before the command begins; all end together, in success and in failure.
    """
    if not hasattr(arguments, "process_id"):
        yield
        return
    from ..sharding import hosts

    given = {"heartbeat_seconds": arguments.heartbeat_timeout, "start_seconds": arguments.start_timeout}
    place = hosts.start(
        hosts.HostOptions(
            arguments.coordinator,
            arguments.processes,
            arguments.process_id,
            **{name: value for name, value in given.items() if value is not None},
        ),
        supervised=True,
    )
    if place is None:
        yield
        return
    if place.process_id != 0:
        speak_only_of_trouble()
    if getattr(arguments, "mesh", "") is None:
        arguments.mesh = "auto"  # else each would compute the same alone
    try:
        _agree(arguments)
        yield
        hosts.stop()
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else describe(error)
        hosts.announce_failure(reason, error)
        raise


def _agree(arguments: argparse.Namespace) -> None:
    from ..sharding.agreement import digest, require_agreement, version_items
    from ..sharding.hosts import shared

    require_agreement("versions", version_items())
    if getattr(arguments, "seed", 0) is None:
        arguments.seed = int(shared("seed", str(random.getrandbits(31))))
    options = {name: value for name, value in vars(arguments).items() if name not in _OWN}
    items = {f"--{name.replace('_', '-')}": str(value) for name, value in options.items()}
    for option, value in _texts(arguments):
        if value == "-":
            raise UsageError(f"{option} -: stdin cannot be read by several processes; give a file")
        if option != "--prompt":
            items[f"the contents of {option} ({Path(value).name})"] = digest(Path(value).read_bytes())
    require_agreement("options", items)


def _texts(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Options that name files, or stdin, and their values."""
    prompts = getattr(arguments, "prompt", None) or []
    named = [("--prompt", text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
    named += [("--image", path) for path in getattr(arguments, "image", [])]
    for option in ("file", "ids_file"):
        if value := getattr(arguments, option, None):
            named.append((f"--{option.replace('_', '-')}", value))
    return named


def leave(arguments: argparse.Namespace, code: int) -> None:
    """Ends the process at once if the command failed among several."""
    if hasattr(arguments, "process_id"):
        from ..sharding import hosts

        hosts.leave(code)
