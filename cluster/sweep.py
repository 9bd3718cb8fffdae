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
from sweeps.preparing import plan_strategies
from sweeps.price_report import print_price
from sweeps.pricing import price_of
from sweeps.report import print_sweep
from sweeps.result import SweepResult, read_result
from sweeps.spec import SweepSpec
from training import stages
from training.errors import TenureError, fail
from training.evaluation.presets import add_presets
from training.evaluation.scorecard import read_scorecard
from training.lineage import find_base, inherit_suites
from training.models import hash_folder
from training.spec import RunSpec
from training.strategy import Wise
from training.workspace import RunFolder, Workspace, write_json


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
    console.print()
    print_sweep(console, result)
    console.print(f"report   {folder.report}\nresult   {folder.result}")
    if result.winner is not None:
        console.print(f"winner   {folder.winner}\nregister it with: tenure promote {folder.id}")
    return result


def plan_sweep(path: Path, workspace: Workspace, gpu_hour: float | None) -> None:
    """What the sweep of a file will take; nothing is run.

    Args:
        gpu_hour: what a GPU hour costs.
    """
    sweep, notes = read_sweep(path, workspace)
    console = make_screen()
    tokens = plan_strategies(sweep, workspace)
    for note in notes:
        console.print(f"[yellow]note[/] {note}")
    print_price(console, price_of(sweep, tokens, workspace), gpu_hour)


def promote_sweep(name: str, workspace: Workspace) -> RunFolder:
    """Register the winner of a sweep, as a run registers its artifact; its run.

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
        settle_on(run, result.winner.alpha)
    card = read_scorecard(run.scorecard)
    registered_artifact(run, card)
    registered = register(workspace, run, stages.spec_of(run), card)
    write_json(run.registration, asdict(registered))
    make_screen().print(f"registered {registered.name} version {registered.version} from run {run.id}")
    return run


def settle_on(run: RunFolder, alpha: float) -> None:
    """Make what lies at alpha between a trial's base and its artifact the run's artifact, as the protection wise does.

    The run's spec gets the protection, so that spec, artifact and scorecard go on to agree.
    """
    from sweeps.trial import card_file
    from training.interpolate import interpolate

    if run.tuned.is_dir():
        return
    spec = stages.spec_of(run)
    made = interpolate(Path(spec.model), run.artifact, alpha, run.path / "chosen")
    card = read_scorecard(card_file(run, alpha)).model_copy(update={"artifact_hash": hash_folder(made)})
    run.artifact.rename(run.tuned)
    made.rename(run.artifact)
    wise = spec.model_copy(update={"protections": (*spec.protections, Wise(alpha=alpha))})
    write_json(run.spec, wise.model_dump(mode="json"))
    write_json(run.scorecard, card.model_dump(mode="json"))
