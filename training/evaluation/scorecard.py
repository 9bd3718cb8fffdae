"""The scorecard: every suite's score, per item, for one artifact and its base under one hashed protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from training.errors import fail


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Item(_Record):
    """One test item, its two answers and their scores (a share in [0, 1], or nats per byte).

    `part` is the task that it belongs to, where the suite is a group of tasks.
    """

    index: int
    prompt: str
    expected: str
    base_answer: str
    tuned_answer: str
    base_score: float
    tuned_score: float
    weight: float = 1.0
    part: str | None = None


class SuitePart(_Record):
    """One task of a suite that is a group of tasks; `change` is positive where tuned is better."""

    name: str
    num_items: int
    base: float
    tuned: float
    change: float
    interval: tuple[float, float]
    lost: int
    won: int


_SCORE_AGAIN = "score the run again: remove the file, then tenure resume RUN; or read it with the Tenure that wrote it"
State = Literal["kept", "broken", "undecided"]


class SuiteScore(_Record):
    """One suite. `change` is the improvement of tuned over base (positive is better, whatever the metric).

    What version 1 lacks has a default: see docs/measures.md for each figure's definition.
    """

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
    interval_method: Literal["bootstrap", "score", "none"] = "bootstrap"
    state: State | None = None
    items_to_decide: int | None = None
    chance: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    lost: int | None = None
    won: int | None = None
    agreement: float | None = None
    answer_words: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    parts: tuple[SuitePart, ...] = ()

    @property
    def verdict(self) -> State:
        """Whether its promise is kept; version 1 knows no undecided one."""
        return self.state or ("kept" if self.kept else "broken")


class Promise(_Record):
    """A threshold over all retention suites, and what they came to."""

    name: Literal["min_retention", "max_mean_loss"]
    threshold: float
    value: float | None
    interval: tuple[float, float] | None
    state: State


class Verdict(_Record):
    """Whether the contract is kept, and one sentence for every promise that is not, or that too few items left open."""

    verdict: State
    min_gain: float
    max_loss: float
    reasons: tuple[str, ...]
    judge_by: Literal["estimate", "interval"] = "estimate"
    over_all: tuple[Promise, ...] = ()


class Forgetting(_Record):
    """What was kept over all retention suites.

    Suites scored as shares give `retention` (its clipped and unclipped mean of r / r_0, chance-corrected) and
    `general_ability_delta`; `left_out` names those on which the base knows nothing, which say nothing of forgetting.
    `rise_in_nats` is the change of every cross-entropy, in the suite's unit, positive where text became less likely.
    """

    retention: float | None
    retention_unclipped: float | None
    general_ability_delta: float | None
    left_out: tuple[str, ...]
    rise_in_nats: dict[str, float]


class KlToBase(_Record):
    """KL(base || tuned), exact over the vocabulary: mean nats per target token of given prompts and answers.

    The interval resamples the items; one item has none.
    """

    nats: float
    interval: tuple[float, float]
    num_items: int
    num_tokens: int


class Probe(_Record):
    """Teacher-forced log-probabilities: log_probs[i] is that of token_ids[i + 1] given all before it, in nats."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class DataSummary(_Record):
    """What a run was trained on: examples; rows left out because they were faulty or had no target; overlong rows.

    Overlong ones were cut or left out, as `data.overlong` says.
    """

    num_examples: int
    num_faulty: int
    num_untaught: int
    num_overlong: int


class Scorecard(_Record):
    """What one run gained and what it forgot. Version 1 has neither `forgetting` nor tests of significance.

    `kl_to_base` is by the role of the suites whose prompts were given; older scorecards have none.
    """

    schema_version: Literal[1, 2] = 2
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
    forgetting: Forgetting | None = None
    data: DataSummary | None = None
    kl_to_base: dict[Literal["target", "retention"], KlToBase] = {}


def read_scorecard(path: Path) -> Scorecard:
    """The scorecard in a file.

    Raises:
        TenureError: the run was never scored, or the file is damaged or of another Tenure.
    """
    if not path.is_file():
        run = path.parent.name
        raise fail(f"run '{run}' has no scorecard", str(path), f"it did not end; see its logs, or tenure resume {run}")
    try:
        return Scorecard.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise fail(f"this is no scorecard that this Tenure reads: {_reason(error)}", str(path), _SCORE_AGAIN) from None


def _reason(error: Exception) -> str:
    """The first thing that is wrong, with the key it is wrong at."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    at = ".".join(map(str, first["loc"]))
    return f"{at}: {first['msg']}" if at else str(first["msg"])
