"""`tenure report SWEEP`: what a sweep came to, so far or in the end."""

from __future__ import annotations

from pathlib import Path

from cluster.screen import make_screen
from sweeps.report import print_sweep, write_sweep_report
from sweeps.result import read_result
from training.errors import fail
from training.workspace import Workspace


def sweep_path(workspace: Workspace, name: str) -> Path:
    return workspace.root / "sweeps" / name


def is_sweep_id(workspace: Workspace, name: str) -> bool:
    """Whether a name is that of a sweep, and of no run."""
    return "/" not in name and sweep_path(workspace, name).is_dir() and not (workspace.runs / name).is_dir()


def report_sweep(name: str, workspace: Workspace, *, as_json: bool, price: float | None = None) -> None:
    """Print what a sweep came to, or its result as JSON, and write its page anew.

    Args:
        price: what a GPU hour costs.

    Raises:
        TenureError: no trial has ended yet.
    """
    folder = sweep_path(workspace, name)
    result = read_result(folder / "result.json")
    if result is None:
        raise fail(f"sweep '{name}' has no result yet", str(folder), f"go on with it: tenure sweep --resume {name}")
    if as_json:
        print((folder / "result.json").read_text(encoding="utf-8"), end="")
        return
    console = make_screen()
    print_sweep(console, result, price)
    console.print(f"report   {write_sweep_report(folder / 'report.html', result, price)}")
    if result.winner:
        console.print(f"winner   {folder / 'winner.yaml'}")
