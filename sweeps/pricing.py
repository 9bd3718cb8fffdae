"""The price of a sweep's spec, for `tenure sweep --plan`: every strategy planned, nothing run."""

from __future__ import annotations

import os
from dataclasses import asdict

from sweeps.presets import amounts, strategies
from sweeps.price import Price, Search, StrategyPrice, at_once, known_timings, shape_of
from sweeps.space import draw, grid_size, run_spec, settings
from sweeps.spec import SweepSpec
from training.workspace import Workspace


def search_of(sweep: SweepSpec, tokens: int) -> Search:
    """How a sweep searches, in numbers."""
    given = amounts(sweep)
    trials = len(settings(sweep)) if sweep.search == "grid" else given.trials
    return Search(
        trials=trials,
        rungs=1 if sweep.search == "pbt" else given.rungs,
        reduction=sweep.reduction,
        tokens_per_trial=tokens,
        finalists=min(given.finalists, trials),
        seeds=len(given.seeds),
        alphas=len(sweep.alphas),
    )


def price_of(sweep: SweepSpec, tokens: int, workspace: Workspace, have: dict[str, float] | None = None) -> Price:
    """What a sweep will take.

    Args:
        have: the cluster's resources; by default this machine's processors and GPUs.
    """
    from sweeps.trial import settle

    timings = known_timings(workspace)
    priced = []
    for number, strategy in enumerate(strategies(sweep)):
        spec, plan, _ = settle(run_spec(sweep, draw(sweep, number)), tokens, workspace)
        shape = shape_of(spec.model_dump(mode="json"), asdict(plan))
        found = timings.get(shape)
        memory = plan.memory_per_worker_bytes
        priced.append(StrategyPrice(strategy.name, plan.trainable_parameters, memory, plan.steps, found))
    fits = at_once(have or _of_this_machine(), needs(sweep))
    gpus = needs(sweep).get("GPU", 0.0)
    points = grid_size(sweep) if sweep.search == "grid" else None
    side_by_side = min(fits, sweep.trials_at_once or fits)
    return Price(search_of(sweep, tokens), tuple(priced), side_by_side, gpus, points)


def _of_this_machine() -> dict[str, float]:
    import torch

    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def needs(sweep: SweepSpec) -> dict[str, float]:
    """What one trial takes of the cluster, all its workers together."""
    scaling = sweep.run.scaling
    gpus = scaling.workers * scaling.gpus_per_worker / sweep.trials_per_gpu
    return {"CPU": float(scaling.workers * scaling.cpus_per_worker), **({"GPU": gpus} if gpus else {})}


def claims(sweep: SweepSpec) -> dict[str, float]:
    """What one trial's own process claims: all that the trial needs, or next to nothing where Ray Train has workers."""
    return needs(sweep) if sweep.run.scaling.workers == 1 else {"CPU": 0.01}  # Ray refuses to claim nothing at all
