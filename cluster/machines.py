"""What a cluster's nodes hold: this machine, or all that a head's dashboard tells of."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name as the driver tells it, and its memory in bytes."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Node:
    """One machine; `memory_bytes` is what of its memory is not in use."""

    host: str
    cpus: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


def this_machine() -> Node:
    """The machine that this process runs on."""
    import psutil

    return Node("this machine", os.cpu_count() or 1, psutil.virtual_memory().available, _own_gpus())


def _own_gpus() -> tuple[Gpu, ...]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(properties.name, properties.total_memory) for properties in found)


def nodes_of(summary: Sequence[dict[str, Any]]) -> list[Node]:
    """The nodes alive in what a dashboard tells at /nodes?view=summary."""
    return [_node(told) for told in summary if (told.get("raylet") or {}).get("state") == "ALIVE"]


def _node(told: dict[str, Any]) -> Node:
    total, available = [*(told.get("mem") or ()), 0, 0][:2]
    gpus = [Gpu(gpu.get("name", "GPU"), int(gpu.get("memoryTotal", 0)) * 2**20) for gpu in told.get("gpus") or ()]
    resources = told["raylet"].get("resourcesTotal") or {}
    count = round(resources.get("GPU", len(gpus)))
    cpus = round(resources.get("CPU", (told.get("cpus") or (1,))[0]))
    return Node(told.get("ip") or told.get("hostname", "?"), cpus, int(available or total), tuple(gpus[:count]))


def describe(nodes: Sequence[Node]) -> list[str]:
    """The cluster in words, equal nodes together."""
    told = []
    for (cpus, gpus), count in Counter((node.cpus, node.gpus) for node in nodes).items():
        alike = [node for node in nodes if (node.cpus, node.gpus) == (cpus, gpus)]
        memory = min(node.memory_bytes for node in alike) / GIB
        line = f"{count} x {cpus} processors, {memory:.0f} GiB of memory free"
        for gpu, number in Counter(gpus).items():
            line += f", {number} x {gpu.name} of {gpu.memory_bytes / GIB:.0f} GiB"
        told.append(line)
    return told
