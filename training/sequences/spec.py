"""The spec of a task sequence: what a run's spec says, and tasks that are learned one after the other.

Each task is a run of its own from the artifact of the one before. What is carried from task to task stands under
`carry`. Free of torch, ray and transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from pydantic import Field, ValidationInfo, create_model, field_validator, model_validator

from training.section import Count, Flag, Fraction, Name, Positive, Section, Source, Text, fault
from training.spec import Contract, Data, Evaluation, Export, Scaling, Training
from training.strategy import ImportanceFolder, Normalise, Objective, Protection, Sft, Tuning, Update, known_model
from training.suite_spec import Suite


class CarriedReplay(Section):
    """Rows of all tasks before, at this share of every global batch; those of `data` from the first task on."""

    type: Literal["replay"] = "replay"
    share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.25
    data: tuple[Source, ...] = ()


class CarriedEwc(Section):
    """Online EWC (arXiv 1805.06370): before each task the importance on the rows of the last one is added.

    The earlier sum counts `gamma` times. The first task is held to the base where `importance` or `data` are given.
    """

    type: Literal["ewc"] = "ewc"
    strength: Positive
    update: Update = "auto"
    normalise: Normalise = "mean"
    stored: Literal["fp32", "bf16"] = "fp32"
    estimator: Literal["exact", "empirical"] = "exact"
    examples: Count = 256
    gamma: Fraction = 1.0
    importance: ImportanceFolder | None = None
    data: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _one_origin(self) -> CarriedEwc:
        if self.importance and self.data:
            raise fault("ewc takes the base's importance from one place", "remove importance or data", ("data",))
        return self


class CarriedSi(Section):
    """Synaptic intelligence (arXiv 1703.04200): each task records its path, which the next ones are held by.

    The first task is held to the base where `importance` or `data`, for a consolidation pass, are given.
    """

    type: Literal["si"] = "si"
    strength: Positive
    update: Update = "auto"
    normalise: Normalise = "mean"
    stored: Literal["fp32", "bf16"] = "fp32"
    steps: Count = 50
    learning_rate: Positive = 1e-5
    xi: Positive = 1e-3
    importance: ImportanceFolder | None = None
    data: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _one_origin(self) -> CarriedSi:
        if self.importance and self.data:
            raise fault("si takes its importance from one place", "remove importance or data", ("data",))
        return self


AnyCarried = CarriedReplay | CarriedEwc | CarriedSi
Carried = Annotated[AnyCarried, Field(discriminator="type")]

if TYPE_CHECKING:
    TrainingChanges = Training
else:
    # Every key of a run's training section, none of them required: what is given is laid over the sequence's own.
    _keys = {name: (Optional[field.annotation], None) for name, field in Training.model_fields.items()}  # noqa: UP045
    TrainingChanges = create_model("TrainingChanges", __base__=Section, **_keys)


class TaskSuites(Section):
    """What one task is scored on: `min_gain` holds while it is learned, `max_loss` in every task after it."""

    target: Annotated[tuple[Suite, ...], Field(min_length=1)]


class Task(Section):
    """One task: its rows and suites, and what differs from the sequence. `training` is laid over, others replace."""

    name: Name
    data: Data
    suites: TaskSuites
    objective: Objective | None = None
    tuning: Tuning | None = None
    protections: tuple[Protection, ...] | None = None
    contract: Contract | None = None
    training: TrainingChanges | None = None


class SharedSuites(Section):
    """What is watched from the base to the last task."""

    retention: tuple[Suite, ...] = ()
    inherit: Flag = True

    @field_validator("retention")
    @classmethod
    def _no_gain(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        for index, suite in enumerate(value):
            if suite.min_gain is not None:
                raise fault("min_gain means nothing for a retention suite", "use max_loss", (index, "min_gain"))
        return value


class SequenceSpec(Section):
    """Tasks that are learned one after the other, each from the artifact of the one before.

    `score_ahead` says whether tasks are scored before they are learned, which forward transfer needs.
    """

    name: Name
    model: Text
    objective: Objective = Sft()
    tuning: Tuning
    protections: tuple[Protection, ...] = ()
    carry: tuple[Carried, ...] = ()
    suites: SharedSuites = SharedSuites()
    score_ahead: Flag = True
    contract: Contract = Contract()
    evaluation: Evaluation = Evaluation()
    scaling: Scaling = Scaling()
    training: Training
    export: Export = Export()
    tasks: tuple[Task, ...]

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, value: str, info: ValidationInfo) -> str:
        return known_model(value, info)

    @field_validator("carry")
    @classmethod
    def _each_once(cls, value: tuple[AnyCarried, ...]) -> tuple[AnyCarried, ...]:
        kinds = [carried.type for carried in value]
        for index, kind in enumerate(kinds):
            if kind in kinds[:index]:
                raise fault(f"{kind} is carried twice", "list it once", (index,))
        return value

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, value: tuple[Task, ...], info: ValidationInfo) -> tuple[Task, ...]:
        if len(value) < 2:
            what = f"a sequence has two tasks or more, and here {'is one' if value else 'are none'}"
            raise fault(what, "add the next one, or train one task alone: tenure train SPEC")
        shared = info.data.get("suites", SharedSuites())
        suites, tasks = {suite.name for suite in shared.retention}, set[str]()
        for index, task in enumerate(value):
            if task.name in tasks:
                raise fault(f"two tasks are called '{task.name}'", "give each its own name", (index, "name"))
            tasks.add(task.name)
            for place, suite in enumerate(task.suites.target):
                if suite.name in suites:
                    at = (index, "suites", "target", place)
                    raise fault(f"two suites are called '{suite.name}'", "give each its own name", at)
                suites.add(suite.name)
        return value
