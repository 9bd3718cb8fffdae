"""What is settled and computed once, before the first trial: splits, tokens, base scores, signals, importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from sweeps.folder import Shared, SweepFolder
from sweeps.measures import GIVE_ANOTHER, NOTHING_KEPT
from sweeps.presets import strategies
from sweeps.space import Setting, draw, run_spec
from sweeps.spec import SweepSpec
from sweeps.splitting import split_suites
from training import stages
from training.aids import ready_aids, ready_data
from training.data.items import Answered
from training.data.prepare import load_prepared
from training.errors import Problem, raise_all
from training.evaluation import scoring
from training.evaluation.judge import threshold_of
from training.evaluation.metrics import NATS
from training.spec import RunSpec, Suites
from training.workspace import RunFolder, Workspace, write_json


def plan_strategies(sweep: SweepSpec, workspace: Workspace) -> int:
    """Plan a run of every strategy, so that what is wrong with one is told before anything starts.

    Returns:
        The tokens that every trial trains on: those asked for, or what the first strategy's run takes.

    Raises:
        TenureError: with the faults of all of them.
    """
    from sweeps.trial import tokens_of
    from training.errors import TenureError

    found: dict[Problem, list[str]] = {}
    tokens: list[int] = []
    count = len(strategies(sweep))
    for number in range(count):
        setting = draw(sweep, number)
        try:
            spec = run_spec(sweep, setting)
            plan, prepared = stages.plan_run(spec, workspace)
            tokens.append(sweep.tokens_per_trial or tokens_of(spec, plan, load_prepared(prepared)))
        except TenureError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(f"'{setting.strategy}'")
    raise_all(Problem(p.what, f"{_these(names, count)}: {p.where}", p.instead) for p, names in found.items())
    return tokens[0]


def _these(names: Sequence[str], of: int) -> str:
    """The strategies that share a fault, each named unless all have it."""
    if len(names) == of > 1:
        return "every strategy"
    return f"{'strategy' if len(names) == 1 else 'strategies'} {', '.join(names)}"


def settle(sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, tokens: int, notes: Iterable[str]) -> Shared:
    """Split the suites and open the sweep's own run in MLflow; written, so that a resumed sweep does the same."""
    validation, test, told = halves(sweep, workspace)
    shared = Shared(
        validation=validation,
        test=test,
        tokens_per_trial=tokens,
        mlflow_run=start_parent(workspace, folder.id),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=(*notes, *told),
    )
    write_json(folder.shared, shared.model_dump(mode="json"))
    return shared


def halves(sweep: SweepSpec, workspace: Workspace) -> tuple[Suites, Suites, list[str]]:
    """Validation and test suites: the base's and those under `test`, or the base's items split."""
    if sweep.test is not None:
        return sweep.run.suites, sweep.test, []
    return split_suites(sweep.run.suites, sweep.split, workspace)


def start_parent(workspace: Workspace, name: str) -> str:
    """The MLflow run that all trials are children of."""
    from training.mlflow_store import client
    from training.tracking import experiment_of

    store = client(workspace)
    tags = {"sweep": name}
    return str(store.create_run(experiment_of(store, workspace), run_name=name, tags=tags).info.run_id)


def share(
    sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, settings: Iterable[Setting], console: Console
) -> None:
    """Compute what trials only read, once a cluster: encoded data, base scores, signals, importance."""
    shared = folder.read_shared()
    specs = [run_spec(sweep, setting, name=folder.id, suites=shared.validation) for setting in settings]
    console.print("scoring the base")
    for line in score_base(specs[0], folder, workspace):
        console.print(f"[yellow]weak suite[/] {escape(line)}")
    check_reachable(specs[0], workspace)
    prepared = [ready_data(spec, workspace, console) for spec in specs]
    limit = stages.memory_limit(specs[0].scaling)
    per_gpu = sweep.trials_per_gpu if specs[0].scaling.workers == 1 else 1
    with ThreadPoolExecutor(per_gpu if specs[0].scaling.gpus_per_worker else 1) as pool:
        made = [
            pool.submit(ready_aids, spec, data, workspace, folder.logs, limit, per_gpu)
            for spec, data in zip(specs, prepared, strict=True)
        ]
        for one in made:
            one.result()


def score_base(spec: RunSpec, folder: SweepFolder, workspace: Workspace) -> list[str]:
    """The base's answers to the suites of a spec, into the cache; which suites are weak, in words."""
    return stages.check_power(RunFolder(folder.path), spec, workspace)


def check_reachable(spec: RunSpec, workspace: Workspace) -> None:
    """Refuse what no trial can do: gain beyond the best score that there is, or show what it forgot.

    Raises:
        TenureError: with every suite on which that is so.
    """
    cached = scoring.cached_scores(workspace, Path(spec.model), stages.protocol_key(spec)[1])
    answers = scoring.read_scores(cached)[0]
    problems = [*_beyond_reach(spec, answers)]
    if not any(suite.metric in NATS or _above_chance(answers[suite.name]) > 0 for suite in spec.suites.retention):
        problems.append(Problem(NOTHING_KEPT, "suites.retention", GIVE_ANOTHER))
    raise_all(problems)


def _beyond_reach(spec: RunSpec, answers: Mapping[str, Sequence[Answered]]) -> Iterator[Problem]:
    for suite in spec.suites.target:
        base = _mean([answer.score for answer in answers[suite.name]], answers[suite.name])
        most = base if suite.metric in NATS else 1 - base
        asked = threshold_of(suite, "target", spec.contract)
        if asked > most:
            what = (
                f"nothing can gain {asked:g} on '{suite.name}': the base has {base:.4f}, so at most {most:.4f} is left"
            )
            yield Problem(what, "contract: min_gain", f"promise less than {most:.4f}, or give harder items")


def _above_chance(answers: Sequence[Answered]) -> float:
    """How far a mean score lies above chance."""
    return _mean([answer.score - answer.chance for answer in answers], answers)


def _mean(values: Sequence[float], answers: Sequence[Answered]) -> float:
    return float(np.average(values, weights=[answer.weight for answer in answers]))
