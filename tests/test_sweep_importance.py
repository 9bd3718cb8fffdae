"""Which dimension mattered: known answers, conditional dimensions, and what is not claimed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from sweep_results import RATE, made_up_sweep

from sweeps.importance import MIN_TRIALS, STRATEGY, importance, importances
from sweeps.result import Dimension, RungMeasure, Scalar, SweepResult, Trial
from training.spec import Contract

RATES = (
    Dimension(path=RATE, kind="float", low=1e-6, high=1e-4, log=True, strategies=("full",)),
    Dimension(path=RATE, kind="float", low=1e-5, high=1e-3, log=True, strategies=("lora",)),
)
RANK = Dimension(path="tuning.rank", kind="int", low=4, high=64, strategies=("lora",))
SIZE = Dimension(path="training.global_batch_size", kind="category", choices=(16, 32))


def sweep(
    gain: Callable[[str, dict[str, Scalar]], float], count: int = 40, retention: float | None = None
) -> SweepResult:
    """Trials of two strategies in turn, drawn at random, whose gain is a function of the setting."""
    rng = random.Random(1)
    trials = []
    for index in range(count):
        strategy = ("full", "lora")[index % 2]
        config: dict[str, Scalar] = {
            dimension.path: _drawn(rng, dimension)
            for dimension in (*RATES, RANK, SIZE)
            if not dimension.strategies or strategy in dimension.strategies
        }
        curve = (RungMeasure(rung=0, tokens=1, seconds=1, gain=gain(strategy, config), retention=retention),)
        trials.append(
            Trial(
                name=f"t{index}", strategy=strategy, config=config, seed=0, rung=0, state="stopped", cause="rung 0",
                tokens=1, seconds=1, gpu_hours=0, curve=curve,
            )
        )  # fmt: skip
    return SweepResult(
        name="s-1", base="m", contract=Contract(), gain_unit="share", target_suites=("t",), retention_suites=("r",),
        dimensions=(*RATES, RANK, SIZE), trials=tuple(trials), points=(), started="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def _drawn(rng: random.Random, dimension: Dimension) -> Scalar:
    if dimension.kind == "category":
        return rng.choice(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.kind == "int":
        return rng.randint(int(dimension.low), int(dimension.high))
    return math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high)))


def number(value: Scalar) -> float:
    assert isinstance(value, int | float)
    return float(value)


def test_the_dimension_that_makes_the_gain_gets_the_variance() -> None:
    result = sweep(lambda strategy, _: 1.0 if strategy == "lora" else 0.0)
    found = importance(result, "gain")
    assert found.shares[0].path == STRATEGY
    assert found.shares[0].share > 0.95
    assert [share.path for share in found.shares if share.matters] == [STRATEGY]


def test_a_rate_counts_by_its_place_in_its_own_strategys_range() -> None:
    """The gain is the place in the range: rates explain it all, and the strategies, whose ranges differ, nothing."""

    def gain(strategy: str, config: dict[str, Scalar]) -> float:
        return math.log(number(config[RATE]) / (1e-6 if strategy == "full" else 1e-5))

    found = importance(sweep(gain), "gain")
    assert found.shares[0].path == RATE
    assert found.shares[0].share > 0.9


def test_a_strategys_own_dimension_is_weighed_among_its_trials() -> None:
    result = sweep(lambda strategy, config: number(config["tuning.rank"]) if strategy == "lora" else 0.0)
    over_all = {share.path for share in importance(result, "gain").shares}
    assert over_all == {STRATEGY, RATE, SIZE.path}
    within = importance(result, "gain", "lora")
    assert (within.num_trials, within.shares[0].path) == (20, "tuning.rank")
    assert within.shares[0].share > 0.9
    assert "same gain" in str(importance(result, "gain", "full").refused)


def test_noise_matters_no_more_than_chance() -> None:
    """At the level of 5 % a dimension in twenty passes by chance; of these six at most one may."""
    hits = 0
    for seed in range(2):
        rng = random.Random(seed)
        found = importance(sweep(lambda *_, rng=rng: rng.random(), count=24), "gain")
        assert found.refused is None
        hits += sum(share.matters for share in found.shares)
    assert hits <= 1


def test_too_few_trials_claim_nothing() -> None:
    few = importance(sweep(lambda strategy, _: float(strategy == "lora"), count=MIN_TRIALS - 1), "gain")
    assert few.shares == ()
    assert "too few" in str(few.refused)
    assert "no dimension varied" in str(importance(sweep(lambda *_: 0.0), "retention").refused)


def test_all_trials_count_at_the_rung_that_most_of_them_reached() -> None:
    result = made_up_sweep()
    found = importance(result, "retention")
    reached = [trial for trial in result.searched if trial.curve]
    assert (found.rung, found.num_trials) == (1, len(reached))


def test_both_measures_are_told_over_all_and_within_each_strategy() -> None:
    found = importances(made_up_sweep(per_strategy=2))
    scopes = [None, "full", "full-l2sp", "full-ewc", "full-replay", "lora", "lora-kl"]
    assert [(one.measure, one.strategy) for one in found] == [(m, s) for s in scopes for m in ("gain", "retention")]
    assert all(one.refused for one in found)
