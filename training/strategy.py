"""What a strategy is made of: one objective, one tuning, any number of protections; and which go together.

Free of torch: a wrong combination is refused before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from training.data.locations import Location
from training.peft_methods import (
    REFUSED_METHODS,
    UNMERGEABLE,
    Method,
    changes_base,
    is_plain_lora,
    wrong_lora_option,
    wrong_option,
)
from training.section import Count, DataLocation, Flag, Fraction, Positive, Section, Source, Text, fault

# ------------------------------------------------------------------------------------------------ objectives


class Sft(Section):
    """Supervised fine-tuning: cross-entropy on completion tokens alone."""

    type: Literal["sft"] = "sft"


class Lm(Section):
    """Continued pre-training: cross-entropy on every token of plain text, cut into pieces of max_length."""

    type: Literal["lm"] = "lm"


class Dpo(Section):
    """Direct preference optimisation (arXiv 2305.18290) of chosen over rejected answers.

    The reference is the base model: the switched-off adapter, or for weights that move, cached log-probabilities.
    """

    type: Literal["dpo"] = "dpo"
    beta: Positive = 0.1


def known_model(value: str, info: ValidationInfo) -> str:
    """The folder of a model, by the finder in the validation's context (where there is one)."""
    find = (info.context or {}).get("find_model")
    return str(find(value)) if find else value


class Distill(Section):
    """Distillation: `weight` times a divergence from a teacher's next-token distribution, the rest cross-entropy.

    `forward_kl` is KL(teacher||student) (arXiv 1503.02531), `reverse_kl` KL(student||teacher), `jsd` the generalised
    Jensen-Shannon divergence with `beta` (arXiv 2306.13649); each at `temperature`, times its square.
    Without `top_k` the teacher runs beside the student; with it, its top k log-probabilities are cached on disk.
    """

    type: Literal["distill"] = "distill"
    teacher: Text
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Fraction = 0.5
    temperature: Positive = 1.0
    weight: Fraction = 0.5
    top_k: Count | None = None

    @field_validator("teacher")
    @classmethod
    def _teacher_is_known(cls, value: str, info: ValidationInfo) -> str:
        return known_model(value, info)


Objective = Annotated[Sft | Lm | Dpo | Distill, Field(discriminator="type")]
FORMS: dict[str, tuple[str, ...]] = {
    "sft": ("completion", "messages"),
    "distill": ("completion", "messages"),
    "lm": ("text",),
}
FORMS["dpo"] = ("preference",)
REPLAY_FORMS = ("completion", "messages", "text")

# ---------------------------------------------------------------------------------------------------- tuning


class Full(Section):
    """Every parameter moves."""

    type: Literal["full"] = "full"


class Partial(Section):
    """Only the parameters move whose name matches one of the patterns (shell wildcards, as in `model.layers.2?.*`)."""

    type: Literal["partial"] = "partial"
    parameters: Annotated[tuple[Text, ...], Field(min_length=1)]


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685) on the named linear modules.

    `options` are PEFT's further ones (rsLoRA, DoRA, first values, layers). `learning_rate_ratio` is LoRA+'s: B learns
    that many times as fast as A (arXiv 2402.12354). `bits: 4` keeps the base in nf4 while training: QLoRA
    (arXiv 2305.14314).
    """

    type: Literal["lora"] = "lora"
    rank: Count = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | tuple[Text, ...] = "all-linear"
    options: dict[str, JsonValue] = Field(default_factory=dict)
    learning_rate_ratio: Positive = 1.0
    bits: Literal[4] | None = None

    @model_validator(mode="after")
    def _options_are_known(self) -> Lora:
        wrong = wrong_lora_option(self.options) if self.options else None
        if wrong:
            raise fault(*wrong)
        if self.bits and not is_plain_lora(self.options):
            raise fault("bits: 4 goes with plain LoRA alone", f"remove {', '.join(self.options)}, or bits", ("bits",))
        if self.bits and changes_base(self.options):
            what = "the first product cannot be taken out of a base of 4 bits"
            raise fault(what, "remove init_lora_weights, or bits", ("bits",))
        return self


class Peft(Section):
    """Any other method of PEFT, by its name, with its own options."""

    type: Method
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _options_are_known(self) -> Peft:
        wrong = wrong_option(self.type, self.options)
        if wrong:
            raise fault(*wrong)
        return self


def _not_refused(value: Any) -> Any:
    """The tuning as it was given, unless it names a method of PEFT that is left out for a reason."""
    method = value.get("type") if isinstance(value, dict) else None
    if isinstance(method, str) and method in REFUSED_METHODS:
        what = f"PEFT's {method} is not offered: {REFUSED_METHODS[method]}"
        raise fault(what, "use lora, or another method of PEFT", ("type",))
    return value


AnyTuning = Full | Partial | Lora | Peft
Tuning = Annotated[AnyTuning, Field(discriminator="type"), BeforeValidator(_not_refused)]


def is_adapter(tuning: AnyTuning) -> bool:
    """Whether the base stays as it is, and the artifact holds what is added to it."""
    return isinstance(tuning, Lora | Peft)


def unmergeable(tuning: AnyTuning) -> str | None:
    """Why an adapter cannot be folded into the base's weights; None when it can, or is none."""
    return UNMERGEABLE.get(tuning.type)


def is_served_as_adapter(tuning: AnyTuning) -> bool:
    """Whether the endpoint takes the adapter beside its base: vLLM knows plain LoRA alone."""
    return isinstance(tuning, Lora) and is_plain_lora(tuning.options)


def merges_by_itself(tuning: AnyTuning) -> bool:
    """Whether the artifact holds the merged model in any case, since that is what is served."""
    return is_adapter(tuning) and not is_served_as_adapter(tuning) and not unmergeable(tuning)


def tuning_refusal(tuning: AnyTuning, zero_stage: int, gpus_per_worker: int) -> tuple[str, str] | None:
    """Why a tuning does not work at a ZeRO stage or without a GPU, and what to set instead; None when it does."""
    if isinstance(tuning, Lora) and tuning.bits:
        if gpus_per_worker == 0:
            return "a base of 4 bits needs a GPU", "set scaling.gpus_per_worker: 1, or remove tuning.bits"
        if zero_stage == 3:
            return "ZeRO 3 cannot shard a base of 4 bits", "set scaling.zero_stage: 2, or remove tuning.bits"
    return None


def missing_package(tuning: AnyTuning) -> tuple[str, str] | None:
    """A package that a tuning needs and that is not installed here; None when all are."""
    if isinstance(tuning, Lora) and tuning.bits and find_spec("bitsandbytes") is None:
        return "a base of 4 bits needs bitsandbytes, which is not installed", "run: pip install 'tenure[qlora]'"
    return None


# ----------------------------------------------------------------------------------------------- protections


def _artifact(value: Any, info: ValidationInfo) -> Any:
    """The folder of an importance artifact, absolute."""
    context = info.context or {}
    if not isinstance(value, str | Path) or not str(value):
        raise fault("a path is wanted here", "give the folder of an importance artifact")
    path = Path(os.path.abspath(Path(context.get("folder", ".")) / Path(value).expanduser()))
    if context.get("look_at_files", False) and not (path / "importance.json").is_file():
        raise fault(f"{path} holds no importance.json", "make one with: tenure importance compute")
    return path


ImportanceFolder = Annotated[Path, BeforeValidator(_artifact)]
Update = Literal["auto", "coupled", "proximal"]
Normalise = Literal["mean", "max", "none"]


class _Pull(Section):
    """What every pull towards the starting weights has."""

    strength: Positive
    update: Update = "auto"


class _WeighedPull(_Pull):
    """What a pull has that weighs weights by importance: where that comes from, and how it is used."""

    normalise: Normalise = "mean"
    stored: Literal["fp32", "bf16"] = "fp32"
    importance: ImportanceFolder | None = None
    data: tuple[Source, ...] = ()


class L2sp(_Pull):
    """A pull towards the starting weights: strength/2 times the squared distance (arXiv 1802.01483)."""

    type: Literal["l2sp"] = "l2sp"


class Ewc(_WeighedPull):
    """Elastic weight consolidation (arXiv 1612.00796): strength/2 times the Fisher-weighted squared distance.

    The diagonal Fisher information is read from `importance`, or computed once on `data` with the base model:
    `exact` draws labels from the model, `empirical` takes the data's own. With `previous`, that earlier importance
    times `gamma` is added: online EWC over a chain of tasks (arXiv 1805.06370).
    """

    type: Literal["ewc"] = "ewc"
    estimator: Literal["exact", "empirical"] = "exact"
    examples: Count = 256
    previous: ImportanceFolder | None = None
    gamma: Fraction = 1.0

    @model_validator(mode="after")
    def _one_origin(self) -> Ewc:
        if bool(self.importance) == bool(self.data):
            raise fault(
                "ewc needs the importance of the weights", "set importance to a folder, or data to compute it on"
            )
        if self.previous and not self.data:
            raise fault(
                "previous is added to what data give", "set data, or give the chain as importance", ("previous",)
            )
        return self


class Si(_WeighedPull):
    """Synaptic intelligence (arXiv 1703.04200): strength times the path-weighted squared distance.

    The importance comes from an earlier task's run (`importance`), or from a consolidation pass: training on `data`
    from the base for `steps` steps at `learning_rate`, whose path is kept and whose weights are thrown away. With
    neither there is nothing to protect, and `record: true` says that only this run's own path is wanted.
    A run that moves whole weights leaves its own importance, earlier ones added, in its artifact, unless `record` is
    false, which saves 8 bytes a weight on a GPU, 16 on a CPU.
    """

    type: Literal["si"] = "si"
    steps: Count = 50
    learning_rate: Positive = 1e-5
    xi: Positive = 1e-3
    record: Flag | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _has_a_path(self) -> Si:
        if self.importance and self.data:
            raise fault("si takes its importance from one place", "remove importance or data", ("data",))
        if not (self.importance or self.data or self.record is True):
            what = "si has no earlier path to protect"
            instead = (
                "set importance to an earlier run's, data for a consolidation pass, or record: true for a first task"
            )
            raise fault(what, instead)
        return self


class Prompts(Section):
    """Prompts of a JSONL file for the base to answer; `prompt`, `system` and `chat` as in a source of rows."""

    path: DataLocation
    prompt: Text
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"


class Generate(Section):
    """Replay rows written by the base model: prompts of its own, or those of a file, and its sampled answers.

    Without `prompts` a chat model writes its own from its template's open user turn (Magpie, arXiv 2406.08464), and
    any other model writes plain text after its start token. Sampled at `temperature` from the whole distribution.
    """

    examples: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 256
    max_new_tokens: Annotated[int, Field(strict=True, ge=1, le=4096)] = 128
    temperature: Positive = 1.0
    prompts: Prompts | None = None


class Replay(Section):
    """A share of every global batch is drawn from retention data, given or generated once by the base model."""

    type: Literal["replay"] = "replay"
    share: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.25
    data: tuple[Source, ...] = ()
    generate: Generate | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Replay:
        if bool(self.data) == bool(self.generate):
            raise fault(
                "replay needs rows to replay", "set data to sources, or generate: {} to have the base write them"
            )
        return self

    def rows_in(self, global_batch_size: int) -> int:
        """Replay rows in every global batch: the share asked for, rounded, but at least one and never all."""
        return min(max(1, round(self.share * global_batch_size)), global_batch_size - 1)

    @property
    def files(self) -> tuple[Location, ...]:
        """Where the data lie that it reads."""
        prompts = self.generate.prompts if self.generate else None
        return (*(source.path for source in self.data), *((prompts.path,) if prompts else ()))


class Kl(Section):
    """Learning without forgetting (arXiv 1606.09282): KL(base||tuned) on the training rows' targets.

    Times `strength`, at `temperature`, times its square. An adapter is switched off to give the base; for weights that
    move, the base's `top_k` log-probabilities are computed once and cached.
    """

    type: Literal["kl"] = "kl"
    strength: Positive = 1.0
    temperature: Positive = 1.0
    top_k: Count = 64


class Wise(Section):
    """Interpolation after training (arXiv 2109.01903): the artifact is (1 - alpha) x base + alpha x tuned."""

    type: Literal["wise"] = "wise"
    alpha: Fraction


class Flow(Section):
    """Sample weights exp(-loss/temperature) from the base's mean loss per sample; by default their median."""

    type: Literal["flow"] = "flow"
    temperature: Positive | Literal["median"] = "median"


class Stm(Section):
    """Target tokens whose perplexity under the base exceeds `threshold` carry no loss (arXiv 2501.14315)."""

    type: Literal["stm"] = "stm"
    threshold: Positive = 2.5


Protection = Annotated[L2sp | Ewc | Si | Replay | Kl | Wise | Flow | Stm, Field(discriminator="type")]


def updates_coupled(protection: L2sp | Ewc | Si, tuning: Any) -> bool:
    """Whether its pull is added to the gradient: as asked, and by default for LoRA, whose product has no other way."""
    return protection.update == "coupled" or (protection.update == "auto" and isinstance(tuning, Lora))


def records_path(protection: Si, tuning: Any) -> bool:
    """Whether a run leaves its own importance: whole weights must move, since only they have gradients of their own."""
    return isinstance(tuning, Full | Partial) and protection.record is not False


# ----------------------------------------------------------------------------------------------- combination

Refusal = tuple[str, str, tuple[str | int, ...]]


def refusals(
    objective: Sft | Lm | Dpo | Distill,
    tuning: AnyTuning,
    protections: tuple[L2sp | Ewc | Si | Replay | Kl | Wise | Flow | Stm, ...],
) -> list[Refusal]:
    """Why parts do not go together: what, what instead, and the key below protections; none when they do."""
    found: list[Refusal] = []
    kinds = [protection.type for protection in protections]
    for index, kind in enumerate(kinds):
        if kind in kinds[:index]:
            found.append((f"{kind} is listed twice", "list each protection once", (index,)))
    for index, protection in enumerate(protections):
        reason = _refuse(objective, tuning, protection)
        if reason:
            found.append((*reason, (index,)))
    return found


def moves_base(tuning: Any) -> bool:
    """Whether the base's own weights are changed, so that no adapter can be switched off to give it back."""
    return isinstance(tuning, Full | Partial) or (isinstance(tuning, Lora) and changes_base(tuning.options))


def acts_on_weights(tuning: AnyTuning, protections: Sequence[Any]) -> bool:
    """Whether a protection pulls whole weights, or records their path, in the optimizer's step."""
    return not isinstance(tuning, Lora) and any(isinstance(one, L2sp | Ewc | Si) for one in protections)


_NOT_WITH_DPO = {
    "kl": "dpo is itself held to the base, by its beta",
    "flow": "flow weighs a row by its loss, and dpo learns from the difference of two",
    "stm": "stm masks tokens, and dpo compares whole answers",
    "replay": "replayed rows hold no pairs",
}


def _refuse(objective: Any, tuning: Any, protection: Any) -> tuple[str, str] | None:
    if isinstance(objective, Dpo) and protection.type in _NOT_WITH_DPO:
        return _NOT_WITH_DPO[protection.type], f"remove {protection.type}, or use objective: {{type: sft}}"
    if isinstance(protection, L2sp | Ewc | Si):
        return _refuse_pull(tuning, protection)
    if isinstance(protection, Replay):
        return _refuse_replay(protection)
    if isinstance(protection, Wise) and not isinstance(tuning, Full | Partial | Lora):
        what = f"wise interpolates weights, or scales LoRA's product; {tuning.type} is not linear in its parameters"
        return what, "use tuning: {type: full}, partial or lora"
    if isinstance(protection, Wise) and isinstance(tuning, Lora) and _BESIDE_PRODUCT & set(tuning.options):
        beside = sorted(_BESIDE_PRODUCT & set(tuning.options))
        what = f"wise scales the product of LoRA's matrices, and {', '.join(beside)} changes more than that"
        return what, f"remove tuning.options.{beside[0]}"
    return None


def _refuse_replay(replay: Replay) -> tuple[str, str] | None:
    for source in replay.data:
        if source.form not in (*REPLAY_FORMS, "unknown"):
            return f"rows of the form {source.form} cannot be replayed", f"give {', '.join(REPLAY_FORMS)}"
    return None


_BESIDE_PRODUCT = {"modules_to_save", "trainable_token_indices", "use_dora"}


def _refuse_pull(tuning: Any, protection: L2sp | Ewc | Si) -> tuple[str, str] | None:
    if isinstance(tuning, Full | Partial):
        return None
    kind = protection.type
    if not isinstance(tuning, Lora):
        what = f"{kind} pulls weights towards the base's, and {tuning.type} does not say what it adds to them"
        return what, "use tuning full, partial or lora, or protections replay or kl"
    beside = _BESIDE_PRODUCT & set(tuning.options)
    if beside:
        what = f"{kind} acts on the product of LoRA's matrices, and {', '.join(sorted(beside))} changes more than that"
        return what, f"remove tuning.options.{min(beside)}"
    if protection.update == "proximal":
        return f"{kind} on the product of LoRA's matrices has no proximal step", "set update: coupled"
    if isinstance(protection, Si) and protection.record is True:
        what = "si records the path of whole weights, and LoRA's run has no gradient of them"
        return what, "remove record, or use tuning: {type: full}"
    return None
