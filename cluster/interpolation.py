"""`tenure interpolate`: artifacts between a run's base and what it was tuned to, scored on the run's own suites."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from cluster import pipeline
from training import stages
from training.data.locations import is_there
from training.errors import fail
from training.evaluation.scorecard import read_scorecard
from training.faults import output_to
from training.interpolate import check_alpha, check_interpolable, interpolate
from training.models import hash_folder
from training.reporting.report import write_report
from training.reporting.wise import WiseCurve, joined, make_curve, read_curve
from training.spec import RunSpec
from training.strategy import Wise
from training.workspace import LINEAGE_FILE, RunFolder, Workspace, read_json, write_json

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def interpolate_run(
    run: RunFolder, workspace: Workspace, alphas: tuple[float, ...], address: str | None, console: Console
) -> WiseCurve:
    """Make and score what is missing of a run's curve, write wise.json and the report anew; the whole curve.

    Alpha 0 is the base and alpha 1 what was tuned; the others are written under the run's wise/.

    Raises:
        TenureError: an alpha is out of range, the run is not finished or changed, or its adapter is not linear.
    """
    for alpha in alphas:
        check_alpha(alpha)
    spec = stages.spec_of(run)
    tuned = _tuned(run, spec)
    check_interpolable(tuned)
    wanted = sorted(set(alphas or ALPHAS))
    one_worker = spec.scaling.model_copy(update={"workers": 1})
    with pipeline.session(workspace, address, one_worker), run.held(), output_to(run.logs / "interpolate.log"):
        artifacts = {alpha: _artifact(alpha, run, spec, tuned) for alpha in wanted}
        console.print(f"scoring {len(wanted)} alphas on every suite")
        named = {f"alpha-{alpha!r}": artifact for alpha, artifact in artifacts.items()}
        cards = stages.score_artifacts(run, spec, workspace, named)
        curve = make_curve({alpha: cards[f"alpha-{alpha!r}"] for alpha in wanted}, artifacts, hash_folder(tuned))
        whole = joined(curve, read_curve(run.wise_curve))
        write_json(run.wise_curve, whole.model_dump(mode="json"))
        write_report(run)
    return whole


def _tuned(run: RunFolder, spec: RunSpec) -> Path:
    """What training alone gave, of a run that is finished and whose artifact is the one that was scored."""
    from serving.registry import registered_artifact

    artifact = registered_artifact(run, read_scorecard(run.scorecard))
    missing = [suite.path for suite in spec.suites.all if not is_there(suite.path)]
    if missing:
        raise fail("a suite's file is no longer there", str(missing[0]), "restore it: every alpha is scored on it")
    if not spec.protection(Wise):
        return artifact
    if not run.tuned.is_dir():
        raise fail("what was tuned is no longer beside the artifact", str(run.tuned), "restore it, or train again")
    return run.tuned


def _artifact(alpha: float, run: RunFolder, spec: RunSpec, tuned: Path) -> Path:
    """The artifact of an alpha, made unless it stands already."""
    wise = spec.protection(Wise)
    if alpha in (0.0, 1.0):
        return tuned if alpha else Path(spec.model)
    if wise and alpha == wise.alpha:
        return run.artifact
    target = run.wise / f"alpha-{alpha!r}"
    if target.is_dir() and read_json(target / LINEAGE_FILE)["tuned_hash"] != hash_folder(tuned):
        shutil.rmtree(target)
    return target if target.is_dir() else interpolate(Path(spec.model), tuned, alpha, target)
