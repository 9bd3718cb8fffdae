"""The spec of a run: frozen, closed, and free of torch, ray and transformers.

Paths in a spec file are relative to that file. Every class is one section of the YAML.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from training.data.locations import is_url, missing_store
from training.peft_methods import PROMPT_METHODS
from training.section import (
    Count,
    Flag,
    Fraction,
    Name,
    Natural,
    NonNegative,
    Positive,
    Section,
    Source,
    Text,
    fault,
)
from training.strategy import (
    FORMS,
    Distill,
    Dpo,
    Lm,
    Lora,
    Objective,
    Protection,
    Replay,
    Sft,
    Tuning,
    is_adapter,
    is_served_as_adapter,
    known_model,
    missing_package,
    refusals,
    tuning_refusal,
    unmergeable,
)
from training.suite_spec import (
    Accuracy,
    AnySuite,
    CrossEntropy,
    ExactMatch,
    FileSuite,
    Harness,
    Suites,
)

__all__ = ["Accuracy", "AnySuite", "CrossEntropy", "ExactMatch", "FileSuite", "Harness", "RunSpec", "Suites"]

ProtectionType = TypeVar("ProtectionType", bound=Section)


class TrainSource(Source):
    """A source to train on. In a mixture it is a task, with a weight and bounds on what an epoch takes of it.

    `cap` is the most examples an epoch sees of it, `repeats` how often an epoch may go through it.
    """

    name: Name | None = None
    weight: Positive | None = None
    cap: Count | None = None
    repeats: Count = 1

    @classmethod
    def of(cls, source: Source) -> TrainSource:
        """Another source's rows, to be trained on."""
        return cls.model_validate(dict(source))

    @property
    def task(self) -> str:
        """Its name, or that of its file."""
        return self.name or Path(self.path).stem

    @property
    def mixed_by(self) -> tuple[str, ...]:
        """The keys given that say how it is mixed."""
        given = {"weight": self.weight is not None, "cap": self.cap is not None, "repeats": self.repeats > 1}
        return tuple(key for key, is_given in given.items() if is_given)


class Mixture(Section):
    """Shares of the tasks in the rows of an epoch: proportional to size^(1/temperature), size, or weight.

    Every global batch holds at least `minimum` rows of every task.
    """

    by: Literal["size", "temperature", "weight"]
    temperature: Positive | None = None
    minimum: Natural = 0

    @model_validator(mode="after")
    def _has_its_temperature(self) -> Mixture:
        if self.by == "temperature" and self.temperature is None:
            what = "by: temperature needs one"
            raise fault(what, "set temperature: 2 (1 is by size, larger ones come nearer to equal shares)")
        if self.by != "temperature" and self.temperature is not None:
            what = f"a temperature means nothing with by: {self.by}"
            raise fault(what, "set by: temperature, or remove it", ("temperature",))
        return self


class Data(Section):
    """What is trained on, and how much of a suite it may give away: a share of the suite's items."""

    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    mixture: Mixture | None = None
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"
    untaught: Literal["refuse", "drop"] = "refuse"
    max_overlap: Fraction = 0.02
    allow_overlap: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _tasks_have_names_of_their_own(self) -> Data:
        tasks = [source.task for source in self.train]
        for index, source in enumerate(self.train):
            if tasks[index] in tasks[:index] and (self.mixture or source.name):
                at = ("train", index, "name") if source.name else ("train", index)
                raise fault(f"two tasks are called '{tasks[index]}'", "give each source its own name", at)
        return self

    @model_validator(mode="after")
    def _mixing_is_asked_for(self) -> Data:
        for index, source in enumerate(self.train):
            for key in source.mixed_by:
                if self.mixture is None:
                    what, by = f"{key} needs a mixture", "weight" if source.weight else "size"
                    raise fault(what, f"set data.mixture: {{by: {by}}}, or remove {key}", ("train", index, key))
                if key == "weight" and self.mixture.by != "weight":
                    what = f"a weight means nothing with data.mixture.by: {self.mixture.by}"
                    raise fault(what, "set data.mixture.by: weight, or remove weight", ("train", index, key))
        return self


class Contract(Section):
    """The promise: every target suite gains at least min_gain, no retention suite loses more than max_loss.

    In the unit of each suite's metric: a share for exact match and accuracy, nats per byte for cross-entropy.
    `min_retention` and `max_mean_loss` bind all retention suites that are scored as shares together. `judge_by:
    interval` takes the end of the 95 % interval that speaks against the promise, and leaves undecided what it holds.
    """

    min_gain: NonNegative = 0.0
    max_loss: NonNegative = 0.02
    min_retention: Fraction | None = None
    max_mean_loss: NonNegative | None = None
    judge_by: Literal["estimate", "interval"] = "estimate"


class Evaluation(Section):
    """How models are scored: `engine` writes the answers. What is only read goes through transformers in any case.

    Both write greedily; the engine is part of the protocol, for the last digits of a tie may differ.
    """

    engine: Literal["transformers", "vllm"] = "transformers"


Kernels = Literal["auto", "liger", "compile", "none"]


class Training(Section):
    """How long, how fast, in what pieces."""

    epochs: Count = 1
    max_steps: Count | None = None
    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive | None = 1.0
    global_batch_size: Count = 32
    micro_batch_size: Count | Literal["auto"] = "auto"
    max_length: Count = 1024
    packing: Flag | Literal["auto"] = "auto"
    fused_loss: Flag = True
    gradient_checkpointing: Flag = False
    kernels: Kernels = "auto"
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: Natural = 0
    validation_items: Natural = 64
    validate_every_steps: Natural | Literal["auto"] = "auto"
    checkpoint_every_steps: Natural | Literal["auto"] = "auto"
    keep_checkpoints: Count = 2
    keep_best_checkpoints: Natural = 0
    checkpoint_in_background: Flag | Literal["auto"] = "auto"
    log_examples: Flag = False

    @model_validator(mode="after")
    def _best_can_be_told(self) -> Training:
        if self.keep_best_checkpoints and not self.validation_items:
            what = "the best checkpoints are those of the lowest validation loss, and nothing is validated"
            raise fault(what, "set validation_items", ("keep_best_checkpoints",))
        if self.keep_best_checkpoints and self.validate_every_steps != self.checkpoint_every_steps:
            what = "the best checkpoints are told by a validation at the same step"
            raise fault(what, "set validate_every_steps and checkpoint_every_steps alike", ("keep_best_checkpoints",))
        return self


class Scaling(Section):
    """Where it runs: workers of Ray Train, what each holds, and how far DeepSpeed shards."""

    workers: Count = 1
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)] | Literal["auto"] = "auto"
    min_workers: Count | None = None
    max_failures: Natural = 0
    hang_after_s: Natural = 1800
    price_per_gpu_hour: NonNegative | None = None
    copy_to: Text | None = None

    @field_validator("copy_to")
    @classmethod
    def _copies_go_to_a_store(cls, value: str | None) -> str | None:
        if value is not None and not is_url(value):
            raise fault(f"'{value}' is no URL", "give a folder in a store, such as s3://bucket/runs")
        if value is not None and (missing := missing_store(value)):
            raise fault(*missing)
        return value

    @model_validator(mode="after")
    def _least_is_not_most(self) -> Scaling:
        if self.min_workers and self.min_workers > self.workers:
            what = f"min_workers: {self.min_workers} is more than workers: {self.workers}"
            raise fault(what, "set it lower, or leave it out", ("min_workers",))
        return self


class Export(Section):
    """What the artifact holds beside the adapter or the weights."""

    merged: Flag = False


class RunSpec(Section):
    """One fine-tuning run, from a base model to a scored artifact."""

    name: Name
    model: Text
    objective: Objective = Sft()
    tuning: Tuning
    protections: tuple[Protection, ...] = ()
    data: Data
    suites: Suites
    contract: Contract = Contract()
    evaluation: Evaluation = Evaluation()
    scaling: Scaling = Scaling()
    training: Training
    export: Export = Export()

    def protection(self, kind: type[ProtectionType]) -> ProtectionType | None:
        """The protection of that kind, if the run has it."""
        return next((protection for protection in self.protections if isinstance(protection, kind)), None)

    # Checks between sections stand on the later of the two, so that they are made whatever is wrong elsewhere.

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, value: str, info: ValidationInfo) -> str:
        return known_model(value, info)

    @field_validator("protections")
    @classmethod
    def _combination_is_valid(cls, value: tuple[Protection, ...], info: ValidationInfo) -> tuple[Protection, ...]:
        if "objective" in info.data and "tuning" in info.data:
            for refusal in refusals(info.data["objective"], info.data["tuning"], value):
                raise fault(*refusal)
        return value

    @field_validator("data")
    @classmethod
    def _forms_fit(cls, value: Data, info: ValidationInfo) -> Data:
        objective: Sft | Lm | Dpo | Distill | None = info.data.get("objective")
        for index, source in enumerate(value.train):
            if objective and source.form not in (*FORMS[objective.type], "unknown"):
                what = f"objective {objective.type} cannot learn from rows of the form {source.form}"
                instead = f"give {' or '.join(FORMS[objective.type])}, or another objective"
                raise fault(what, instead, ("train", index))
        return value

    @field_validator("suites")
    @classmethod
    def _allowed_overlaps_exist(cls, value: Suites, info: ValidationInfo) -> Suites:
        known = [suite.name for suite in value.all]
        for name in info.data["data"].allow_overlap if "data" in info.data else ():
            if name not in known:
                raise fault(f"data.allow_overlap names '{name}', which is no suite", f"suites: {', '.join(known)}")
        return value

    @field_validator("evaluation")
    @classmethod
    def _engine_is_there(cls, value: Evaluation, info: ValidationInfo) -> Evaluation:
        if value.engine == "vllm":
            reason = not_for_vllm(info.data.get("tuning"), look=bool((info.context or {}).get("look_at_files")))
            if reason:
                raise fault(reason, "set engine: transformers", ("engine",))
        return value

    @field_validator("scaling")
    @classmethod
    def _tuning_works_there(cls, value: Scaling, info: ValidationInfo) -> Scaling:
        """At the given stage, or with `auto` at any: the planner takes one that works."""
        if "tuning" not in info.data:
            return value
        stages = range(4) if value.zero_stage == "auto" else (value.zero_stage,)
        found = [tuning_refusal(info.data["tuning"], stage, value.gpus_per_worker) for stage in stages]
        missing = missing_package(info.data["tuning"]) if (info.context or {}).get("look_at_files") else None
        reason = found[0] if all(found) else missing
        if reason:
            raise fault(*reason)
        return value

    @field_validator("training")
    @classmethod
    def _bf16_has_masters(cls, value: Training, info: ValidationInfo) -> Training:
        scaling = info.data.get("scaling")
        if value.precision == "bf16" and scaling and scaling.zero_stage == 0 and scaling.workers > 1:
            what = "DeepSpeed steps and accumulates in bf16 at ZeRO 0, where it keeps no fp32 masters"
            raise fault(what, "set scaling.zero_stage: 1 or auto, or precision: fp32", ("precision",))
        return value

    @field_validator("training")
    @classmethod
    def _batches_divide(cls, value: Training, info: ValidationInfo) -> Training:
        if "scaling" not in info.data:
            return value
        size, micro, workers = value.global_batch_size, value.micro_batch_size, info.data["scaling"].workers
        share = workers if micro == "auto" else workers * micro
        if size % share:
            nearest = max(share, round(size / share) * share)
            what = f"{workers} workers" if micro == "auto" else f"{workers} workers x micro_batch_size {micro}"
            raise fault(
                f"{size} does not divide by {what}", f"set global_batch_size: {nearest}", ("global_batch_size",)
            )
        return value

    @field_validator("training")
    @classmethod
    def _can_be_packed(cls, value: Training, info: ValidationInfo) -> Training:
        reason = _unpackable(info.data.get("objective"), info.data.get("tuning"))
        if value.packing is True and reason:
            raise fault(reason, "set packing: false", ("packing",))
        return value

    @field_validator("training")
    @classmethod
    def _replay_has_room(cls, value: Training, info: ValidationInfo) -> Training:
        if value.global_batch_size == 1 and any(isinstance(p, Replay) for p in info.data.get("protections", ())):
            what = "a global batch of one row has no room for a replayed one"
            raise fault(what, "set global_batch_size: 2 or more", ("global_batch_size",))
        return value

    @field_validator("training")
    @classmethod
    def _minimum_has_room(cls, value: Training, info: ValidationInfo) -> Training:
        data: Data | None = info.data.get("data")
        if data is None or data.mixture is None or "protections" not in info.data:
            return value
        replayed = sum(p.rows_in(value.global_batch_size) for p in info.data["protections"] if isinstance(p, Replay))
        needed = data.mixture.minimum * len(data.train)
        if needed > value.global_batch_size - replayed:
            beside = f", {replayed} of them replayed" if replayed else ""
            what = (
                f"data.mixture.minimum: {data.mixture.minimum} of each of {len(data.train)} tasks makes {needed} rows"
            )
            what += f", and a global batch has {value.global_batch_size}{beside}"
            instead = f"set global_batch_size: {needed + replayed} or more, or a lower data.mixture.minimum"
            raise fault(what, instead, ("global_batch_size",))
        return value

    @field_validator("export")
    @classmethod
    def _can_be_merged(cls, value: Export, info: ValidationInfo) -> Export:
        tuning = info.data.get("tuning")
        if value.merged and tuning is not None:
            reason = unmergeable(tuning)
            if reason:
                raise fault(f"{tuning.type} cannot be merged: {reason}", "remove merged: true", ("merged",))
        return value


def not_for_vllm(tuning: Tuning | None, *, look: bool) -> str | None:
    """Why vLLM cannot answer for a run's artifact; None when it can. `look` asks whether it is installed here."""
    if tuning is not None and is_adapter(tuning) and not is_served_as_adapter(tuning) and unmergeable(tuning):
        return f"vLLM takes LoRA adapters and whole models, and {tuning.type} cannot be merged"
    if isinstance(tuning, Lora) and tuning.bits:
        return "vLLM would load the base whole, where training has it in 4 bits"
    return "vLLM is not installed here" if look and find_spec("vllm") is None else None


def may_pack(spec: RunSpec) -> bool:
    """Whether examples are packed if the model can keep them apart: `auto` means on GPUs."""
    wanted = spec.scaling.gpus_per_worker > 0 if spec.training.packing == "auto" else spec.training.packing
    return wanted and _unpackable(spec.objective, spec.tuning) is None


def _unpackable(objective: Objective | None, tuning: Tuning | None) -> str | None:
    """Why no model could learn packed examples so."""
    if objective and objective.type == "dpo":
        return "the two answers of a pair are compared, so they have to stand in rows of their own"
    if tuning and tuning.type in (*PROMPT_METHODS, "adaption_prompt"):
        return f"{tuning.type} sets its prompt before every row, where packed examples would share it"
    return None
