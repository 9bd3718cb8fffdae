"""What a sweep does where its spec does not say: how much it tries, which strategies, which learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from sweeps.spec import LEARNING_RATE, Preset, Range, Strategy, SweepSpec
from training.strategy import AnyTuning, Full, Kl, L2sp, Lora, Stm, is_adapter


@dataclass(frozen=True)
class Amounts:
    """How much a preset tries: trials, rungs, finalists, and the seeds that those run under."""

    trials: int
    rungs: int
    finalists: int
    seeds: tuple[int, ...]


AMOUNTS: dict[Preset, Amounts] = {
    "quick": Amounts(trials=7, rungs=2, finalists=2, seeds=(0, 1)),
    "standard": Amounts(trials=28, rungs=3, finalists=3, seeds=(0, 1, 2)),
    "thorough": Amounts(trials=96, rungs=3, finalists=5, seeds=(0, 1, 2)),
}

GENERATIONS = 4  # of population-based training

_PULL = {"protections.0.strength": Range(low=0.003, high=1.0, log=True)}
_KL = {"protections.0.strength": Range(low=0.1, high=3.0, log=True)}
# Those that need no data beyond the base run's own.
STRATEGIES: tuple[Strategy, ...] = (
    Strategy(name="full", tuning=Full(), protections=()),
    Strategy(name="lora", tuning=Lora(), protections=()),
    Strategy(name="full-l2sp", tuning=Full(), protections=(L2sp(strength=0.1),), space=dict(_PULL)),
    Strategy(name="lora-kl", tuning=Lora(), protections=(Kl(),), space=dict(_KL)),
    Strategy(name="full-kl", tuning=Full(), protections=(Kl(),), space=dict(_KL)),
    Strategy(name="full-stm", tuning=Full(), protections=(Stm(),)),
    Strategy(name="rslora", tuning=Lora(rank=64, alpha=16, options={"use_rslora": True}), protections=()),
)


def amounts(spec: SweepSpec) -> Amounts:
    """What the spec says, and the preset (standard without one) where it says nothing."""
    given = AMOUNTS[spec.preset or "standard"]
    return Amounts(
        trials=spec.budget.trials or given.trials,
        rungs=spec.rungs or _rungs(spec, given.rungs),
        finalists=given.finalists if spec.finalists is None else spec.finalists,
        seeds=spec.seeds or given.seeds,
    )


def _rungs(spec: SweepSpec, given: int) -> int:
    if spec.search == "pbt":
        return GENERATIONS
    return 1 if spec.scheduler == "none" or spec.run.scaling.workers > 1 else given


def learning_rates(tuning: AnyTuning) -> Range:
    """The range of a tuning's learning rate: adapters want about ten times what whole weights want."""
    if is_adapter(tuning):
        return Range(low=1e-4, high=3e-3, log=True)
    return Range(low=1e-5, high=3e-4, log=True)


def strategies(spec: SweepSpec) -> tuple[Strategy, ...]:
    """The strategies that are compared, each with all its ranges: its own, the sweep's, a learning rate's by tuning."""
    given = spec.strategies or (STRATEGIES if spec.preset else (Strategy(name="base"),))
    return tuple(_with_ranges(strategy, spec) for strategy in given)


def _with_ranges(strategy: Strategy, spec: SweepSpec) -> Strategy:
    shared = {path: dimension for path, dimension in spec.space.items() if path not in strategy.set}
    own = {**shared, **strategy.space}
    if LEARNING_RATE not in own and LEARNING_RATE not in strategy.set and (spec.preset or strategy.tuning):
        own[LEARNING_RATE] = learning_rates(strategy.tuning or spec.run.tuning)
    return strategy.model_copy(update={"space": own})
