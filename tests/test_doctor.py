"""What the doctor finds wrong, on nodes made up for it and on a Ray of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.doctor import GIB, Link, NodeFacts, diagnose, examine

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


def test_a_real_node_is_examined(ray_cluster: None, tmp_path: Path) -> None:
    found = examine(tmp_path / "workspace")
    (node,) = found.nodes
    assert node.workspace is None
    assert abs(node.clock_offset_s) < 5
    assert node.versions["ray"].startswith("2.")
    assert list((tmp_path / "workspace").iterdir()) == []
    assert found.links == ()
