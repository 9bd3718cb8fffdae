"""A cluster of three hosts, a run submitted to it from a fourth, and a host that drops off the network on the way."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import last_step
from conftest import WholeRun
from hosts import GCS_PORT, HEAD, Hosts, several_hosts, why_no_hosts
from jobs import LONG, TWO_WORKERS, rows_of, write_spec
from test_resume import assert_no_step_is_missing, assert_same_artifact

from training.workspace import RunFolder

WORKERS = ("east", "west")
REASON = why_no_hosts()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Ray on three hosts of one CPU each, with tokens asked for."""
    with several_hosts(*WORKERS) as made:
        made.start_ray(
            HEAD,
            "--head",
            f"--port={GCS_PORT}",
            "--dashboard-host=0.0.0.0",
            f"--temp-dir={made.scratch}/ray",
        )
        for worker in WORKERS:
            made.start_ray(worker, f"--address={made.addresses[HEAD]}:{GCS_PORT}")
        made.wait_for_nodes(3)
        yield made


def ended(process: subprocess.Popen[str], wait_s: float = 60.0) -> tuple[int, str]:
    """Exit status of a command and all that it printed."""
    out, err = process.communicate(timeout=wait_s)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def spec(hosts: Hosts, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scaling = TWO_WORKERS | {"max_failures": 3}
    promise = {"contract": {"min_gain": 0.0, "max_loss": 100.0}}
    folder = tmp_path_factory.mktemp("hosts")
    return write_spec(folder, tiny_model, training=LONG, scaling=scaling, amend=promise)


def workspace(hosts: Hosts) -> Path:
    return hosts.scratch / "workspace"


@pytest.mark.parametrize(("token", "told"), [("wrong" * 6, "does not take this token"), (None, "wants a token")])
def test_a_cluster_that_asks_for_a_token_tells_so(hosts: Hosts, token: str | None, told: str) -> None:
    status, said = ended(hosts.tenure("jobs", "--address", hosts.dashboard, token=token))
    assert (status, told in said, "Traceback" in said) == (2, True, False), said


def test_a_spec_that_is_larger_than_the_cluster_is_refused(hosts: Hosts, tiny_model: Path, tmp_path: Path) -> None:
    large = write_spec(tmp_path, tiny_model, scaling={"workers": 4, "gpus_per_worker": 1, "zero_stage": 1})
    root = ("--workspace", str(workspace(hosts)), "submit", "train", str(large), "--address", hosts.dashboard)
    status, said = ended(hosts.tenure(*root))
    assert status == 2, said
    assert "4 CPU of 3" in said
    assert "4 GPU of 0" in said


def test_the_doctor_tells_of_two_hosts_that_do_not_reach_each_other(hosts: Hosts) -> None:
    east, west = (hosts.addresses[name] for name in WORKERS)
    hosts.part("east", "west")
    try:
        head = f"{hosts.addresses[HEAD]}:{GCS_PORT}"
        root = ("-m", "cluster", "--workspace", str(workspace(hosts)), "cluster", "doctor", "--address", head)
        status, said = ended(hosts.start(HEAD, sys.executable, *root), 240)
    finally:
        hosts.join("east", "west")
    assert status == 1, said
    for worker in (east, west):
        assert re.search(rf"{hosts.addresses[HEAD]} to {worker} by gloo: \d+\.\d+ GB/s", said), said
        assert f"{hosts.addresses[HEAD]} to {worker}: these ports" not in said
    told = [line for line in said.splitlines() if "these ports are not reached" in line]
    assert len(told) == 2, said
    assert all(east in line and west in line and "object manager" in line for line in told), said


@pytest.fixture(scope="module")
def cut_run(hosts: Hosts, spec: Path) -> tuple[RunFolder, str]:
    """A submitted run one of whose hosts, not the head, lost its network on the way; and what was told of it."""
    root = ("--workspace", str(workspace(hosts)), "submit", "train", str(spec), "--address", hosts.dashboard)
    process = hosts.tenure(*root, "--id", "far", "--follow")
    run = RunFolder(workspace(hosts) / "runs" / "far")
    wait_for_step(10, run, process)
    busy = [name for name in (HEAD, *WORKERS) if any("RayTrainWorker" in title for title in hosts.titles(name))]
    assert len(busy) == 2, "two workers on two hosts"
    hosts.cut(next(name for name in busy if name != HEAD))
    status, said = ended(process, 600)
    assert status == 0, said
    return run, said


def wait_for_step(step: int, run: RunFolder, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not (run.metrics.is_file() and last_step(run) >= step):
        if process.poll() is not None:
            pytest.fail("".join(process.communicate()))
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def test_a_run_outlives_a_host_and_ends_as_if_nothing_had_been(
    cut_run: tuple[RunFolder, str], kept_run: WholeRun
) -> None:
    run, _ = cut_run
    assert len([row for row in rows_of(run) if row["kind"] == "resume"]) == 1
    assert_no_step_is_missing(run)
    assert_same_artifact(run, kept_run.run)


def test_the_cluster_counts_the_lost_host_out(cut_run: tuple[RunFolder, str], hosts: Hosts) -> None:
    hosts.wait_for_nodes(2)
