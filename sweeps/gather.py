"""The result of a sweep from the records of its trials, at any time."""

from __future__ import annotations

from sweeps.folder import SweepFolder
from sweeps.presets import amounts, strategies
from sweeps.result import Amount, SweepResult
from sweeps.space import dimensions
from sweeps.spec import SweepSpec
from sweeps.watch import amount_spent
from training.evaluation.metrics import NATS
from training.models import hash_folder
from training.strategy import Full


def gather(sweep: SweepSpec, folder: SweepFolder, notes: tuple[str, ...] = ()) -> SweepResult:
    """What the trials came to so far; finalists and winner are not in it."""
    from pathlib import Path

    shared, records = folder.read_shared(), list(folder.records())
    suites = shared.validation
    return SweepResult(
        name=folder.id,
        base=sweep.run.model,
        contract=sweep.contract or sweep.run.contract,
        gain_unit=NATS.get(suites.target[0].metric, "share"),
        target_suites=tuple(suite.name for suite in suites.target),
        retention_suites=tuple(suite.name for suite in suites.retention),
        dimensions=dimensions(sweep),
        trials=tuple(record.trial for record in records),
        # Other seeds of a setting are for its interval: on the front they would let it try its luck again.
        points=tuple(point for record in records if record.trial.rerun_of is None for point in record.points),
        full_strategy=plain_full(sweep),
        search=describe(sweep),
        budget=Amount(**sweep.budget.model_dump()),
        spent=amount_spent(folder),
        started=shared.started,
        hashes={"base": hash_folder(Path(sweep.run.model))},
        notes=(*shared.notes, *notes),
    )


def plain_full(sweep: SweepSpec) -> str | None:
    """The strategy that is full tuning without protections, where there is one."""
    for strategy in strategies(sweep):
        tuning = strategy.tuning or sweep.run.tuning
        protections = sweep.run.protections if strategy.protections is None else strategy.protections
        if isinstance(tuning, Full) and not protections:
            return strategy.name
    return None


def describe(sweep: SweepSpec) -> str:
    """How it searched, in words."""
    given = amounts(sweep)
    if sweep.search == "pbt":
        return f"population-based training, {given.trials} trials over {given.rungs} generations"
    halving = f"ASHA over {given.rungs} rungs by {sweep.reduction}" if given.rungs > 1 else "no early stopping"
    preset = f", preset {sweep.preset}" if sweep.preset else ""
    return f"{sweep.search}, {halving}{preset}"
