"""The scorecard: every suite's score, per item, for one artifact and its base under one hashed protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.errors import fail


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Item(_Record):
    """One test item, its two answers and their scores (a share in [0, 1], or nats per byte)."""

    index: int
    prompt: str
    expected: str
    base_answer: str
    tuned_answer: str
    base_score: float
    tuned_score: float
    weight: float = 1.0


class SuiteScore(_Record):
    """One suite. `change` is the improvement of tuned over base (positive is better, whatever the metric)."""

    name: str
    role: Literal["target", "retention"]
    metric: str
    higher_is_better: bool
    unit: str
    base: float
    tuned: float
    change: float
    interval: tuple[float, float]
    threshold: float
    kept: bool
    items: tuple[Item, ...]


class Verdict(_Record):
    """Whether the contract is kept, and one sentence for every promise that is not."""

    verdict: Literal["kept", "broken"]
    min_gain: float
    max_loss: float
    reasons: tuple[str, ...]


class Probe(_Record):
    """Teacher-forced log-probabilities: log_probs[i] is that of token_ids[i + 1] given all before it, in nats."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class Scorecard(_Record):
    """What one run gained and what it forgot."""

    schema_version: Literal[1] = 1
    run: str
    protocol: dict[str, str | int | float | bool | None]
    protocol_hash: str
    base_model: str
    base_hash: str
    artifact_hash: str
    suites: tuple[SuiteScore, ...]
    contract: Verdict
    probes: dict[Literal["base", "tuned"], tuple[Probe, ...]]
    versions: dict[str, str]
    seconds: float


def read_scorecard(path: Path) -> Scorecard:
    """The scorecard in a file.

    Raises:
        TenureError: the run was never scored.
    """
    if not path.is_file():
        run = path.parent.name
        raise fail(f"run '{run}' has no scorecard", str(path), f"it did not end; see its logs, or tenure resume {run}")
    return Scorecard.model_validate_json(path.read_text(encoding="utf-8"))
