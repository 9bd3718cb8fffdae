"""The contract's verdict: each promise is kept, broken, or left undecided by too few items."""

from __future__ import annotations

from collections.abc import Iterable

from training.evaluation.scorecard import Promise, State, SuiteScore, Verdict
from training.evaluation.stats import items_to_decide
from training.spec import Contract

# A promise kept to the last digit is kept: sums of shares round.
_ROUNDING = 1e-9
_MILLION = 1_000_000


def state_of(change: float, interval: tuple[float, float], least: float, contract: Contract) -> State:
    """Whether a change is at least what was promised, on the point estimate or on the whole interval."""
    if contract.judge_by == "estimate":
        return "kept" if change >= least - _ROUNDING else "broken"
    low, high = interval
    if low >= least - _ROUNDING:
        return "kept"
    return "broken" if high < least - _ROUNDING else "undecided"


def num_to_decide(change: float, interval: tuple[float, float], least: float, count: int) -> int | None:
    """About how many items would leave the threshold outside the interval; None when no number does."""
    end = interval[0] if change >= least else interval[1]
    return items_to_decide(change, end, least, count)


def judge(suites: tuple[SuiteScore, ...], contract: Contract, over_all: tuple[Promise, ...] = ()) -> Verdict:
    """The contract's verdict: broken by one broken promise, else undecided by one undecided, else kept."""
    states = [*(suite.verdict for suite in suites), *(promise.state for promise in over_all)]
    verdict: State = "broken" if "broken" in states else "undecided" if "undecided" in states else "kept"
    return Verdict(
        verdict=verdict,
        min_gain=contract.min_gain,
        max_loss=contract.max_loss,
        reasons=(*_told(suites), *_told_over_all(over_all)),
        judge_by=contract.judge_by,
        over_all=over_all,
    )


def _told(suites: Iterable[SuiteScore]) -> Iterable[str]:
    """A sentence for every suite whose promise is not kept, the broken ones first."""
    yield from (_sentence(suite) for suite in suites if suite.verdict == "broken")
    yield from (_open(suite) for suite in suites if suite.verdict == "undecided")


def _sentence(suite: SuiteScore) -> str:
    if suite.role == "target":
        return f"{suite.name} gained {suite.change:.4f} ({suite.unit}), less than the promised {suite.threshold:.4f}"
    return f"{suite.name} lost {-suite.change:.4f} ({suite.unit}), more than the allowed {suite.threshold:.4f}"


def _open(suite: SuiteScore) -> str:
    low, high = suite.interval if suite.role == "target" else (-suite.interval[1], -suite.interval[0])
    done, asked = ("gained", "promised") if suite.role == "target" else ("lost", "allowed")
    amount = suite.change if suite.role == "target" else -suite.change
    return (
        f"{suite.name} {done} {amount:.4f} ({suite.unit}), and its interval [{low:.4f}, {high:.4f}] holds the {asked} "
        f"{suite.threshold:.4f}: {_enough(suite.items_to_decide)}; it has {len(suite.items):,}"
    )


def _enough(count: int | None) -> str:
    if count is None:
        return "no number of items would decide"
    return f"about {count:,} items would decide" if count <= _MILLION else "more than a million items would decide"


def _told_over_all(promises: Iterable[Promise]) -> Iterable[str]:
    for promise in promises:
        if promise.state != "kept":
            yield f"{_WORDS[promise.name]} {_amount(promise)}, {_BOUNDS[promise.name]} {promise.threshold:.4f}"


_WORDS = {"min_retention": "retention over all suites", "max_mean_loss": "the mean loss over retention suites"}
_BOUNDS = {"min_retention": "promised", "max_mean_loss": "allowed"}


def _amount(promise: Promise) -> str:
    if promise.value is None or promise.interval is None:
        return "cannot be told: no retention suite is scored as a share with the base above chance"
    low, high = promise.interval
    return f"is {promise.value:.4f} ({promise.state}, interval [{low:.4f}, {high:.4f}])"
