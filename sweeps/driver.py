"""Runs a sweep: checks, what is shared, the search on Ray Tune, the finalists over their seeds, the winner's test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from sweeps.finals import finish
from sweeps.folder import SweepFolder, find_sweep, new_folder
from sweeps.gather import gather
from sweeps.population import Population, evolved, first, read_population, trained, write_population
from sweeps.preparing import plan_strategies, settle, share
from sweeps.presets import amounts, strategies
from sweeps.pricing import claims, needs
from sweeps.report import write_sweep_report
from sweeps.result import SweepResult, Trial, write_result
from sweeps.space import Setting, check_space, draw, settings
from sweeps.spec import SweepSpec
from sweeps.steering import resource
from sweeps.tracking import log_sweep
from sweeps.trial import TrialJob, forget_generations
from sweeps.watch import Budgeted, Watch, amount_spent, over, spent
from training.errors import fail
from training.faults import output_to
from training.workspace import RunFolder, Workspace, write_json, write_text

# Tune's loggers write every result three times over, and its own handler of ctrl-c keeps the sweep going.
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_KILLED_RETRIES = 2


def begin(sweep: SweepSpec, given: str, notes: Sequence[str], workspace: Workspace) -> SweepFolder:
    """Plan every strategy and make the sweep's folder; Ray is not needed yet.

    Args:
        given: the text of the spec's file, kept beside what was read.

    Raises:
        TenureError: a strategy cannot be run, or there is a sweep of that name.
    """
    if (workspace.root / "sweeps" / sweep.title).exists():
        new_folder(workspace, sweep.title)
    tokens = plan_strategies(sweep, workspace)
    folder = new_folder(workspace, sweep.title)
    write_text(folder.spec_yaml, given)
    write_json(folder.spec, sweep.model_dump(mode="json"))
    settle(sweep, folder, workspace, tokens, notes)
    return folder


def resume(name: str, workspace: Workspace) -> SweepFolder:
    """The folder of a sweep to go on with; one that ended before its suites were split is settled now.

    Raises:
        TenureError: there is none, it stopped before its spec was kept, or a strategy cannot be run any more.
    """
    folder = find_sweep(workspace, name)
    if not folder.spec.is_file():
        raise fail(f"sweep '{name}' never started", str(folder.path), "remove the folder, and start it again")
    if not folder.shared.is_file():
        sweep = folder.read_spec()
        settle(sweep, folder, workspace, plan_strategies(sweep, workspace), check_space(sweep))
    return folder


def carry_on(folder: SweepFolder, workspace: Workspace, console: Console) -> SweepResult:
    """Do what is left of a sweep; its result. Ray is connected by the caller. Finished trials are not done again."""
    sweep = folder.read_spec()
    console.print(f"sweep [bold]{folder.id}[/]   {folder.path}")
    with RunFolder(folder.path).held(), output_to(folder.logs / "driver.log"):
        known = known_settings(sweep)
        share(sweep, folder, workspace, known, console)
        notes = search(sweep, folder, workspace, console)
        result = gather(sweep, folder, notes)
        write_result(folder.result, result)
        result = finish(sweep, folder, workspace, result, console)
        _publish(folder, workspace, result)
    return result


def _publish(folder: SweepFolder, workspace: Workspace, result: SweepResult) -> None:
    """The result, its page, the winner's spec, and all of it in the tracking store."""
    write_result(folder.result, result)
    write_sweep_report(folder.report, result)
    if result.winner is not None:
        write_text(folder.winner, result.winner.spec_yaml)
    tracking_id = folder.read_shared().mlflow_run
    if tracking_id is not None:
        log_sweep(workspace, tracking_id, result, (folder.result, folder.report, folder.winner))


def known_settings(sweep: SweepSpec) -> list[Setting]:
    """All settings of a random or grid search, the first of a population; else one of every strategy."""
    if sweep.search in ("random", "grid", "pbt"):
        return settings(sweep)
    return [draw(sweep, number) for number in range(len(strategies(sweep)))]


def name_of_trial(number: int) -> str:
    return f"trial-{number:03d}"


def search(sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, console: Console) -> tuple[str, ...]:
    """Try settings until they, or the budget, are spent; what was noticed on the way."""
    watch = Watch(sweep, folder, workspace, console)
    if sweep.search == "pbt":
        _evolve(sweep, folder, workspace, watch)
    elif sweep.search in ("random", "grid"):
        jobs = [
            TrialJob(name_of_trial(number), setting.strategy, setting.values, sweep.run.training.seed)
            for number, setting in enumerate(settings(sweep))
        ]
        try_jobs(jobs, sweep, folder, workspace, watch)
    else:
        unfinished = [TrialJob(**note) for note in interrupted(folder)]
        try_jobs(unfinished, sweep, folder, workspace, watch)
        _ask_optuna(sweep, folder, workspace, watch)
    return watch.notes()


def interrupted(folder: SweepFolder) -> list[dict[str, Any]]:
    """The jobs of the search's trials that were begun and never ended; finalists' other seeds are begun by finish()."""
    found = []
    for file in sorted(folder.trials.glob("*.started.json")):
        name = file.name.removesuffix(".started.json")
        if folder.read(name) is None:
            note = folder.started(name) or {}
            if note["rerun_of"] is None:
                found.append({key: note[key] for key in ("name", "strategy", "values", "seed")})
    return found


def try_jobs(
    jobs: Sequence[TrialJob],
    sweep: SweepSpec,
    folder: SweepFolder,
    workspace: Workspace,
    watch: Watch,
    *,
    whole: bool = False,
) -> None:
    """Try given settings that have no record yet.

    Args:
        whole: train to the end without rungs.
    """
    from ray import tune

    left = [job for job in jobs if folder.read(job.name) is None]
    if not left or (not whole and spent(sweep, folder)):
        return
    plain = [{**asdict(job), "whole": whole} for job in left]
    config = _config(folder, workspace) | {"job": tune.grid_search(plain)}
    _tune(sweep, folder, watch, config, scheduler=None if whole else _scheduler(sweep, folder), samples=1, whole=whole)


def _evolve(sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, watch: Watch) -> None:
    """Train a population generation by generation, until the last or until the budget is spent."""
    population: Population | None = read_population(folder) or first(sweep)
    while population is not None:
        write_population(folder, population)
        _train_generation(population, sweep, folder, workspace, watch)
        population = _next(population, sweep, folder, watch)
    for member in first(sweep).members:
        forget_generations(folder.run_of(workspace, member.name))


def _train_generation(
    population: Population, sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, watch: Watch
) -> None:
    generation = population.generation
    known = trained(folder, population.members, generation)
    jobs = [
        TrialJob(m.name, m.strategy, m.values, sweep.run.training.seed, generation=generation, parent=m.parent)
        for m in population.members
        if m.name not in known
    ]
    try_jobs(jobs, sweep, folder, workspace, watch)


def _next(population: Population, sweep: SweepSpec, folder: SweepFolder, watch: Watch) -> Population | None:
    """The next generation; None after the last, when none is left, and when the budget is spent."""
    scores = trained(folder, population.members, population.generation)
    if population.generation == amounts(sweep).rungs - 1 or not scores:
        return None
    bound = over(sweep, amount_spent(folder, scores))
    for name in scores if bound else ():
        watch.close(name, "stopped", str(bound))
    return None if bound else evolved(sweep, population, scores)


def _ask_optuna(sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, watch: Watch) -> None:
    """Let Optuna choose settings by what was found so far; its journal outlives the driver."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray.tune.search.optuna import OptunaSearch

    left = amounts(sweep).trials - sum(1 for _ in folder.records())
    if left <= 0 or spent(sweep, folder):
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    many = sweep.search == "multi-objective"
    searcher = OptunaSearch(
        _Suggest(sweep, _config(folder, workspace)),
        metric=["gain", "retention"] if many else "score",
        mode=["max", "max"] if many else "max",
        sampler=optuna.samplers.TPESampler(seed=sweep.seed, n_startup_trials=len(strategies(sweep))),
        study_name=folder.id,
        storage=JournalStorage(JournalFileBackend(str(folder.study))),
    )
    _tune(sweep, folder, watch, {}, scheduler=_scheduler(sweep, folder), samples=left, searcher=searcher)


@dataclass(frozen=True)
class _Suggest:
    """The configuration of a trial of Optuna's; a class, since Tune writes its searcher down."""

    sweep: SweepSpec
    fixed: dict[str, Any]

    def __call__(self, trial: Any) -> dict[str, Any]:
        return self.fixed | {"job": {**asdict(_suggested(self.sweep, trial)), "whole": False}}


def _suggested(sweep: SweepSpec, trial: Any) -> TrialJob:
    """The setting that Optuna suggests: a strategy, and values of that strategy's own dimensions."""
    from sweeps.space import find_strategy
    from sweeps.spec import Range

    strategy = find_strategy(sweep, trial.suggest_categorical("strategy", [one.name for one in strategies(sweep)]))
    values: dict[str, Any] = {}
    for path, dimension in sorted(strategy.space.items()):
        name = f"{strategy.name}|{path}"
        if not isinstance(dimension, Range):
            values[path] = trial.suggest_categorical(name, list(dimension))
        elif dimension.integer:
            values[path] = trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            values[path] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
    return TrialJob(name_of_trial(trial.number), strategy.name, values, sweep.run.training.seed)


def _config(folder: SweepFolder, workspace: Workspace) -> dict[str, Any]:
    return {"workspace": str(workspace.root), "folder": str(folder.path)}


def _scheduler(sweep: SweepSpec, folder: SweepFolder) -> Any:
    """Successive halving by rungs of equal tokens; the rungs' lengths grow by the reduction factor.

    It is told of the trials that ended before, so that a resumed sweep measures the others against them.
    """
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    rungs = amounts(sweep).rungs
    if rungs == 1 or sweep.search == "pbt":
        return FIFOScheduler()
    most = sweep.reduction ** (rungs - 1)
    halving = ASHAScheduler(
        time_attr="resource",
        metric="score",
        mode="max",
        max_t=most + 1,  # or Tune would end a trial before its last rung is scored
        grace_period=1,
        reduction_factor=sweep.reduction,
        stop_last_trials=False,
    )
    for record in folder.records():
        _remember(halving, sweep, record.trial)
    return halving


def _remember(halving: Any, sweep: SweepSpec, ended: Trial) -> None:
    """Tell a scheduler what a trial that ended before was at each of its rungs."""
    if ended.rerun_of is None:
        named = SimpleNamespace(trial_id=f"before-{ended.name}")
        halving.on_trial_add(None, named)
        for seen in ended.curve:
            if seen.score is not None:
                halving.on_trial_result(None, named, {"resource": resource(sweep, seen.rung), "score": seen.score})
        halving.on_trial_remove(None, named)


def _tune(
    sweep: SweepSpec,
    folder: SweepFolder,
    watch: Watch,
    config: dict[str, Any],
    *,
    scheduler: Any,
    samples: int,
    searcher: Any = None,
    whole: bool = False,
) -> None:
    os.environ.update(_TUNE)
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig

    from sweeps.actor import TrialActor

    tuner = tune.Tuner(
        tune.with_resources(TrialActor, claims(sweep)),
        param_space=config,
        tune_config=TuneConfig(
            num_samples=samples,
            scheduler=scheduler,
            search_alg=searcher,
            reuse_actors=True,
            max_concurrent_trials=sweep.trials_at_once or _at_once(sweep),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=RunConfig(
            name="final" if whole else "search",
            storage_path=str(Path(folder.path) / "ray"),
            stop=None if whole else Budgeted(sweep, folder),
            callbacks=[watch],
            checkpoint_config=CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            failure_config=FailureConfig(max_failures=_KILLED_RETRIES),
            verbose=0,
        ),
    )
    tuner.fit()
    watch.raise_what_stopped_it()


def _at_once(sweep: SweepSpec) -> int:
    """Trials side by side: as many as the cluster's GPUs (or processors) hold."""
    import ray

    have, wants = ray.cluster_resources(), needs(sweep)
    return max(1, int(min(have.get(name, 0.0) / amount for name, amount in wants.items())))
