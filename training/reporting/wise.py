"""The curve of WiSE-FT: what every weight between base and tuned gains and forgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.evaluation.scorecard import Scorecard, SuiteScore, Verdict
from training.workspace import read_json


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WisePoint(_Record):
    """One alpha: where its artifact lies, its suites without their items, and the contract's verdict."""

    alpha: float
    artifact: str
    artifact_hash: str
    suites: tuple[SuiteScore, ...]
    contract: Verdict


class WiseCurve(_Record):
    """All alphas scored under one protocol, ascending. `knee` and `best` are alphas, see find_knee and find_best."""

    schema_version: Literal[1] = 1
    run: str
    protocol_hash: str
    base_hash: str
    tuned_hash: str
    points: tuple[WisePoint, ...]
    knee: float | None
    best: float | None

    def by_suite(self) -> dict[str, list[tuple[float, SuiteScore]]]:
        """(alpha, score) of every suite, alphas ascending."""
        names = [suite.name for suite in self.points[0].suites]
        return {name: [(p.alpha, s) for p in self.points for s in p.suites if s.name == name] for name in names}


def make_curve(cards: dict[float, Scorecard], artifacts: dict[float, Path], tuned_hash: str) -> WiseCurve:
    """The curve of scorecards by alpha, all of one run and protocol."""
    points = tuple(_point(alpha, artifacts[alpha], cards[alpha]) for alpha in sorted(cards))
    card = next(iter(cards.values()))
    return _curve(card.run, card.protocol_hash, card.base_hash, tuned_hash, points)


def joined(curve: WiseCurve, earlier: WiseCurve | None) -> WiseCurve:
    """The curve with the alphas of an earlier one that it lacks, where both are of the same models and protocol."""

    def origin(of: WiseCurve) -> tuple[str, ...]:
        return (of.run, of.protocol_hash, of.base_hash, of.tuned_hash)

    if earlier is None or origin(earlier) != origin(curve):
        return curve
    points = {point.alpha: point for point in (*earlier.points, *curve.points)}
    every = tuple(points[alpha] for alpha in sorted(points))
    return _curve(curve.run, curve.protocol_hash, curve.base_hash, curve.tuned_hash, every)


def read_curve(path: Path) -> WiseCurve | None:
    """The curve in a file; None when there is none."""
    return WiseCurve.model_validate(read_json(path)) if path.is_file() else None


def find_best(points: Sequence[WisePoint]) -> float | None:
    """The alpha with the largest gain of those that keep the contract; the smaller one of two alike."""
    gains = _shares(points, "target", 1)
    kept = [(gain, -p.alpha) for p, gain in zip(points, gains, strict=True) if p.contract.verdict == "kept"]
    return -max(kept)[1] if kept else None


def find_knee(points: Sequence[WisePoint]) -> float | None:
    """The alpha farthest above the straight line between the ends, gain against loss, each from 0 to 1 on the curve.

    None when no alpha lies above it, or there is no loss to weigh. Source: Satopaa et al., "Finding a Kneedle in a
    Haystack", 2011.
    """
    if not any(suite.change < 0 for point in points for _, suite in _of_role((point,), "retention")):
        return None
    gains, losses = _shares(points, "target", 1), _shares(points, "retention", -1)
    heights = [(gain - loss, -point.alpha) for point, gain, loss in zip(points, gains, losses, strict=True)]
    highest, alpha = max(heights)
    return -alpha if highest > max(0.0, heights[0][0], heights[-1][0]) else None


def _shares(points: Sequence[WisePoint], role: str, sign: int) -> list[float]:
    """The mean over the suites of a role of sign x change, each from 0 to 1 over the curve, since units differ."""
    columns = [[sign * point.suites[index].change for point in points] for index, _ in _of_role(points, role)]
    scaled = [_from_0_to_1(column) for column in columns]
    return [sum(values) / len(values) for values in zip(*scaled, strict=True)] if scaled else [0.0] * len(points)


def _of_role(points: Sequence[WisePoint], role: str) -> list[tuple[int, SuiteScore]]:
    return [(index, suite) for index, suite in enumerate(points[0].suites) if suite.role == role]


def _from_0_to_1(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def _point(alpha: float, artifact: Path, card: Scorecard) -> WisePoint:
    suites = tuple(suite.model_copy(update={"items": ()}) for suite in card.suites)
    return WisePoint(
        alpha=alpha, artifact=str(artifact), artifact_hash=card.artifact_hash, suites=suites, contract=card.contract
    )


def _curve(run: str, protocol: str, base: str, tuned: str, points: tuple[WisePoint, ...]) -> WiseCurve:
    return WiseCurve(
        run=run,
        protocol_hash=protocol,
        base_hash=base,
        tuned_hash=tuned,
        points=points,
        knee=find_knee(points),
        best=find_best(points),
    )
