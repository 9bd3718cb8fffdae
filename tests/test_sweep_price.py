"""What a sweep takes before it runs: tokens by hand, times only where they were measured."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sweeps.price import (
    Price,
    Search,
    StrategyPrice,
    Timing,
    at_once,
    known_timings,
    least_load,
    missing,
    most_load,
    rung_tokens,
    shape_of,
    survivors,
    trials_for,
)
from sweeps.price_report import print_price
from training.workspace import Workspace

NINE = Search(trials=9, rungs=3, reduction=3, tokens_per_trial=900)
FINAL = replace(NINE, finalists=2, seeds=3, alphas=3)
SPEC: dict[str, Any] = {
    "model": "/m",
    "objective": {"type": "sft"},
    "tuning": {"type": "lora", "rank": 8},
    "protections": [{"type": "l2sp", "strength": 0.1}],
    "training": {"precision": "bf16", "packing": False, "learning_rate": 1e-4},
    "scaling": {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 1},
}
PLAN = {"model_parameters": 9000, "trainable_parameters": 1000, "micro_batch_size": 8, "zero_stage": 1}


def test_halving_by_hand() -> None:
    """Nine to 100 tokens, three of them to 300, one to 900."""
    assert rung_tokens(NINE) == [100, 300, 900]
    assert survivors(NINE) == [9, 3, 1]
    assert least_load(NINE).tokens == 9 * 100 + 3 * 200 + 600
    assert most_load(NINE).tokens == 9 * 900
    assert (least_load(NINE).trials, least_load(NINE).scorings) == (9, 13)


def test_finalists_come_on_top() -> None:
    """Two under two further seeds: four whole trials, scored at the end and where they are finalists; three tests."""
    load = least_load(FINAL)
    assert load.tokens == 2100 + 4 * 900
    assert load.trials == 13
    assert load.scorings == 13 + 3 + 4 * 2 + 3


@given(st.integers(1, 200), st.integers(1, 5), st.integers(2, 4), st.integers(1, 10**6))
def test_halving_never_takes_more_than_no_halving(trials: int, rungs: int, reduction: int, tokens: int) -> None:
    search = Search(trials, rungs, reduction, tokens)
    assert trials * rung_tokens(search)[0] <= least_load(search).tokens <= most_load(search).tokens
    assert most_load(search).tokens == trials * tokens


@given(st.integers(0, 10**5))
def test_a_budget_buys_the_most_trials_that_it_pays(tokens: int) -> None:
    bought = trials_for(NINE, tokens)
    assert bought == 0 or least_load(replace(NINE, trials=bought)).tokens <= tokens
    assert least_load(replace(NINE, trials=bought + 1)).tokens > tokens


def test_trials_side_by_side_and_what_is_missing() -> None:
    assert at_once({"CPU": 16, "GPU": 4}, {"CPU": 1, "GPU": 0.25}) == 16
    assert at_once({"CPU": 16, "GPU": 1}, {"CPU": 1, "GPU": 0.1}) == 10
    assert at_once({"CPU": 16}, {"CPU": 1, "GPU": 1}) == 0
    assert missing({"CPU": 16}, {"CPU": 1, "GPU": 1}) == ["1 GPU for a trial, and the cluster has 0"]


def run(workspace: Workspace, name: str, seconds: list[float], spec: dict[str, Any] = SPEC, age: float = 0.0) -> None:
    folder = workspace.runs / name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "plan.json").write_text(json.dumps(PLAN))
    rows = [
        {
            "kind": "step",
            "step": n,
            "loss": 1,
            "learning_rate": 1,
            "num_target_tokens": 5,
            "num_tokens": 10,
            "seconds": s,
        }
        for n, s in enumerate(seconds)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    os.utime(folder / "metrics.jsonl", (1e9 + age, 1e9 + age))


def test_a_steps_time_is_that_of_an_earlier_run_without_its_warm_up(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert known_timings(workspace) == {}
    run(workspace, "old-1", [60.0, 9.0, 2.0, 2.0, 2.0])
    run(workspace, "new-1", [60.0, 9.0, 1.0, 1.0, 1.0], age=10)
    run(workspace, "short-1", [60.0, 9.0, 1.0], age=20)
    (workspace.runs / "new-1" / "scorecard.json").write_text('{"seconds": 12.5}')
    timing = known_timings(workspace)[shape_of(SPEC, PLAN)]
    assert timing == Timing("new-1", 3, pytest.approx(0.1), 12.5)


def test_a_rate_or_a_strength_is_no_other_shape_but_a_size_or_a_protection_is() -> None:
    def changed(**fields: Any) -> tuple[Any, ...]:
        return shape_of({**SPEC, **fields}, PLAN)

    same = changed(training={**SPEC["training"], "learning_rate": 1.0}, protections=[{"type": "l2sp", "strength": 9}])
    assert same == shape_of(SPEC, PLAN)
    assert changed(protections=[{"type": "kl"}]) != same
    assert changed(scaling={**SPEC["scaling"], "gpus_per_worker": 0}) != same
    assert shape_of(SPEC, {**PLAN, "micro_batch_size": 4}) != same


def price(*timings: Timing | None, side_by_side: int = 2, search: Search = NINE) -> Price:
    strategies = tuple(StrategyPrice(f"s{n}", 1000, 2**31, 12, timing) for n, timing in enumerate(timings))
    return Price(search, strategies, side_by_side, gpus_per_trial=0.5)


def test_hours_by_hand() -> None:
    """2,100 tokens at a mean of 2 s each, 13 scorings of 6 s: two trials at a time, each on half a GPU."""
    known = price(Timing("a", 5, 1.0, 6.0), Timing("b", 5, 3.0, 6.0))
    load = least_load(NINE)
    assert known.work_hours(load) == pytest.approx((4200 + 78) / 3600)
    assert known.hours(load) == known.gpu_hours(load) == pytest.approx((4200 + 78) / 7200)


def printed(of: Price, gpu_hour: float | None = None) -> str:
    out = io.StringIO()
    print_price(Console(file=out, width=120), of, gpu_hour)
    return out.getvalue()


def test_a_time_that_was_never_measured_is_unknown() -> None:
    unknown = price(Timing("a", 5, 1.0), None)
    assert unknown.hours(least_load(NINE)) is None
    text = printed(unknown, gpu_hour=2.0)
    assert "hours          unknown" in text
    assert "no run in this workspace measured a step of s1" in text
    assert "price" not in text


def test_the_plan_reads() -> None:
    text = printed(price(Timing("a-1", 5, 1.0, 6.0), search=FINAL), gpu_hour=2.0)
    assert "trials to tokens: 9 to 100, 3 to 300, 1 to 900" in text
    assert "2, each under 3 seeds" in text
    assert "2.0 GiB" in text
    assert "price" in text
    assert "leave scoring out" in printed(price(Timing("a-1", 5, 1.0)))
    assert "Not one trial fits" in printed(price(None, side_by_side=0))
