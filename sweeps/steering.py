"""What a search is steered by at a rung: one score for every trial, and whether it may still keep the contract."""

from __future__ import annotations

from sweeps.measures import Measures
from sweeps.presets import amounts
from sweeps.spec import SweepSpec
from training.evaluation.judge import threshold_of
from training.spec import RunSpec


def resource(sweep: SweepSpec, rung: int) -> int:
    """How far a rung goes, the first being 1: rungs grow by the reduction factor, generations are all alike."""
    return rung + 1 if sweep.search == "pbt" else sweep.reduction**rung


def steps_of(sweep: SweepSpec, rung: int, steps: int) -> int:
    """The step of a whole run's that a rung ends at."""
    return max(1, -(-steps * resource(sweep, rung) // resource(sweep, amounts(sweep).rungs - 1)))


def keeps(measures: Measures) -> bool:
    """Whether every retention suite keeps its promise (at a rung, gains are still to come)."""
    return all(suite.state != "broken" for suite in measures.suites if suite.role == "retention")


def score_of(measures: Measures, sweep: SweepSpec) -> float:
    """What is maximised by one figure: the gain, where the retention is kept; what breaks it comes after all that keep
    it, by its retention. For `pareto` the area that the point dominates alone."""
    gain, retention = measures.gain.value, measures.retention.value
    if sweep.objective == "pareto":
        return max(0.0, gain) * retention
    return gain if keeps(measures) else retention - 1000.0


def hopeless(spec: RunSpec, sweep: SweepSpec, measures: Measures) -> str | None:
    """Why a trial cannot keep the contract any more; None while it may.

    A suite whose interval lies wholly beyond `stop_at_loss` times the loss that is allowed will not come back.
    """
    if sweep.stop_at_loss is None:
        return None
    allowed = {suite.name: threshold_of(suite, "retention", spec.contract) for suite in spec.suites.retention}
    for suite in measures.suites:
        if suite.role == "retention" and suite.change.high < -sweep.stop_at_loss * allowed[suite.name]:
            lost, most = -suite.change.value, allowed[suite.name]
            return f"cannot keep the contract: {suite.name} lost {lost:.4f} already, and {most:g} is allowed"
    return None
