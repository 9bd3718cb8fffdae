"""What a manifest needs beside the spec: where runs lie, the image, the queue, and what one node holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from training.errors import Problem, raise_all
from training.spec import Scaling

_QUANTITY = re.compile(r"[1-9]\d*(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_K8S_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """Choices of an operator; `workers_per_node` is how many of Ray Train's workers one node holds."""

    workspace: str
    image: str = "tenure:latest"
    namespace: str = "default"
    claim: str | None = None
    queue: str | None = None
    priority: str | None = None
    env_secret: str | None = None
    redis: str | None = None
    memory: str = "32Gi"
    workers_per_node: int = 1
    hours: int = 24
    partition: str | None = None
    hosts: tuple[str, ...] = ()
    region: str | None = None
    machine: str | None = None
    project: str | None = None
    ssh_user: str = "ubuntu"

    def check(self) -> None:
        """Refuse what no cluster would take.

        Raises:
            TenureError: with every fault.
        """
        raise_all(self._problems())

    def _problems(self) -> list[Problem]:
        absolute = PurePosixPath(self.workspace).is_absolute()
        found = [
            (
                not absolute,
                f"'{self.workspace}' is no absolute path",
                "--workspace",
                "name a folder that all nodes see",
            ),
            (
                not _QUANTITY.fullmatch(self.memory),
                f"'{self.memory}' is no amount",
                "--memory",
                "give one such as 64Gi",
            ),
            (self.workers_per_node < 1, "a node holds at least one worker", "--workers-per-node", "give 1 or more"),
        ]
        for flag, name in (("--namespace", self.namespace), ("--claim", self.claim), ("--queue", self.queue)):
            wrong = name is not None and not _K8S_NAME.fullmatch(name)
            found.append((wrong, f"'{name}' is no name in Kubernetes", flag, "use lower-case letters, digits and '-'"))
        return [Problem(what, where, instead) for wrong, what, where, instead in found if wrong]

    def nodes(self, scaling: Scaling) -> int:
        """How many nodes hold the workers."""
        return math.ceil(scaling.workers / self.workers_per_node)

    def per_node(self, scaling: Scaling) -> tuple[int, int]:
        """Processors and GPUs of a node."""
        workers = min(self.workers_per_node, scaling.workers)
        return workers * scaling.cpus_per_worker, workers * scaling.gpus_per_worker
