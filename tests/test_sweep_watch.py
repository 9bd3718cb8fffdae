"""What a search waits for, by what the cluster holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console
from tiny_spec import write_tiny_spec

from sweeps import watch
from sweeps.folder import SweepFolder
from sweeps.loading import load_sweep
from training.errors import TenureError
from training.workspace import Workspace


def test_trials_of_more_workers_than_the_cluster_holds_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own processes run, and wait for workers; where the cluster has grown, they are let be."""
    write_tiny_spec(tmp_path, Path("/models/tiny"), scaling={"workers": 2})
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "spec.yaml", "preset": "quick", "wait_s": 1e-9}), encoding="utf-8")
    sweep, _ = load_sweep(path)
    running = [SimpleNamespace(status="RUNNING")]
    seen = watch.Watch(sweep, SweepFolder(tmp_path), Workspace.at(tmp_path), Console(quiet=True))
    monkeypatch.setattr(watch, "_whole_cluster", lambda: {"CPU": 2.0})
    seen.on_step_end(1, running)
    monkeypatch.setattr(watch, "_whole_cluster", lambda: {"CPU": 1.0})
    with pytest.raises(TenureError, match=r"no trial could start .* each waits for 2 CPU \(1 in all\)"):
        seen.on_step_end(2, running)
