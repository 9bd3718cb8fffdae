"""`tenure cluster doctor`: what every node of a Ray cluster has and can do, what is wrong, and how to mend that."""

from __future__ import annotations

import itertools
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import Problem

GIB = 2**30
SLOWEST_BYTES_S = 0.1e9
_CLOCK_S = 1.0
_SHM_BYTES = 2 * GIB
_DISK_BYTES = 10 * GIB
_GPU_S = 30.0


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
    """Bytes a second from one node to another, or why nothing came through; `by` is gloo, or NCCL between GPUs."""

    source: str
    target: str
    bytes_s: float | None
    fault: str = ""
    by: str = "gloo"


@dataclass(frozen=True)
class Closed:
    """A port of a node, by what listens there, that another node does not reach."""

    source: str
    target: str
    port: int
    what: str


@dataclass(frozen=True)
class Diagnosis:
    """All that was asked, and what is wrong."""

    nodes: tuple[NodeFacts, ...]
    links: tuple[Link, ...]
    closed: tuple[Closed, ...] = ()
    problems: tuple[Problem, ...] = field(default=())


def diagnose(nodes: Sequence[NodeFacts], links: Sequence[Link], closed: Sequence[Closed] = ()) -> tuple[Problem, ...]:
    """What is wrong, and how to mend it, in the order of what a run needs first."""
    of_nodes = (*_versions(nodes), *_workspace(nodes), *_gpus(nodes), *_sizes(nodes), *_clocks(nodes))
    return (*of_nodes, *_ports(closed), *_links(links), *_authentication(nodes))


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


def _ports(closed: Sequence[Closed]) -> Iterator[Problem]:
    """The ports that one node does not reach at another, told together."""
    for pair in dict.fromkeys((one.source, one.target) for one in closed):
        told = ", ".join(f"{one.port} ({one.what})" for one in closed if (one.source, one.target) == pair)
        instead = "let all nodes reach each other at all ports; Ray and gloo choose most of theirs when they start"
        yield Problem(f"these ports are not reached: {told}", f"{pair[0]} to {pair[1]}", instead)


def _links(links: Sequence[Link]) -> Iterator[Problem]:
    for link in links:
        where = f"{link.source} to {link.target}"
        if link.bytes_s is None:
            instead = "open all ports between nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for ray start"
            yield Problem(f"nothing came through by {link.by}: {link.fault}", where, instead)
        elif link.bytes_s < SLOWEST_BYTES_S:
            what = f"{link.by} carries {link.bytes_s / 1e9:.2f} GB/s"
            yield Problem(what, where, "check the interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or prefer ZeRO 1")


def _authentication(nodes: Sequence[NodeFacts]) -> Iterator[Problem]:
    if any(node.authentication != "token" for node in nodes):
        instead = "ray get-auth-token --generate, and RAY_AUTH_MODE=token where Ray and tenure start"
        yield Problem("Ray asks nobody for a token: whoever reaches its ports runs code there", "cluster", instead)


def examine(workspace: Path) -> Diagnosis:
    """Ask every node of the Ray that this process is connected to."""
    import ray

    mark = secrets.token_hex(8)
    marker = workspace / f".doctor-{mark}"
    workspace.mkdir(parents=True, exist_ok=True)
    marker.write_text(mark, encoding="utf-8")
    alive = [node for node in ray.nodes() if node["Alive"]]
    probes = {node["NodeManagerAddress"]: _probe_on(node) for node in alive}
    try:
        nodes = tuple(_ask(probe, marker, mark) for probe in probes.values())
        closed = tuple(_try_ports(alive, probes))
        apart = {frozenset((one.source, one.target)) for one in closed}
        links = (*_measure(probes, apart), *_measure_gpus(alive, apart))
    finally:
        marker.unlink(missing_ok=True)
        for answer in workspace.glob(f"{marker.name}-*"):
            answer.unlink(missing_ok=True)
        for probe in probes.values():
            ray.kill(probe)
    return Diagnosis(nodes, links, closed, diagnose(nodes, links, closed))


def _probe_on(node: dict[str, Any], gpus: int = 0) -> Any:
    """A probe on a node, which waits for a GPU of it if it wants one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.doctor_probe import Probe

    pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    made = ray.remote(Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=pinned)
    return made.remote(node["NodeManagerAddress"])


# What listens on every node, by its key in what Ray tells of the node.
_LISTENERS = {"NodeManagerPort": "Ray's node manager", "ObjectManagerPort": "Ray's object manager"}


def _try_ports(alive: Sequence[dict[str, Any]], probes: dict[str, Any]) -> Iterator[Closed]:
    """What a node does not reach at another: Ray's own ports, and one that is chosen when it is needed."""
    import ray

    for target in alive:
        host = target["NodeManagerAddress"]
        chosen = ray.get(probes[host].listen.remote(), timeout=30)
        ports = {int(target[key]): what for key, what in _LISTENERS.items() if target.get(key)}
        ports[chosen] = "one chosen by the system"
        others = {name: probe.unreached.remote(host, list(ports)) for name, probe in probes.items() if name != host}
        for name, asked in others.items():
            yield from (Closed(name, host, port, ports[port]) for port in ray.get(asked, timeout=60))


def _ask(probe: Any, marker: Path, mark: str) -> NodeFacts:
    import time

    import ray

    facts: NodeFacts = ray.get(probe.facts.remote(str(marker), mark), timeout=120)
    asked = time.time()
    told: float = ray.get(probe.now.remote(), timeout=30)
    offset = told - (asked + time.time()) / 2
    answered = Path(f"{marker}-{facts.host}").is_file()
    fault = facts.workspace or (None if answered else "what it wrote there is not seen from here")
    return NodeFacts(**{**vars(facts), "clock_offset_s": offset, "workspace": fault})


def _measure(probes: dict[str, Any], apart: set[frozenset[str]], by: str = "gloo") -> Iterator[Link]:
    """Every pair that reaches each other, one after the other, so that none has to share the network."""
    for source, target in itertools.combinations(probes, 2):
        if frozenset((source, target)) not in apart:
            yield _exchange(probes, source, target, by)


def _exchange(probes: dict[str, Any], source: str, target: str, by: str) -> Link:
    import ray
    from ray.exceptions import RayError

    try:
        where = ray.get(probes[source].address.remote(), timeout=30)
        sides = [probes[name].exchange.remote(rank, where, by) for rank, name in enumerate((source, target))]
        return Link(source, target, min(ray.get(sides, timeout=90)), by=by)
    except (RayError, TimeoutError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return Link(source, target, None, lines[-1][:200], by)


def _measure_gpus(alive: Sequence[dict[str, Any]], apart: set[frozenset[str]]) -> Iterator[Link]:
    """By NCCL, between the first free GPUs of nodes that have some; a node whose GPUs are taken is left out."""
    import ray

    having = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    probes = {node["NodeManagerAddress"]: _probe_on(node, gpus=1) for node in having} if len(having) > 1 else {}
    try:
        ready = {name: probe for name, probe in probes.items() if _answers(probe)}
        yield from _measure(ready, apart, "nccl")
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _answers(probe: Any) -> bool:
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        ray.get(probe.now.remote(), timeout=_GPU_S)
    except GetTimeoutError:
        return False
    return True


def authentication_mode() -> str:
    """What Ray on this node asks of those who come: a token, or nothing."""
    return os.environ.get("RAY_AUTH_MODE", "disabled").lower()
