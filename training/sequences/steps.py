"""From a sequence to the run of each of its tasks: the spec of a step, and why it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.errors import Problem, raise_all
from training.section import Source
from training.sequences.spec import AnyCarried, CarriedEwc, CarriedReplay, CarriedSi, SequenceSpec, Task
from training.spec import CrossEntropy, RunSpec, Suites
from training.specfile import read_section, where_of
from training.strategy import Ewc, Replay, Si, Wise, is_adapter, unmergeable
from training.suite_spec import AnySuite
from training.workspace import MERGED_FOLDER
from training.yamlfile import Location, read_yaml


@dataclass(frozen=True)
class Before:
    """What a step goes on from: a model, and by a protection's type the importance that the last step used or left."""

    model: str
    importances: dict[str, Path] = field(default_factory=dict)


def is_sequence(path: Path) -> bool:
    """Whether a spec file holds tasks.

    Raises:
        TenureError: it cannot be read.
    """
    return "tasks" in read_yaml(path)[0]


def load_sequence(
    path: Path, *, look_at_files: bool = True, find_model: Callable[[str], str | Path] | None = None
) -> SequenceSpec:
    """The validated sequence in a YAML file, each of whose tasks makes a valid run; see specfile.load_spec().

    Raises:
        TenureError: with every fault found.
    """
    context = {"folder": path.parent, "look_at_files": look_at_files, "find_model": find_model}
    sequence, lines = read_section(SequenceSpec, path, context)
    raise_all(dict.fromkeys(_faults(sequence, path, lines, look_at_files)))
    return sequence


def step_spec(sequence: SequenceSpec, index: int, before: Before, *, look_at_files: bool = False) -> RunSpec:
    """The spec of the run that learns the task of that index.

    Args:
        look_at_files: refuse what needs a package that is not installed.

    Raises:
        pydantic.ValidationError: its parts do not go together; load_sequence() has told so.
    """
    task = sequence.tasks[index]
    changes = task.training.model_dump(exclude_unset=True) if task.training else {}
    merge = {"merged": True} if _must_merge(sequence, index) else {}
    parts = {
        "name": run_name(sequence, task),
        "model": before.model,
        "objective": task.objective or sequence.objective,
        "tuning": task.tuning or sequence.tuning,
        "protections": (*_own_protections(sequence, task), *(made for _, made in _carried(sequence, index, before))),
        "data": task.data,
        "suites": _suites(sequence, index),
        "contract": task.contract or sequence.contract,
        "evaluation": sequence.evaluation,
        "scaling": sequence.scaling,
        "training": sequence.training.model_copy(update=changes) if changes else sequence.training,
        "export": sequence.export.model_copy(update=merge),
    }
    return RunSpec.model_validate(parts, context={"look_at_files": look_at_files})


def run_name(sequence: SequenceSpec, task: Task) -> str:
    """What the runs of a task are called."""
    return f"{sequence.name}-{task.name}"


def next_model(artifact: Path, spec: RunSpec) -> Path:
    """The whole model that the task after a run goes on from."""
    return artifact / MERGED_FOLDER if is_adapter(spec.tuning) else artifact


def _must_merge(sequence: SequenceSpec, index: int) -> bool:
    """Whether the task leaves an adapter that the next one needs folded into its base."""
    tuning = sequence.tasks[index].tuning or sequence.tuning
    return is_adapter(tuning) and not unmergeable(tuning) and index + 1 < len(sequence.tasks)


def _own_protections(sequence: SequenceSpec, task: Task) -> tuple[Any, ...]:
    return sequence.protections if task.protections is None else task.protections


def _carried(sequence: SequenceSpec, index: int, before: Before) -> Iterator[tuple[int, Any]]:
    """The protections that come from the tasks before, each with its index under `carry`."""
    earlier = tuple(task.data.train for task in sequence.tasks[:index])
    for place, carried in enumerate(sequence.carry):
        made = _CARRY[carried.type](carried, earlier, before.importances.get(carried.type))
        if made is not None:
            yield place, made


Earlier = tuple[tuple[Source, ...], ...]


def _replay(carried: CarriedReplay, earlier: Earlier, _: Path | None) -> Replay | None:
    rows = (*carried.data, *(source for sources in earlier for source in sources))
    return Replay(share=carried.share, data=rows) if rows else None


def _ewc(carried: CarriedEwc, earlier: Earlier, last: Path | None) -> Ewc | None:
    keys = carried.model_dump(exclude={"importance", "data"})
    if earlier:
        return Ewc(**keys, data=earlier[-1], previous=last)
    return Ewc(**keys, importance=carried.importance, data=carried.data) if _holds_base(carried) else None


def _si(carried: CarriedSi, earlier: Earlier, last: Path | None) -> Si:
    keys = carried.model_dump(exclude={"importance", "data"})
    if earlier:
        return Si(**keys, importance=last, record=True)
    return Si(**keys, importance=carried.importance, data=carried.data, record=True)


def _holds_base(carried: CarriedEwc) -> bool:
    return carried.importance is not None or bool(carried.data)


_CARRY: dict[str, Callable[[Any, Earlier, Path | None], Any]] = {"replay": _replay, "ewc": _ewc, "si": _si}


# -------------------------------------------------------------------------------------------------- suites


def _suites(sequence: SequenceSpec, index: int) -> Suites:
    """The task's own suites as targets; those of the others, and the shared ones, as what is to be retained."""
    earlier = [_kept(suite) for task in sequence.tasks[:index] for suite in task.suites.target]
    later = [_watched(suite) for task in sequence.tasks[index + 1 :] for suite in task.suites.target]
    return Suites(
        target=tuple(suite.model_copy(update={"max_loss": None}) for suite in sequence.tasks[index].suites.target),
        retention=(*sequence.suites.retention, *earlier, *(later if sequence.score_ahead else ())),
        inherit=sequence.suites.inherit,
    )


def _kept(suite: AnySuite) -> AnySuite:
    return suite.model_copy(update={"min_gain": None})


def _watched(suite: AnySuite) -> AnySuite:
    """A task to come has nothing to lose yet: it may lose any share, or more nats than a byte can have."""
    most = 1000.0 if isinstance(suite, CrossEntropy) else 1.0
    return suite.model_copy(update={"min_gain": None, "max_loss": most})


# -------------------------------------------------------------------------------------------------- faults


def _faults(sequence: SequenceSpec, path: Path, lines: dict[Location, int], look_at_files: bool) -> Iterator[Problem]:
    """Why tasks make no valid run, or do not follow each other, by file, line and key; one a key."""
    told: set[Location] = set()
    for index in range(len(sequence.tasks)):
        for key, what, instead in (*_chain_faults(sequence, index), *_run_faults(sequence, index, look_at_files)):
            if key not in told:
                told.add(key)
                yield Problem(what, where_of(key, path, lines), instead)


Fault = tuple[Location, str, str]


def _chain_faults(sequence: SequenceSpec, index: int) -> Iterator[Fault]:
    """What keeps a task from being followed by another, or from following one."""
    task, following = sequence.tasks[index], index + 1 < len(sequence.tasks)
    tuning = task.tuning or sequence.tuning
    reason = unmergeable(tuning)
    if following and reason:
        what = f"the task after '{task.name}' goes on from whole weights, and {tuning.type} cannot be merged: {reason}"
        yield _key(task, index, "tuning"), what, "use lora, another method that can be merged, full or partial"
    for place, carried in enumerate(sequence.carry):
        for what, instead in _carry_faults(carried, sequence, index):
            yield ("carry", place), what, instead


def _carry_faults(carried: AnyCarried, sequence: SequenceSpec, index: int) -> Iterator[tuple[str, str]]:
    task, following = sequence.tasks[index], index + 1 < len(sequence.tasks)
    if isinstance(carried, CarriedEwc) and following and any(s.form == "preference" for s in task.data.train):
        what = f"ewc looks at single answers, and task '{task.name}' has pairs"
        yield what, "carry replay or si, or learn the pairs last"
    if isinstance(carried, CarriedSi) and following:
        if any(isinstance(one, Wise) for one in _own_protections(sequence, task)):
            what = f"si records the path to what task '{task.name}' tuned, and wise goes on from weights before it"
            yield what, "remove wise, or carry ewc"
        if (sequence.tasks[index + 1].tuning or sequence.tuning) != (task.tuning or sequence.tuning):
            what = f"si weighs the weights that moved, and the task after '{task.name}' moves others"
            yield what, "use one tuning for all tasks, or carry ewc"


def _run_faults(sequence: SequenceSpec, index: int, look_at_files: bool) -> Iterator[Fault]:
    """What RunSpec refuses about the run of a task, at the keys that the sequence's file has."""
    before = Before(sequence.model)
    try:
        step_spec(sequence, index, before, look_at_files=look_at_files)
    except ValidationError as error:
        own = len(_own_protections(sequence, sequence.tasks[index]))
        places = [place for place, _ in _carried(sequence, index, before)]
        for one in error.errors():
            context = one.get("ctx", {})
            inside = (*one["loc"], *context.get("at", ()))
            what, instead = context.get("what", one["msg"]), context.get("instead", "")
            yield _in_file(inside, sequence, index, own, places), str(what), str(instead)


def _in_file(inside: Location, sequence: SequenceSpec, index: int, own: int, places: list[int]) -> Location:
    """The key in the sequence's file that gave a run's key."""
    task = sequence.tasks[index]
    head, rest = inside[0], inside[1:]
    if head == "name":
        return ("tasks", index, "name")
    if head == "protections" and rest and isinstance(rest[0], int) and rest[0] >= own:
        return ("carry", places[rest[0] - own])
    if head == "training" and rest and task.training and rest[0] not in task.training.model_fields_set:
        return inside
    if head == "suites":
        return ("tasks", index, "suites")
    return (*_key(task, index, str(head)), *rest)


def _key(task: Task, index: int, section: str) -> Location:
    """Where a section of a task's run stands: in the task where it is given there, else in the sequence."""
    return ("tasks", index, section) if section in task.model_fields_set else (section,)
