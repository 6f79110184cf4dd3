"""What each process of a test on several hosts runs: python hosts_runner.py WHAT HOST:PORT PROCESSES ID. No tests here.

Results are JSON on stdout, which only process 0 has.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from ministral_jax.errors import HostsError
from ministral_jax.sharding import agreement, hosts

HEARTBEAT_SECONDS = 10


def main(what: str, coordinator: str, processes: str, process_id: str) -> None:
    options = hosts.HostOptions(coordinator, int(processes), int(process_id), HEARTBEAT_SECONDS, start_seconds=100)
    hosts.start(options, supervised=True)
    print(json.dumps({"sum": sum_over_devices()}), flush=True)
    {"meet": meet, "differ": differ, "work": work, "fail": fail}[what]()
    hosts.stop()


def sum_over_devices() -> float:
    """0 + 1 + ... over all devices of all processes, through a collective."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("all",), axis_types=(AxisType.Auto,))
    x = jax.make_array_from_callback((n,), NamedSharding(mesh, P("all")), lambda index: np.arange(float(n))[index])
    summed = jax.shard_map(lambda part: jax.lax.psum(part, "all"), mesh=mesh, in_specs=P("all"), out_specs=P())
    return float(jax.jit(summed)(x)[0])


def meet() -> None:
    """A point that all reach, one that process 1 misses, and a value of process 0."""
    hosts.sync("breakfast")
    said = None
    if hosts.process_id() == 0:
        said = error_of(lambda: hosts.sync("lunch", seconds=1))
    seed = hosts.shared("seed", str(41 + hosts.process_id()))
    print(json.dumps({"said": said, "seed": seed}))
    sys.stderr.write(f"seed {seed}\n")


def differ() -> None:
    """One comparison for each kind of thing that may differ; every process writes what it was told to stderr."""
    second = hosts.process_id() == 1
    kinds = {
        "versions": agreement.version_items() | ({"jax": "0.0.1"} if second else {}),
        "options": {"--max-tokens": "9" if second else "8", "--seed": "1"},
        "config": {"the config's dim": "64"} | ({"the config's moe": "8 experts"} if second else {}),
        "same": {"the size of a file": "1 byte"},
    }
    for kind, items in kinds.items():
        told = error_of(lambda kind=kind, items=items: agreement.require_agreement(kind, items))
        sys.stderr.write(json.dumps({kind: told}) + "\n")
    if not second:
        told = error_of(lambda: agreement.require_agreement("unattended", {}, seconds=1))
        sys.stderr.write(json.dumps({"unattended": told}) + "\n")


def work() -> None:
    """Collectives without end."""
    while True:
        sum_over_devices()
        time.sleep(0.05)


def fail() -> None:
    """Process 1 has bad luck; process 0 would work on."""
    if hosts.process_id() == 0:
        work()
    hosts.announce_failure("no space left on its disk")
    hosts.leave(1)


def error_of(action) -> str | None:
    try:
        action()
    except HostsError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
