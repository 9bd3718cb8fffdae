"""The last part of a sweep: finalists again under more seeds, one winner by validation, scored once on test."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import yaml
from rich.console import Console

from sweeps.folder import SweepFolder
from sweeps.gather import gather
from sweeps.measures import pool
from sweeps.pareto import choose, nominate
from sweeps.presets import amounts
from sweeps.result import Finalist, Point, Split, SweepResult, Winner, write_result
from sweeps.spec import SweepSpec
from sweeps.trial import TrialJob, artifact_at, card_file
from sweeps.watch import Watch
from training import stages
from training.evaluation.scorecard import Scorecard, read_scorecard
from training.spec import RunSpec
from training.workspace import RunFolder, Workspace, read_json, write_json


def finish(
    sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, result: SweepResult, console: Console
) -> SweepResult:
    """The result with its finalists and its winner; Ray is connected by the caller."""
    nominees = _nominees(sweep, folder, result)
    if nominees:
        seeds = amounts(sweep).seeds
        console.print(f"finalists: {', '.join(_named(point) for point in nominees)}, over {len(seeds)} seeds")
        _rerun(sweep, folder, workspace, nominees, console)
    finalists = tuple(_pooled(sweep, folder, workspace, point) for point in nominees)
    result = gather(sweep, folder, result.notes[len(folder.read_shared().notes) :])
    result = result.model_copy(update={"finalists": finalists})
    write_result(folder.result, result)
    winner = _winner(sweep, folder, workspace, finalists, console)
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    notes = result.notes
    if winner is None:
        notes = (*notes, choose(finalists).reason if finalists else "no trial came to its end, so nothing can win")
    return result.model_copy(update={"winner": winner, "finished": ended, "notes": notes})


def _nominees(sweep: SweepSpec, folder: SweepFolder, result: SweepResult) -> list[Point]:
    """Written down, so that a resumed sweep goes on with the same ones."""
    file = folder.path / "finalists.json"
    if file.is_file():
        return [Point.model_validate(point) for point in read_json(file)]
    chosen = nominate(result.points, amounts(sweep).finalists, result.full_strategy)
    write_json(file, [point.model_dump(mode="json") for point in chosen])
    return chosen


def _named(point: Point) -> str:
    return point.trial if point.alpha is None else f"{point.trial} at alpha {point.alpha:g}"


def _trials_of(sweep: SweepSpec, point: Point) -> dict[int, str]:
    """The trials of a finalist by seed: the nominee stands for its own, unless its setting changed on its way."""
    stands = sweep.search != "pbt"
    return {
        seed: point.trial if stands and seed == point.seed else f"{point.trial}-seed-{seed}"
        for seed in sorted({point.seed, *amounts(sweep).seeds})
    }


def _rerun(
    sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, nominees: Sequence[Point], console: Console
) -> None:
    from sweeps.driver import try_jobs

    jobs = seed_jobs(sweep, folder, nominees)
    try_jobs(jobs, sweep, folder, workspace, Watch(sweep, folder, workspace, console), whole=True)


def seed_jobs(sweep: SweepSpec, folder: SweepFolder, nominees: Sequence[Point]) -> list[TrialJob]:
    """The nominees' trials under other seeds. A trial runs once a seed, whichever places of its curve are nominees."""
    alphas: dict[str, list[float]] = {}
    for point in nominees:
        alphas.setdefault(point.trial, []).extend(() if point.alpha is None else (point.alpha,))
    jobs: dict[str, TrialJob] = {}
    for point in nominees:
        record = folder.read(point.trial)
        assert record is not None
        setting = dict(record.trial.config)
        for seed, name in _trials_of(sweep, point).items():
            if name != point.trial:
                standing = sorted(alphas[point.trial])
                jobs[name] = TrialJob(name, point.strategy, setting, seed, rerun_of=point.trial, alphas=standing)
    return list(jobs.values())


def _done(sweep: SweepSpec, folder: SweepFolder, point: Point) -> dict[int, str]:
    """The finalist's trials that came to their end."""
    found = {}
    for seed, name in _trials_of(sweep, point).items():
        record = folder.read(name)
        if record is not None and record.trial.state == "finished":
            found[seed] = name
    return found


def _pooled(sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, point: Point) -> Finalist:
    done = _done(sweep, folder, point)
    cards = [read_scorecard(card_file(folder.run_of(workspace, name), point.alpha)) for name in done.values()]
    return _finalist(sweep, point.trial, point.strategy, point.alpha, done, cards, "validation")


def _finalist(
    sweep: SweepSpec,
    trial: str,
    strategy: str,
    alpha: float | None,
    done: dict[int, str],
    cards: Sequence[Scorecard],
    split: Split,
) -> Finalist:
    measures = pool(cards, sweep.contract or sweep.run.contract)
    return Finalist(
        trial=trial,
        strategy=strategy,
        alpha=alpha,
        seeds=tuple(done),
        trials=tuple(done.values()),
        gain=measures.gain,
        retention=measures.retention,
        retention_mean=measures.retention_mean,
        contract=measures.contract,
        reasons=measures.reasons,
        split=split,
        suites=measures.suites,
    )


def _winner(
    sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, finalists: Sequence[Finalist], console: Console
) -> Winner | None:
    choice = choose(finalists)
    best = choice.best
    if best is None:
        return None
    console.print(f"winner [bold]{best.trial}[/] ({best.strategy}); scoring it on test, once")
    done = dict(zip(best.seeds, best.trials, strict=True))
    cards = _test_cards(folder, workspace, best.trials, best.alpha)
    test = _finalist(sweep, best.trial, best.strategy, best.alpha, done, cards, "test")
    run = folder.run_of(workspace, best.trial if best.trial in best.trials else best.trials[0])
    return Winner(
        trial=best.trial,
        strategy=best.strategy,
        alpha=best.alpha,
        seeds=best.seeds,
        reason=choice.reason,
        spec_yaml=winning_spec(sweep, run, best.alpha),
        test=test,
        artifact=str(artifact_at(run, best.alpha)),
        run=run.id,
    )


def _test_cards(
    folder: SweepFolder, workspace: Workspace, trials: Sequence[str], alpha: float | None
) -> list[Scorecard]:
    """The scorecards of trials' artifacts on the test suites, each scored in a process of its own as any run's."""
    runs = [folder.run_of(workspace, name) for name in trials]
    spec = stages.spec_of(runs[0]).model_copy(update={"suites": folder.read_shared().test})
    models = {f"test-{run.id}": artifact_at(run, alpha) for run in runs}
    scored = stages.score_artifacts(runs[0], spec, workspace, models)
    cards = [scored[f"test-{run.id}"].model_copy(update={"run_id": run.id}) for run in runs]
    for run, card in zip(runs, cards, strict=True):
        write_json(run.path / "test-scorecard.json", card.model_dump(mode="json"))
    return cards


def winning_spec(sweep: SweepSpec, run: RunFolder, alpha: float | None) -> str:
    """A run spec in YAML that makes the winner again, on the suites that the base run has."""
    spec = stages.spec_of(run)
    protections: tuple[dict[str, object], ...] = ()
    if alpha is not None:
        protections = ({"type": "wise", "alpha": alpha},)
    own = sweep.run.training
    kept = ("validation_items", "validate_every_steps", "checkpoint_every_steps")
    raw = spec.model_dump(mode="json", exclude_none=True)
    raw["protections"] = [*raw["protections"], *protections]
    raw["suites"] = sweep.run.suites.model_dump(mode="json", exclude_none=True)
    raw["training"] |= {key: own.model_dump(mode="json")[key] for key in kept}
    RunSpec.model_validate(raw)
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
