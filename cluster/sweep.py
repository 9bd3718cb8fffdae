"""`tenure sweep` and `tenure promote`: a tournament of strategies, and its winner as a registered model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from cluster import pipeline
from cluster.inspecting import tell_leakage
from cluster.screen import make_screen
from sweeps import driver
from sweeps.folder import SweepFolder, find_sweep
from sweeps.loading import load_sweep
from sweeps.pareto import pareto_front
from sweeps.result import SweepResult, read_result
from sweeps.spec import SweepSpec
from training.errors import TenureError, fail
from training.evaluation.presets import add_presets
from training.evaluation.scorecard import read_scorecard
from training.lineage import find_base, inherit_suites
from training.spec import RunSpec
from training.workspace import Workspace, write_json


def read_sweep(path: Path, workspace: Workspace) -> tuple[SweepSpec, list[str]]:
    """The sweep of a file: its base found and completed as a run's spec is, its space checked."""
    return load_sweep(
        path,
        find_model=lambda name: find_base(name, workspace),
        complete=lambda spec: inherit_suites(add_presets(spec, workspace), workspace),
    )


def start_sweep(path: Path, workspace: Workspace, address: str | None) -> SweepResult:
    """Check and plan the sweep of a file, run it, and tell what came of it."""
    sweep, notes = read_sweep(path, workspace)
    console = make_screen()
    for note in notes:
        console.print(f"[yellow]note[/] {note}")
    tell_leakage(sweep.run, workspace)
    folder = driver.begin(sweep, path.read_text(encoding="utf-8"), notes, workspace)
    return _finish(folder, sweep.run, workspace, address, console)


def resume_sweep(name: str, workspace: Workspace, address: str | None) -> SweepResult:
    """Go on with an interrupted sweep; finished trials are not done again."""
    folder = driver.resume(name, workspace)
    return _finish(folder, folder.read_spec().run, workspace, address, make_screen())


def _finish(
    folder: SweepFolder, base: RunSpec, workspace: Workspace, address: str | None, console: Console
) -> SweepResult:
    again = f"go on with: tenure sweep --resume {folder.id}"
    try:
        with pipeline.session(workspace, address, base.scaling):
            result = driver.carry_on(folder, workspace, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {again}")
        sys.exit(130)
    except TenureError:
        console.print(f"the sweep stopped; {again}")
        raise
    tell(result, folder, console)
    return result


def tell(result: SweepResult, folder: SweepFolder, console: Console) -> None:
    """What came of a sweep, in a few lines."""
    console.print()
    for point in pareto_front(result.points):
        alpha = "" if point.alpha is None else f" at alpha {point.alpha:g}"
        console.print(
            f"front   {point.strategy + alpha:<28} gain {point.gain.value:+.4f}  retention {point.retention.value:.4f}"
            f"  {point.contract}"
        )
    for note in result.notes:
        console.print(f"[yellow]note[/] {note}")
    if result.winner is not None and result.winner.test is not None:
        won, test = result.winner, result.winner.test
        console.print(f"winner  {won.strategy} ({won.trial}): {won.reason}")
        console.print(f"on test gain {test.gain.value:+.4f}  retention {test.retention.value:.4f}  {test.contract}")
    console.print(f"result  {folder.result}")


def promote_sweep(name: str, workspace: Workspace) -> None:
    """Register the winner of a sweep, as a run registers its artifact.

    Raises:
        TenureError: the sweep has no winner, or its artifact is not what was scored.
    """
    from serving.registry import register, registered_artifact

    folder = find_sweep(workspace, name)
    result = read_result(folder.result)
    if result is None or result.finished is None:
        raise fail(f"sweep '{name}' is not finished", str(folder.path), f"tenure sweep --resume {name}")
    if result.winner is None or result.winner.run is None:
        reason = result.notes[-1] if result.notes else "no trial came to its end"
        raise fail(f"sweep '{name}' has no winner: {reason}", str(folder.result), "widen its space, or its contract")
    run = workspace.run(result.winner.run)
    if result.winner.alpha is not None:
        what = f"the winner lies at alpha {result.winner.alpha:g} between its base and {run.id}"
        raise fail(what, str(folder.result), f"save its spec from {folder.path / 'winner.yaml'}, and tenure train it")
    card = read_scorecard(run.scorecard)
    registered_artifact(run, card)
    registered = register(workspace, run, pipeline.spec_of(run), card)
    write_json(run.registration, asdict(registered))
    make_screen().print(f"registered {registered.name} version {registered.version} from run {run.id}")
