"""`tenure cluster doctor`: what every node of a Ray cluster has and can do, what is wrong, and how to mend that."""

from __future__ import annotations

import itertools
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import Problem

GIB = 2**30
SLOWEST_BYTES_S = 0.1e9
_CLOCK_S = 1.0
_SHM_BYTES = 2 * GIB
_DISK_BYTES = 10 * GIB


@dataclass(frozen=True)
class NodeFacts:
    """What a node tells of itself; sizes in bytes, the clock's offset from this machine's in seconds."""

    host: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    driver: str | None
    shm_bytes: int
    disk_free_bytes: int
    clock_offset_s: float
    authentication: str
    workspace: str | None
    """Why the workspace cannot be shared, or None."""


@dataclass(frozen=True)
class Link:
    """Bytes a second from one node to another, or why nothing came through."""

    source: str
    target: str
    bytes_s: float | None
    fault: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was asked, and what is wrong."""

    nodes: tuple[NodeFacts, ...]
    links: tuple[Link, ...]
    problems: tuple[Problem, ...] = field(default=())


def diagnose(nodes: Sequence[NodeFacts], links: Sequence[Link]) -> tuple[Problem, ...]:
    """What is wrong, and how to mend it, in the order of what a run needs first."""
    found = (*_versions(nodes), *_workspace(nodes), *_gpus(nodes), *_sizes(nodes), *_clocks(nodes), *_links(links))
    return (*found, *_authentication(nodes))


def _versions(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    """Packages that a node lacks, or has in another version than most."""
    for package in sorted({name for node in nodes for name in node.versions}):
        usual = Counter(node.versions.get(package, "none") for node in nodes).most_common(1)[0][0]
        for node in nodes:
            version = node.versions.get(package, "none")
            if version != usual or version == "none":
                others = "" if version == usual else f", where others have {usual}"
                yield Problem(f"{package} is {version}{others}", node.host, "give all nodes one image")


def _workspace(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    for node in nodes:
        if node.workspace is not None:
            instead = "mount one folder under the same path on every node, writable by Ray's user, as --workspace"
            yield Problem(f"the workspace is not shared: {node.workspace}", node.host, instead)


def _gpus(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    having = [node for node in nodes if node.gpus]
    for name, values in (("GPUs", [node.gpus for node in having]), ("drivers", [node.driver for node in having])):
        if len(set(values)) > 1:
            told = "; ".join(f"{node.host}: {value}" for node, value in zip(having, values, strict=True))
            instead = "all wait for the slowest: run on equal nodes, or update drivers"
            yield Problem(f"nodes have different {name}: {told}", "cluster", instead)


def _sizes(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    for node in nodes:
        if node.shm_bytes < _SHM_BYTES:
            what = f"/dev/shm has {node.shm_bytes / GIB:.1f} GiB, which Ray and NCCL share between processes"
            yield Problem(what, node.host, "docker run --shm-size=16g, or in a pod an emptyDir of medium Memory there")
        if node.disk_free_bytes < _DISK_BYTES:
            what = f"{node.disk_free_bytes / GIB:.1f} GiB of disk are free where Ray keeps its session"
            yield Problem(what, node.host, "free some space, or ray start --temp-dir on a larger disk")


def _clocks(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    for node in nodes:
        if abs(node.clock_offset_s) > _CLOCK_S:
            what = f"the clock is {node.clock_offset_s:+.1f} s off"
            yield Problem(what, node.host, "run chrony or ntpd; logs and caches go by the time")


def _links(links: Sequence[Link]) -> Iterator[Problem]:
    for link in links:
        where = f"{link.source} to {link.target}"
        if link.bytes_s is None:
            instead = "open all ports between nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for ray start"
            yield Problem(f"nothing came through by gloo: {link.fault}", where, instead)
        elif link.bytes_s < SLOWEST_BYTES_S:
            what = f"gloo carries {link.bytes_s / 1e9:.2f} GB/s"
            yield Problem(what, where, "check the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or prefer ZeRO 1")


def _authentication(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    if any(node.authentication != "token" for node in nodes):
        instead = "ray get-auth-token --generate, and RAY_AUTH_MODE=token where Ray and tenure start"
        yield Problem("Ray asks nobody for a token: whoever reaches its ports runs code there", "cluster", instead)


def examine(workspace: Path) -> Diagnosis:
    """Ask every node of the Ray that this process is connected to."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.doctor_probe import Probe

    mark = secrets.token_hex(8)
    marker = workspace / f".doctor-{mark}"
    workspace.mkdir(parents=True, exist_ok=True)
    marker.write_text(mark, encoding="utf-8")
    probes = {}
    try:
        for node in ray.nodes():
            if node["Alive"]:
                pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                name = node["NodeManagerAddress"]
                probes[name] = ray.remote(Probe).options(num_cpus=0, scheduling_strategy=pinned).remote(name)
        nodes = tuple(_ask(probe, marker, mark) for probe in probes.values())
        links = tuple(_measure(probes))
    finally:
        marker.unlink(missing_ok=True)
        for answer in workspace.glob(f"{marker.name}-*"):
            answer.unlink(missing_ok=True)
        for probe in probes.values():
            ray.kill(probe)
    return Diagnosis(nodes, links, diagnose(nodes, links))


def _ask(probe: object, marker: Path, mark: str) -> NodeFacts:
    import time

    import ray

    facts: NodeFacts = ray.get(probe.facts.remote(str(marker), mark), timeout=120)  # type: ignore[attr-defined]
    asked = time.time()
    told: float = ray.get(probe.now.remote(), timeout=30)  # type: ignore[attr-defined]
    offset = told - (asked + time.time()) / 2
    answered = Path(f"{marker}-{facts.host}").is_file()
    fault = facts.workspace or (None if answered else "what it wrote there is not seen from here")
    return NodeFacts(**{**vars(facts), "clock_offset_s": offset, "workspace": fault})


def _measure(probes: dict[str, object]) -> Iterator[Link]:
    """Every pair, one after the other, so that none has to share the network."""
    import ray
    from ray.exceptions import RayError

    for source, target in itertools.combinations(probes, 2):
        where = ray.get(probes[source].address.remote(), timeout=30)  # type: ignore[attr-defined]
        sides = [
            probes[name].exchange.remote(rank, where)  # type: ignore[attr-defined]
            for rank, name in enumerate((source, target))
        ]
        try:
            yield Link(source, target, min(ray.get(sides, timeout=90)))
        except (RayError, TimeoutError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            yield Link(source, target, None, lines[-1][:200])


def authentication_mode() -> str:
    """What Ray on this node asks of those who come: a token, or nothing."""
    return os.environ.get("RAY_AUTH_MODE", "disabled").lower()
