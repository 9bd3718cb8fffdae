"""`tenure compare`: runs or evaluations side by side, on screen, as a page and as JSON; or seeds pooled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.screen import make_screen
from training.evaluation.comparison import compare_runs
from training.evaluation.pooling import pool_seeds
from training.evaluation.scorecard import read_scorecard
from training.reporting.compare import write_comparison
from training.reporting.report import print_comparison, print_pair, print_pooled
from training.workspace import Workspace, read_json

_MOST_IN_NAME = 4


def compare(workspace: Workspace, names: Sequence[str], *, as_json: bool, seeds: bool, page: Path | None) -> None:
    """Compare runs, on screen and as a page, or as JSON alone.

    Raises:
        TenureError: a run is not there or was not scored, protocols differ, or the runs are no seeds of one spec.
    """
    runs = [workspace.scored(name) for name in names]
    cards = [read_scorecard(run.scorecard) for run in runs]
    comparison = compare_runs(cards)
    pooled = pool_seeds(cards, [read_json(run.spec) for run in runs]) if seeds else None
    if as_json:
        print((pooled or comparison).model_dump_json(indent=1))
        return
    console = make_screen()
    if pooled:
        print_pooled(console, pooled)
    for card, pair in zip(cards[1:], comparison.pairs, strict=True):
        if not pooled:
            print_comparison(console, cards[0], card)
            print_pair(console, pair)
    named = "-".join(name.replace("/", "-") for name in names[:_MOST_IN_NAME]) + (
        f"-and-{len(names) - _MOST_IN_NAME}" if names[_MOST_IN_NAME:] else ""
    )
    target = page or workspace.root / "compare" / f"{named}.html"
    console.print(f"page {write_comparison(target, runs, cards, comparison, pooled)}")
