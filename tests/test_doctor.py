"""What the doctor finds wrong, on nodes made up for it and on a Ray of its own."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.doctor import GIB, Closed, Link, NodeFacts, diagnose, examine
from cluster.doctor_probe import Probe

WELL = NodeFacts(
    host="a",
    versions={"python": "3.11.7", "ray": "2.60.0"},
    gpus=("H100",) * 8,
    driver="570.1",
    shm_bytes=16 * GIB,
    disk_free_bytes=100 * GIB,
    clock_offset_s=0.01,
    authentication="token",
    workspace=None,
)
OTHER, THIRD = replace(WELL, host="b"), replace(WELL, host="c")
FAST = Link("a", "b", 1.2e9)


def test_a_cluster_that_is_well_has_no_problems() -> None:
    assert diagnose([WELL, OTHER, THIRD], [FAST]) == ()


@pytest.mark.parametrize(
    ("changes", "told", "mended"),
    [
        (
            {"versions": {"python": "3.12.1", "ray": "2.60.0"}},
            "python is 3.12.1, where others have 3.11.7",
            "one image",
        ),
        ({"versions": {"python": "3.11.7", "ray": "none"}}, "ray is none", "one image"),
        ({"workspace": "Permission denied: /shared"}, "the workspace is not shared: Permission denied", "mount"),
        ({"gpus": ("A100",) * 8}, "different GPUs", "equal nodes"),
        ({"driver": "535.0"}, "different drivers", "update drivers"),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm has 0.1 GiB", "--shm-size"),
        ({"disk_free_bytes": GIB}, "1.0 GiB of disk are free", "--temp-dir"),
        ({"clock_offset_s": -90.0}, "the clock is -90.0 s off", "chrony"),
        ({"authentication": "disabled"}, "asks nobody for a token", "get-auth-token"),
    ],
)
def test_each_fault_is_told_with_its_place_and_its_cure(changes: dict[str, object], told: str, mended: str) -> None:
    (problem,) = diagnose([WELL, OTHER, replace(THIRD, **changes)], [])  # type: ignore[arg-type]
    assert told in problem.what
    assert mended in problem.instead
    assert problem.where in ("c", "cluster")


@pytest.mark.parametrize(
    ("link", "told"), [(Link("a", "b", 2e7), "0.02 GB/s"), (Link("a", "b", None, "timed out"), "timed out")]
)
def test_a_slow_or_dead_link_is_told_by_its_ends(link: Link, told: str) -> None:
    (problem,) = diagnose([WELL, OTHER], [link])
    assert problem.where == "a to b"
    assert told in problem.what


def test_ports_that_are_not_reached_are_told_together_for_each_pair() -> None:
    closed = [Closed("a", "b", 8076, "Ray's object manager"), Closed("a", "b", 40001, "one chosen by the system")]
    (problem,) = diagnose([WELL, OTHER], [], closed)
    assert problem.where == "a to b"
    assert "8076 (Ray's object manager), 40001 (one chosen by the system)" in problem.what
    assert "all ports" in problem.instead


def test_a_closed_port_is_told_from_an_open_one() -> None:
    probe = Probe("127.0.0.1")
    open_port = probe.listen()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        assert probe.unreached("127.0.0.1", [open_port, port]) == [port]


def test_a_real_node_is_examined(ray_cluster: None, tmp_path: Path) -> None:
    found = examine(tmp_path / "workspace")
    (node,) = found.nodes
    assert node.workspace is None
    assert abs(node.clock_offset_s) < 5
    assert node.versions["ray"].startswith("2.")
    assert list((tmp_path / "workspace").iterdir()) == []
    assert found.links == ()
