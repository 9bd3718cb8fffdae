"""Results of sweeps for tests: made up, with a seed, in the form that a real one has."""

from __future__ import annotations

import math
import random
from typing import Any

from sweeps.pareto import choose
from sweeps.result import (
    Amount,
    Dimension,
    Finalist,
    Measured,
    Point,
    RungMeasure,
    Suite,
    SweepResult,
    Trial,
    Winner,
)
from training.evaluation.scorecard import State
from training.spec import Contract

RATE = "training.learning_rate"
# strategy: (largest gain, loss at that gain, middle of its rates)
STRATEGIES = {
    "full": (0.62, 0.30, 2e-5),
    "full-l2sp": (0.60, 0.14, 3e-5),
    "full-ewc": (0.59, 0.12, 3e-5),
    "full-replay": (0.61, 0.08, 2e-5),
    "lora": (0.58, 0.16, 2e-4),
    "lora-kl": (0.55, 0.05, 2e-4),
}
SPEC = "name: winner\nmodel: smollm2-135m-instruct\ntuning: {type: full}\n"


def measured(value: float, half: float = 0.03, top: float = math.inf) -> Measured:
    return Measured(value=value, low=value - half, high=min(top, value + half))


def point(gained: float, kept: float, name: str = "t", contract: State = "kept", **fields: Any) -> Point:
    given: dict[str, Any] = {
        "trial": name,
        "strategy": "lora",
        "seed": 0,
        "rung": 2,
        "gain": measured(gained),
        "retention": measured(kept, 0.02, 1.0),
        "retention_mean": measured(kept, 0.02, 1.0),
        "contract": contract,
        "split": "validation",
        "tokens": 1000,
        "gpu_hours": 0.1,
    }
    return Point(**{**given, **fields})


def finalist(gained: float, kept: float, name: str = "t", contract: State = "kept", **fields: Any) -> Finalist:
    given: dict[str, Any] = {
        "trial": name,
        "strategy": "lora",
        "seeds": (0, 1, 2),
        "trials": (name,),
        "gain": measured(gained),
        "retention": measured(kept, 0.02, 1.0),
        "retention_mean": measured(kept, 0.02, 1.0),
        "contract": contract,
        "split": "validation",
    }
    return Finalist(**{**given, **fields})


def space() -> tuple[Dimension, ...]:
    return (
        Dimension(path=RATE, kind="float", low=1e-6, high=1e-3, log=True),
        Dimension(path="training.global_batch_size", kind="category", choices=(16, 32, 64)),
        Dimension(path="tuning.rank", kind="int", low=4, high=64, log=True, strategies=("lora", "lora-kl")),
        Dimension(path="protections.0.strength", kind="float", low=1, high=1e4, log=True, strategies=("full-ewc",)),
        Dimension(path="protections.0.strength", kind="float", low=1e-3, high=1, log=True, strategies=("full-l2sp",)),
        Dimension(path="protections.0.share", kind="float", low=0.02, high=0.4, strategies=("full-replay",)),
        Dimension(path="protections.0.weight", kind="float", low=0.1, high=4.0, log=True, strategies=("lora-kl",)),
    )


def made_up_sweep(per_strategy: int = 6, seed: int = 0, max_loss: float = 0.05, **fields: Any) -> SweepResult:
    """A finished sweep whose gain and loss depend on strategy and learning rate alone, with a little noise."""
    rng = random.Random(seed)
    trials, points = [], []
    for index in range(per_strategy):
        for strategy in STRATEGIES:
            name = f"{strategy}-{index}"
            trial, found = _trial(rng, name, strategy, index, max_loss)
            trials.append(trial)
            points += found
    winner_points = sorted((p for p in points if p.contract == "kept"), key=lambda p: -p.gain.value)
    finalists, reruns = _finalists(winner_points, points, trials)
    choice = choose(finalists)
    winner = None
    if choice.best:
        test = choice.best.model_copy(update={"split": "test", "gain": measured(choice.best.gain.value - 0.01, 0.02)})
        winner = Winner(
            trial=choice.best.trial, strategy=choice.best.strategy, alpha=choice.best.alpha, seeds=choice.best.seeds,
            reason=choice.reason, spec_yaml=SPEC, test=test, run="winner-1",
        )  # fmt: skip
    trials += reruns
    given: dict[str, Any] = {
        "name": "made-up-1",
        "base": "smollm2-135m-instruct",
        "contract": Contract(min_gain=0.2, max_loss=max_loss, judge_by="interval"),
        "gain_unit": "share",
        "target_suites": ("sums",),
        "retention_suites": ("facts", "general text"),
        "dimensions": space(),
        "trials": tuple(trials),
        "points": tuple(points),
        "finalists": tuple(finalists),
        "winner": winner,
        "full_strategy": "full",
        "search": "random search under ASHA, preset standard",
        "budget": Amount(trials=60, gpu_hours=2.0),
        "spent": Amount(
            trials=len(trials), gpu_hours=sum(t.gpu_hours for t in trials), hours=1.4,
            tokens=sum(t.tokens for t in trials),
        ),
        "started": "2026-03-01T09:00:00+00:00",
        "finished": "2026-03-01T10:24:00+00:00",
        "hashes": {"base": "a" * 64, "protocol": "b" * 64, "train": "c" * 64},
    }  # fmt: skip
    return SweepResult(**{**given, **fields})


def _config(rng: random.Random, strategy: str) -> dict[str, Any]:
    low, high = STRATEGIES[strategy][2] / 10, STRATEGIES[strategy][2] * 10
    config: dict[str, Any] = {RATE: math.exp(rng.uniform(math.log(low), math.log(high)))}
    for dimension in space()[1:]:
        if dimension.strategies and strategy not in dimension.strategies:
            continue
        if dimension.kind == "category":
            config[dimension.path] = rng.choice(dimension.choices)
        else:
            assert dimension.low is not None
            assert dimension.high is not None
            value = math.exp(rng.uniform(math.log(dimension.low), math.log(dimension.high)))
            config[dimension.path] = round(value) if dimension.kind == "int" else value
    return config


def _trial(rng: random.Random, name: str, strategy: str, index: int, max_loss: float) -> tuple[Trial, list[Point]]:
    most, loss, middle = STRATEGIES[strategy]
    config = _config(rng, strategy)
    push = math.log10(config[RATE] / middle)  # -1 to 1
    gain = most * (0.35 + 0.65 * (1 - ((push - 0.4) / 1.4) ** 2)) + rng.gauss(0, 0.01)
    lost = max(0.0, loss * (0.5 + 0.5 * push) ** 2 * 2 + rng.gauss(0, 0.004))
    failed = index == 1 and strategy in ("full-ewc", "lora")
    stopped = not failed and lost > 0.35
    rung = 0 if failed else 1 if stopped else 2
    curve = tuple(
        RungMeasure(rung=r, tokens=20_000 * 3**r, seconds=9.0 * 3**r, gain=gain * (0.6 + 0.2 * r),
                    retention=1 - lost * (0.5 + 0.25 * r), kl_to_base=lost)
        for r in range(rung + (not failed))
    )  # fmt: skip
    cause = None
    if failed:
        cause = "out of memory at micro_batch_size 8, and again at 4" if strategy == "lora" else "the loss became nan"
    if stopped:
        cause = "cannot keep the contract any more: retention of facts is 0.61, and 0.95 is asked"
    trial = Trial(
        name=name, strategy=strategy, config=config, seed=0, rung=rung,
        state="failed" if failed else "stopped" if stopped else "finished", cause=cause,
        tokens=20_000 * 3**rung, seconds=9.0 * 3**rung, gpu_hours=9.0 * 3**rung / 3600, curve=curve,
        attempts=2 if failed else 1,
    )  # fmt: skip
    if failed or stopped:
        return trial, []
    return trial, [_between(trial, gain, lost, alpha, max_loss) for alpha in (None, 0.25, 0.5, 0.75)]


def _between(trial: Trial, gain: float, lost: float, alpha: float | None, max_loss: float) -> Point:
    share = 1.0 if alpha is None else alpha
    here, kept = gain * share**0.6, min(1.0, 1 - lost * share**1.8)
    contract: State = (
        "kept" if kept - 0.01 >= 1 - max_loss else "undecided" if kept + 0.01 >= 1 - max_loss else "broken"
    )
    return point(
        here,
        kept, trial.name, contract, strategy=trial.strategy, alpha=alpha, rung=trial.rung,
        retention=measured(kept, 0.01, 1.0), retention_mean=measured(min(1.0, kept + 0.01), 0.01, 1.0),
        kl_to_base=lost * share**2, tokens=trial.tokens, gpu_hours=trial.gpu_hours,
        suites=_suites(here, kept, contract, max_loss),
    )  # fmt: skip


def _suites(gain: float, kept: float, contract: State, max_loss: float) -> tuple[Suite, ...]:
    """A target suite from 0.1, and two retention suites from 0.9 and from 2 nats."""
    return (
        Suite(name="sums", role="target", metric="exact_match", unit="share", base=0.1, tuned=0.1 + gain,
              change=measured(gain), retention=None, bound=0.2, state="kept"),
        Suite(name="facts", role="retention", metric="exact_match", unit="share", base=0.9, tuned=0.9 * kept,
              change=measured(0.9 * (kept - 1)), retention=measured(kept, 0.01, 1.0), bound=1 - max_loss / 0.9,
              state=contract),
        Suite(name="general text", role="retention", metric="cross_entropy", unit="nats per byte", base=2.0,
              tuned=2.0, change=measured(0.0), retention=measured(1.0, 0.01, 1.0), bound=math.exp(-max_loss),
              state="kept"),
    )  # fmt: skip


def _finalists(winners: list[Point], points: list[Point], trials: list[Trial]) -> tuple[list[Finalist], list[Trial]]:
    best: dict[str, Point] = {}
    for candidate in [*winners, *sorted(points, key=lambda p: -p.gain.value)]:
        best.setdefault(candidate.strategy, candidate)
    by_name = {trial.name: trial for trial in trials}
    finalists, reruns = [], []
    most = max((p for p in points if p.strategy == "full" and p.alpha is None), key=lambda p: p.gain.value)
    for chosen in [*(p for p in best.values() if p.strategy != "full"), most][:6]:
        original = by_name[chosen.trial]
        again = [
            original.model_copy(
                update={"name": f"{original.name}-seed-{seed}", "seed": seed, "rerun_of": original.name}
            )
            for seed in (1, 2)
        ]
        reruns += again
        names = (original.name, *(trial.name for trial in again))
        kept = chosen.contract == "kept"
        finalists.append(
            finalist(
                chosen.gain.value,
                chosen.retention.value,
                chosen.trial,
                chosen.contract,
                strategy=chosen.strategy,
                alpha=chosen.alpha,
                trials=names,
                gain=measured(chosen.gain.value, 0.02),
                reasons=() if kept else ("facts lost 0.0800 (share), more than the allowed 0.0500",),
            )
        )
    return finalists, reruns
