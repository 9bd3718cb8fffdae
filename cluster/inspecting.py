"""What stands before a run about its data: leakage, and the report of `tenure data`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from training.inspection.leakage import check_leakage
from training.spec import RunSpec
from training.workspace import Workspace


def tell_leakage(spec: RunSpec, workspace: Workspace) -> None:
    """Print what overlaps there are that stop nothing.

    Raises:
        TenureError: an overlap stops the run.
    """
    console = Console(highlight=False)
    for sentence in check_leakage(spec, workspace):
        console.print(f"[bold yellow]overlap[/]  {escape(sentence)}", soft_wrap=True)
