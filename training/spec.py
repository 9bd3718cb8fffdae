"""The spec of a run: frozen, closed, and free of torch, ray and transformers.

Paths in a spec file are relative to that file. Every class is one section of the YAML.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, Field(strict=True, pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


def fault(what: str, instead: str, at: tuple[str | int, ...] = ()) -> PydanticCustomError:
    """An error for a validator to raise; `at` is the key below the section that it is about."""
    return PydanticCustomError("tenure", "{what}", {"what": what, "instead": instead, "at": at})


def _existing_file(value: Any, info: ValidationInfo) -> Any:
    """The path, absolute; refused when the file is missing or empty (unless files are not to be looked at)."""
    context = info.context or {}
    if not isinstance(value, str | Path) or not str(value):
        raise fault("a path is wanted here", "give the path of a JSONL file")
    path = Path(value).expanduser()
    path = Path(os.path.abspath(Path(context.get("folder", ".")) / path))
    if context.get("look_at_files", False):
        if not path.is_file():
            raise fault(f"there is no file {path}", "a relative path starts at the spec's own folder")
        if path.stat().st_size == 0:
            raise fault(f"the file {path} is empty", "write one JSON object per line")
    return path


DataFile = Annotated[Path, BeforeValidator(_existing_file)]


class Section(BaseModel):
    """A closed, frozen part of the spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sft(Section):
    """Supervised fine-tuning: cross-entropy on completion tokens alone."""

    type: Literal["sft"] = "sft"


class Full(Section):
    """Every parameter moves."""

    type: Literal["full"] = "full"


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) on the named linear modules."""

    type: Literal["lora"] = "lora"
    rank: Count = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | tuple[Text, ...] = "all-linear"


class L2sp(Section):
    """A pull towards the starting weights: strength/2 times the squared distance (arXiv 1802.01483)."""

    type: Literal["l2sp"] = "l2sp"
    strength: Positive


Objective = Sft
Tuning = Annotated[Full | Lora, Field(discriminator="type")]
Protection = L2sp


class Source(Section):
    """Training rows: a JSONL file with either a prompt and a completion, or chat messages.

    `prompt` and `completion` name a column, or are a Jinja template over columns when they hold `{{`; `system` is
    text, or such a template.
    `chat` says whether prompts are rendered by the model's chat template (auto: when it has one).
    """

    path: DataFile
    prompt: Text | None = None
    completion: Text | None = None
    messages: Text | None = None
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _one_form(self) -> Source:
        pair = self.prompt is not None and self.completion is not None
        if self.messages is not None and (self.prompt or self.completion or self.system):
            raise fault("messages stand beside prompt, completion or system", "give messages alone", ("messages",))
        if self.messages is None and not pair:
            raise fault("rows need a prompt and a completion", "set prompt and completion, or messages, to columns")
        if self.messages is not None and self.chat is False:
            raise fault("messages need the chat template", "remove chat: false", ("chat",))
        return self


class Data(Section):
    """What is trained on."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    overlong: Literal["refuse", "drop", "truncate"] = "refuse"


class _Suite(Section):
    """What every suite has: a file of items, and thresholds of its own in place of the contract's."""

    name: Name
    path: DataFile
    limit: Count | None = None
    min_gain: NonNegative | None = None
    max_loss: NonNegative | None = None


class ExactMatch(_Suite):
    """Share of items whose greedy answer, stripped, equals the completion."""

    metric: Literal["exact_match"]
    prompt: Text
    completion: Text
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"
    max_new_tokens: Count = 64
    ignore_case: Flag = False


class Accuracy(_Suite):
    """Share of items whose right choice has the highest log-likelihood after the prompt (cloze form).

    `choices` names a column that holds a list, or is the list itself; `answer` names the column with the right
    choice, as its text or its index from 0.
    """

    metric: Literal["accuracy"]
    prompt: Text
    choices: Text | Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Text
    chat: Flag | Literal["auto"] = False


class CrossEntropy(_Suite):
    """Nats per UTF-8 byte on plain text, or on a completion after its prompt. Lower is better."""

    metric: Literal["cross_entropy"]
    text: Text | None = None
    prompt: Text | None = None
    completion: Text | None = None
    chat: Flag | Literal["auto"] = False

    @model_validator(mode="after")
    def _one_form(self) -> CrossEntropy:
        pair = self.prompt is not None and self.completion is not None
        if (self.text is not None) == pair or (self.text is not None and (self.prompt or self.completion)):
            raise fault("cross-entropy needs text, or a prompt and a completion", "set one of the two forms")
        if self.text is not None and self.chat is True:
            raise fault("plain text has no chat turns", "remove chat: true", ("chat",))
        return self


Suite = Annotated[ExactMatch | Accuracy | CrossEntropy, Field(discriminator="metric")]


class Suites(Section):
    """What is scored: target suites measure gain, retention suites measure forgetting."""

    target: Annotated[tuple[Suite, ...], Field(min_length=1)]
    retention: tuple[Suite, ...] = ()

    @model_validator(mode="after")
    def _names_and_thresholds(self) -> Suites:
        names: set[str] = set()
        for role in ("target", "retention"):
            wrong = "max_loss" if role == "target" else "min_gain"
            for index, suite in enumerate(getattr(self, role)):
                if suite.name in names:
                    raise fault(f"two suites are called '{suite.name}'", "give each its own name", (role, index))
                names.add(suite.name)
                if getattr(suite, wrong) is not None:
                    right = "min_gain" if role == "target" else "max_loss"
                    raise fault(f"{wrong} means nothing for a {role} suite", f"use {right}", (role, index, wrong))
        return self

    @property
    def all(self) -> tuple[ExactMatch | Accuracy | CrossEntropy, ...]:
        return (*self.target, *self.retention)


class Contract(Section):
    """The promise: every target suite gains at least min_gain, no retention suite loses more than max_loss.

    In the unit of each suite's metric: a share for exact match and accuracy, nats per byte for cross-entropy.
    """

    min_gain: NonNegative = 0.0
    max_loss: NonNegative = 0.02


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
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: Natural = 0
    validation_items: Natural = 64
    validate_every_steps: Natural | Literal["auto"] = "auto"
    checkpoint_every_steps: Natural | Literal["auto"] = "auto"
    keep_checkpoints: Count = 2


class Scaling(Section):
    """Where it runs: workers of Ray Train, what each holds, and how far DeepSpeed shards."""

    workers: Count = 1
    cpus_per_worker: Count = 1
    gpus_per_worker: Annotated[int, Field(strict=True, ge=0, le=1)] = 0
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)] | Literal["auto"] = "auto"
    max_failures: Natural = 0


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
    scaling: Scaling = Scaling()
    training: Training
    export: Export = Export()

    # Checks between sections stand on the later of the two, so that they are made whatever is wrong elsewhere.

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, value: str, info: ValidationInfo) -> str:
        find = (info.context or {}).get("find_model")
        return str(find(value)) if find else value

    @field_validator("protections")
    @classmethod
    def _combination_is_valid(cls, value: tuple[Protection, ...], info: ValidationInfo) -> tuple[Protection, ...]:
        reason = refusal(info.data["tuning"], value) if "tuning" in info.data else None
        if reason:
            raise fault(*reason)
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


def refusal(tuning: Full | Lora, protections: tuple[L2sp, ...]) -> tuple[str, str] | None:
    """Why a tuning and protections do not go together, and what to set instead; None when they do."""
    kinds = [protection.type for protection in protections]
    if len(set(kinds)) < len(kinds):
        return "a protection is listed twice", "list each protection once"
    if "l2sp" in kinds and isinstance(tuning, Lora):
        return "l2sp pulls full weights towards the base, and LoRA leaves those untouched", "use tuning: {type: full}"
    return None
