"""What stands before a run about its data: leakage, and the report of `tenure data`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from cluster import pipeline
from training.inspection.leakage import check_leakage
from training.spec import RunSpec
from training.workspace import Workspace, write_json, write_text


def tell_leakage(spec: RunSpec, workspace: Workspace) -> None:
    """Print what overlaps there are that stop nothing.

    Raises:
        TenureError: an overlap stops the run.
    """
    console = Console(highlight=False)
    for sentence in check_leakage(spec, workspace):
        console.print(f"[bold yellow]overlap[/]  {escape(sentence)}", soft_wrap=True)


def show_data(spec_path: Path, workspace: Workspace, page: Path | None, figures: Path | None) -> None:
    """Look at the data of a spec, print what is in it, and write it as HTML and JSON.

    Raises:
        TenureError: the spec or a row has faults.
    """
    from cluster.screen import make_screen
    from training.inspection.page import render_page
    from training.inspection.screen import print_report
    from training.inspection.survey import survey

    spec = pipeline.read_spec(spec_path, workspace)
    report = survey(spec, spec_path, workspace)
    folder = workspace.root / "data"
    page, figures = page or folder / f"{spec.name}.html", figures or folder / f"{spec.name}.json"
    write_text(page, render_page(report))
    write_json(figures, report.model_dump(mode="json"))
    console = make_screen()
    print_report(console, report)
    console.print(f"\nreport {page}\nJSON   {figures}", highlight=False, soft_wrap=True)
