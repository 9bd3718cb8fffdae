"""`tenure runs`: what the tracking store knows of this workspace's runs."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from training.mlflow_store import client
from training.tracking import EXPERIMENT
from training.workspace import Workspace

SHOWN = 50


def print_runs(workspace: Workspace) -> None:
    """A table of runs with state, verdict and the change on every suite, newest first."""
    store = client(workspace)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    console = Console(highlight=False)
    found = store.search_runs([experiment.experiment_id], max_results=SHOWN) if experiment else []
    if not found:
        console.print("no runs yet; start one with: tenure train SPEC")
        return
    table = Table("run", "started", "state", "contract", "change by suite", box=None, pad_edge=False)
    for run in found:
        started = datetime.fromtimestamp(run.info.start_time / 1000, UTC).astimezone()
        changes = [
            f"{name.split('/')[1]} {value:+.3f}"
            for name, value in sorted(run.data.metrics.items())
            if name.endswith("/change")
        ]
        verdict = run.data.tags.get("contract", "")
        colour = {"kept": "green", "broken": "red", "undecided": "yellow"}.get(verdict, "dim")
        table.add_row(
            run.info.run_name,
            f"{started:%Y-%m-%d %H:%M}",
            run.info.status.lower(),
            f"[{colour}]{verdict}[/]",
            ", ".join(changes),
        )
    console.print(table)
