"""What a worker is sent, made where no worker's library is needed: it takes torch and its friends seconds to import."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.plan import Plan
from training.spec import RunSpec
from training.workspace import RunFolder


@dataclass(frozen=True)
class Job:
    """What a worker is sent: plain values, so that any process can read them."""

    spec: dict[str, Any]
    plan: dict[str, Any]
    prepared: str
    run: str
    spec_hash: str
    aids: dict[str, str]


def make_job(
    spec: RunSpec, plan: Plan, prepared: Path, folder: RunFolder, spec_hash: str, aids: dict[str, str]
) -> dict[str, Any]:
    """A worker's job as plain values."""
    job = Job(spec.model_dump(mode="json"), asdict(plan), str(prepared), str(folder.path), spec_hash, aids)
    return asdict(job)


def drop_torn_row(metrics: Path) -> None:
    """Cut off the row that a killed worker, or a full disk, left half-written at the end."""
    if metrics.is_file():
        whole = metrics.read_bytes().rfind(b"\n") + 1
        os.truncate(metrics, whole)
