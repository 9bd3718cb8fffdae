"""Sweeps: a tournament of strategies under a retention contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweeps.result import SweepResult


def run_sweep(spec: str | Path, workspace: str | Path | None = None, address: str | None = None) -> SweepResult:
    """Run the sweep of a spec file, as `tenure sweep` does; what came of it.

    Args:
        workspace: the folder of runs and caches; by default $TENURE_WORKSPACE, or ./workspace.
        address: a Ray head; by default a local Ray that ends with the sweep.

    Raises:
        TenureError: with every fault of the spec.
    """
    from cluster.sweep import start_sweep
    from training.workspace import Workspace

    return start_sweep(Path(spec), Workspace.at(workspace), address)
