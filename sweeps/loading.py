"""Reads the spec of a sweep from its file, with its base run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sweeps.population import is_changeable
from sweeps.presets import amounts, strategies
from sweeps.space import check_space
from sweeps.spec import SweepSpec
from training.errors import Problem, raise_all
from training.spec import RunSpec
from training.specfile import load_spec, read_section
from training.yamlfile import read_yaml


def is_sweep(path: Path) -> bool:
    """Whether a spec file is that of a sweep."""
    return "base" in read_yaml(path)[0]


def load_sweep(
    path: Path,
    *,
    look_at_files: bool = True,
    find_model: Callable[[str], str | Path] | None = None,
    complete: Callable[[RunSpec], RunSpec] = lambda spec: spec,
) -> tuple[SweepSpec, list[str]]:
    """The validated sweep in a YAML file with its base as a run spec, and what a user should know about its space.

    Args:
        look_at_files, find_model: as for specfile.load_spec().
        complete: adds to the base what is not in its file, such as the suites of presets.

    Raises:
        TenureError: with every fault found, those of the base included.
    """
    context = {"folder": path.parent, "look_at_files": look_at_files, "find_model": find_model}
    sweep, _ = read_section(SweepSpec, path, context)
    base = sweep.base
    if not isinstance(base, RunSpec):
        base = load_spec(path.parent / base, look_at_files=look_at_files, find_model=find_model)
    whole = sweep.model_copy(update={"base": complete(base)})
    check_claims(whole)
    return whole, check_space(whole)


def _population_problems(sweep: SweepSpec) -> Iterator[Problem]:
    given = amounts(sweep)
    if sweep.run.scaling.workers > 1:
        what = f"a trial of {sweep.run.scaling.workers} workers trains in one go, and takes over nothing on its way"
        yield Problem(what, "search", "set scaling.workers: 1 in the base, or search otherwise")
    if given.rungs < 2 or given.trials < 2:
        what = f"a population of {given.trials} over {given.rungs} generations learns nothing from each other"
        yield Problem(what, "search", "give rungs and budget.trials of 2 or more")
    if not any(is_changeable(path) for strategy in strategies(sweep) for path in strategy.space):
        what = "nothing of the space may change while a model is trained"
        yield Problem(what, "space", "give training.learning_rate a range, or a protection's strength")


def check_claims(sweep: SweepSpec) -> None:
    """Refuse trials of several workers where only those of one will do, and trials that claim more than others.

    Raises:
        TenureError: with all that is wrong.
    """
    workers = sweep.run.scaling.workers
    problems = []
    for key, asked in (("rungs", (sweep.rungs or 1) > 1), ("trials_per_gpu", sweep.trials_per_gpu > 1)):
        if workers > 1 and asked:
            what = f"a trial of {workers} workers trains in one go, on GPUs of its own"
            problems.append(Problem(what, key, f"leave {key} out, or set scaling.workers: 1 in the base"))
    if sweep.search == "pbt":
        problems += _population_problems(sweep)
    paths = {path for strategy in strategies(sweep) for path in (*strategy.set, *strategy.space)}
    for path in sorted(paths):
        if path.startswith("scaling.") and path != "scaling.zero_stage":
            what = f"'{path}' differs between trials, and all of them claim alike"
            problems.append(Problem(what, "space", "set it in the base"))
    raise_all(problems)
