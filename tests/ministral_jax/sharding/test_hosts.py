"""Several processes: whose place is where, and two real ones on this machine, 4 devices each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

from ministral_jax.cli import build_parser
from ministral_jax.cli import hosts as cli_hosts
from ministral_jax.cli.failures import UsageError
from ministral_jax.errors import HostsError
from ministral_jax.sharding import agreement
from ministral_jax.sharding.hosts import HostOptions, Place, find_place, start, sync
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

RUNNER = Path(__file__).with_name("hosts_runner.py")
REPOSITORY = Path(__file__).parents[3]

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}
GKE_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,job-1.svc",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "MINISTRAL_PROCESS")):
            monkeypatch.delenv(name)


def test_a_process_is_alone_when_nothing_says_otherwise():
    assert find_place(HostOptions(), {}) is None
    assert find_place(HostOptions(processes=1), {}) is None
    assert find_place(HostOptions("a:1", 1, 0), {}) is None
    assert start(HostOptions()) is None
    sync("alone")


def test_options_win_over_the_environment_one_by_one():
    environment = {"MINISTRAL_COORDINATOR": "a:1", "MINISTRAL_PROCESSES": "4", "MINISTRAL_PROCESS_ID": "3"}
    assert find_place(HostOptions(), environment) == Place("a:1", 4, 3)
    assert find_place(HostOptions(process_id=2), environment) == Place("a:1", 4, 2)
    assert find_place(HostOptions("[::1]:8476", 5, 4), environment) == Place("[::1]:8476", 5, 4)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (("a:1", 2, None), {}, r"--process-id \(MINISTRAL_PROCESS_ID\) not given: several processes need all of"),
        ((None, 2, None), {}, r"--coordinator \(MINISTRAL_COORDINATOR\) and --process-id \(MINISTRAL_PROCESS_ID\)"),
        (("a:1", 2, 2), {}, r"process id 2 of 2 processes: expected 0 to 1"),
        (("a:1", 2, -1), {}, r"process id -1 of 2 processes"),
        (("a", 2, 1), {}, r"coordinator 'a': expected the host name or address of process 0 and a free port"),
        (("a:99999", 2, 1), {}, r"coordinator 'a:99999'"),
        (("a:0", 2, 1), {}, r"coordinator 'a:0'"),
        (("::1:5", 2, 1), {}, r"coordinator '::1:5'"),
        (("a:1", 2, None), {"MINISTRAL_PROCESS_ID": "one"}, r"MINISTRAL_PROCESS_ID='one': expected a whole number"),
        ((None, None, None), {"MINISTRAL_PROCESSES": "2"}, r"--coordinator .* and --process-id .* not given"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(options, environment, said):
    with pytest.raises(HostsError, match=said) as caught:
        find_place(HostOptions(*options), environment)
    assert "\n" not in str(caught.value)


def test_a_timeout_below_a_second_is_refused():
    with pytest.raises(HostsError, match="heartbeat_seconds=0: expected at least 1 second"):
        HostOptions(heartbeat_seconds=0)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        (SLURM, Place("node007:61441", 2, 1, (0,))),  # 65535 - 4096 + 1 + job id modulo 4096
        (OPEN_MPI, Place("10.96.0.1:62624", 4, 2, (2,))),  # job 1531576320 / 4096 = 373920, likewise
        (GKE_TPU, Place("localhost:8482", 4, 3)),
    ],
)
def test_the_place_is_what_the_cluster_says(variables, place, monkeypatch):
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", "TPU_WORKER_ID" in variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place(HostOptions()) == place
    assert find_place(HostOptions(processes=1)) is None
    assert find_place(HostOptions("b:2", 3, 0)) == Place("b:2", 3, 0)


def test_a_cluster_that_describes_itself_badly_is_one_line(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HostsError, match=r"cannot be read \(invalid literal .*; give --coordinator, --processes") as it:
        find_place(HostOptions())
    assert "\n" not in str(it.value)


def test_joining_after_jax_was_used_is_refused():
    jax.devices()
    with pytest.raises(HostsError, match="jax has been used before this process joined the others; join them first"):
        start(HostOptions("127.0.0.1:1", 2, 0))


def compared_options(monkeypatch: pytest.MonkeyPatch, *command: str) -> dict[str, str]:
    """What a process of several gives to be compared before it runs a command."""
    compared: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(agreement, "require_agreement", compared.__setitem__)
    cli_hosts._agree(build_parser().parse_args(command))
    assert compared["versions"] == agreement.version_items()
    return compared["options"]


def test_options_and_the_contents_of_files_are_compared_but_not_who_a_process_is(tmp_path, monkeypatch):
    ids = tmp_path / "ids"
    ids.write_text("1,5,9")
    command = ("generate", "here", "--ids-file", str(ids), "--seed", "4", "--processes", "2", "--process-id")
    first = compared_options(monkeypatch, *command, "0")
    assert first["--seed"] == "4"
    moved = tmp_path / "elsewhere" / "ids"
    moved.parent.mkdir()
    moved.write_text("1,5,9")
    command = ("generate", "there", "--ids-file", str(moved), "--seed", "4", "--processes", "2", "--process-id")
    assert compared_options(monkeypatch, *command, "1") == first
    moved.write_text("1,5,8")
    other = compared_options(monkeypatch, *command, "1")
    assert {name for name in other if other[name] != first[name]} == {"the contents of --ids-file (ids)"}


def test_several_processes_cannot_read_stdin(monkeypatch):
    with pytest.raises(UsageError, match="--file -: stdin cannot be read by several processes; give a file"):
        compared_options(monkeypatch, "score", "here", "--file", "-")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def processes(*command: str, own: tuple[tuple[str, ...], ...] = ((), ())) -> Iterator[list[subprocess.Popen[str]]]:
    """The command as two processes of 4 devices each, with further arguments of their `own`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(REPOSITORY),
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command, *more],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in own
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@contextmanager
def runners(what: str) -> Iterator[list[subprocess.Popen[str]]]:
    coordinator = f"127.0.0.1:{free_port()}"
    with processes(str(RUNNER), what, coordinator, "2", own=(("0",), ("1",))) as started:
        yield started


def ended(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.long
def test_two_processes_compute_and_meet_and_only_the_first_speaks():
    with runners("meet") as (first, second):
        code, out, err = ended(first)
        assert code == 0, err
        assert [json.loads(line) for line in out.splitlines()] == [
            {"sum": 28.0},
            {"said": "process 1 of 2 did not come to lunch within 1 s", "seed": "41"},
        ]
        code, out, err = ended(second)
        assert (code, out) == (0, ""), err
        assert "[process 1] seed 41\n" in err


@pytest.mark.long
def test_differences_are_told_to_every_process_in_one_line():
    with runners("differ") as started:
        told = [
            {
                kind: line
                for text in ended(process)[2].splitlines()
                if "{" in text
                for kind, line in json.loads(text[text.index("{") :]).items()
            }
            for process in started
        ]
    end = "; all have to run the same program on the same files"
    expected = {
        "versions": f"process 1 differs from process 0 in jax: 0.0.1 there, {jax.__version__} in process 0{end}",
        "options": f"process 1 differs from process 0 in --max-tokens: 9 there, 8 in process 0{end}",
        "config": f"process 1 differs from process 0 in the config's moe: 8 experts there, nothing in process 0{end}",
        "same": None,
    }
    late = {"unattended": "process 1 of 2 did not come to the comparison of the unattended within 1 s"}
    assert told == [expected | late, expected]


@pytest.mark.long
@pytest.mark.parametrize("lost", [1, 0])
def test_the_death_of_a_process_ends_the_other_whose_last_line_names_it(lost):
    with runners("work") as started:
        victim, survivor = started[lost], started[1 - lost]
        assert started[0].stdout is not None
        assert started[0].stdout.readline() == '{"sum": 28.0}\n'
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        code, _, err = ended(survivor)
        assert time.monotonic() - began < 40
    assert code == 1
    mark, where = ("[process 1] ", " (the coordinator, 127.0.0.1:") if lost == 0 else ("", "")
    assert err.splitlines()[-1].startswith(f"{mark}ministral: process {lost} of 2{where}"), err
    assert " is lost: killed, out of memory, or its machine or network failed" in err.splitlines()[-1]


@pytest.mark.long
def test_a_process_that_fails_takes_the_other_along_at_once_and_gives_its_reason():
    with runners("fail") as (first, second):
        assert ended(second)[0] == 1
        began = time.monotonic()
        code, _, err = ended(first)
        assert time.monotonic() - began < 8  # less than a heartbeat
    assert code == 1
    assert err.splitlines()[-1] == "ministral: process 1 of 2 failed: no space left on its disk"


@pytest.mark.long
def test_the_command_line_compares_checkpoints_before_it_loads_them(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        write_tiny_checkpoint(tmp_path / name, tiny_config(), seed=seed)
    hosts = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process-id")
    score = ("-m", "ministral_jax.cli", "score", "--ids", "1,5,9", "--json", *hosts)
    with processes(*score, own=(("0", str(tmp_path / "one")), ("1", str(tmp_path / "other")))) as started:
        results = [ended(process) for process in started]
    assert [(code, out) for code, out, _ in results] == [(1, ""), (1, "")]
    for _, _, err in results:
        last = err.splitlines()[-1]
        assert "ministral: process 1 differs from process 0 in the tensors of consolidated.safetensors: sha256" in last
        assert "loaded as" not in err
