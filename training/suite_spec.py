"""The suites of a spec: what is scored, from which rows, by which metric. Free of torch, ray and transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from training.errors import TenureError
from training.section import Count, DataLocation, Flag, Name, Natural, NonNegative, Section, Text, fault


class _Promised(Section):
    """What every suite has: a name, and thresholds of its own in place of the contract's.

    `inherited_from` names the run whose target it was, where lineage brought it in; it is set by Tenure.
    """

    name: Name
    limit: Count | None = None
    min_gain: NonNegative | None = None
    max_loss: NonNegative | None = None
    inherited_from: Name | None = None


class _Suite(_Promised):
    """A suite whose items are the rows of a file."""

    path: DataLocation


def _may_look(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get("look_at_files"))


def _recognised(suite: Any, known: tuple[str, ...]) -> dict[str, str]:
    """The columns of a suite's file, as of a source of training rows; what the suite names itself stands."""
    from training.data.shapes import reason_of, recognise

    try:
        found = recognise(suite.path)
    except TenureError as error:
        raise fault(*reason_of(error)) from None
    unfit = [key for key in found if key not in known]
    if unfit:
        what = f"no column is named, and the rows' {', '.join(unfit)} make no item of the metric {suite.metric}"
        raise fault(what, f"name the columns of {' and '.join(known[:2])}")
    return {key: column for key, column in found.items() if getattr(suite, key) is None}


class _Answering(_Suite):
    """Items that the model answers, greedily, in its own words: a prompt, or chat turns up to the last answer.

    `completion` (or the last of the turns) is the right answer; metrics that need none take it or leave it.
    """

    needs_completion: ClassVar[bool] = True

    prompt: Text | None = None
    completion: Text | None = None
    messages: Text | None = None
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"
    max_new_tokens: Count = 64

    @model_validator(mode="after")
    def _one_form(self, info: ValidationInfo) -> _Answering:
        """The suite with its columns, which are recognised where none is named and files may be looked at."""
        if self.prompt is None and self.completion is None and self.messages is None and _may_look(info):
            return self.model_copy(update=_recognised(self, ("prompt", "completion", "messages", "system")))._checked()
        return self._checked()

    def _checked(self) -> _Answering:
        """Turns alone, or a prompt with the completion that the metric needs."""
        if self.messages is None:
            for key in ("prompt", "completion") if self.needs_completion else ("prompt",):
                if getattr(self, key) is None:
                    raise fault("this key is missing", "add it", (key,))
            return self
        beside = [key for key in ("prompt", "completion", "system") if getattr(self, key) is not None]
        if beside:
            raise fault(f"messages stand beside {' and '.join(beside)}", "give messages alone", ("messages",))
        if self.chat is False:
            raise fault("messages need the chat template", "remove chat: false", ("chat",))
        return self


class ExactMatch(_Answering):
    """Share of items whose greedy answer, stripped, equals the completion."""

    metric: Literal["exact_match"]
    ignore_case: Flag = False


class GreedyMatch(_Answering):
    """Share of items whose completion, to its end and token for token, greedy decoding would answer.

    What `exact_match` tells of most tasks, from one forward pass instead of one a token.
    """

    metric: Literal["greedy_match"]


class TokenF1(_Answering):
    """Mean F1 of the answer's and the completion's words, normalised as in SQuAD (arXiv 1606.05250)."""

    metric: Literal["token_f1"]


class Rouge(_Answering):
    """Mean F-measure of ROUGE (Lin 2004) by the package rouge_score, stemmed."""

    metric: Literal["rouge"]
    variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"


class Bleu(_Answering):
    """Mean sentence BLEU (Papineni 2002) by sacrebleu, from 0 to 1."""

    metric: Literal["bleu"]


class Chrf(_Answering):
    """Mean sentence chrF (Popovic 2015) by sacrebleu, from 0 to 1."""

    metric: Literal["chrf"]


class Classification(_Answering):
    """Share of items whose answer names the right label: the first of `labels` in it, whole words, any case."""

    metric: Literal["classification"]
    labels: Annotated[tuple[Text, ...], Field(min_length=2)]

    @field_validator("labels")
    @classmethod
    def _apart(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len({label.casefold() for label in value}) < len(value):
            raise fault("two labels are alike but for case", "give each label once")
        return value


class Regex(_Answering):
    """Share of answers that the pattern is found in; with a completion, whose first group (or match) equals it."""

    needs_completion: ClassVar[bool] = False

    metric: Literal["regex"]
    pattern: Text

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise fault(f"{value!r} is no regular expression: {error}", "write it in Python's syntax") from None
        return value


class ValidJson(_Answering):
    """Share of answers that are JSON (a fence around it is taken off), and fit a JSON Schema where one is given."""

    needs_completion: ClassVar[bool] = False

    metric: Literal["json"]
    json_schema: DataLocation | None = None

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: Path | str | None, info: ValidationInfo) -> Path | str | None:
        if isinstance(value, str):
            raise fault(f"{value} is no file of this machine", "give the path of a JSON Schema")
        if value is not None and (info.context or {}).get("look_at_files"):
            _check_schema(value)
        return value


def _check_schema(path: Path) -> None:
    import json

    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        validator_for(schema).check_schema(schema)
    except (ValueError, SchemaError) as error:
        reason = str(error).splitlines()[0]
        raise fault(f"{path} is no JSON Schema: {reason}", "see json-schema.org") from None


class ValidTable(_Answering):
    """Share of answers that are a whole table: a heading, two columns or more, and rows of as many cells."""

    needs_completion: ClassVar[bool] = False

    metric: Literal["table"]
    format: Literal["markdown", "csv"] = "markdown"


class Product(_Answering):
    """Share of answers that are a Markdown table with the right product in every row: `product` is that of `factors`.

    They name columns, in any case; factors are whole numbers from `least` to `greatest` (of a DFMEA severity,
    occurrence and detection, 1 to 10, and their product, the risk priority number; IEC 60812).
    """

    needs_completion: ClassVar[bool] = False

    metric: Literal["product"]
    factors: Annotated[tuple[Text, ...], Field(min_length=2)]
    product: Text
    least: int = 1
    greatest: int = 10

    @model_validator(mode="after")
    def _apart(self) -> Product:
        columns = [name.casefold() for name in (*self.factors, self.product)]
        if len(set(columns)) < len(columns):
            raise fault("two of the columns are alike but for case", "name each column once", ("factors",))
        if self.least > self.greatest:
            raise fault(f"least {self.least} exceeds greatest {self.greatest}", "set least below greatest", ("least",))
        return self


class Length(_Answering):
    """Mean likeness of the answer's length in words to the completion's, or to the base's own answer's: min / max."""

    needs_completion: ClassVar[bool] = False

    metric: Literal["length"]


class Agreement(_Answering):
    """Share of answers that are the base's own, but for case and white space."""

    needs_completion: ClassVar[bool] = False

    metric: Literal["agreement"]


class Accuracy(_Suite):
    """Share of items whose right choice has the highest log-likelihood after the prompt (cloze form).

    `choices` names a column that holds a list, or is the list itself; `answer` names the column with the right
    choice, as its text or its index from 0. `normalise: bytes` divides each log-likelihood by the choice's bytes.
    """

    metric: Literal["accuracy"]
    prompt: Text
    choices: Text | Annotated[tuple[Text, ...], Field(min_length=2)]
    answer: Text
    chat: Flag | Literal["auto"] = False
    normalise: Literal["none", "bytes"] = "none"


class _Likelihood(_Suite):
    """Items whose text, or completion after its prompt, is scored by how likely the model finds it."""

    text: Text | None = None
    prompt: Text | None = None
    completion: Text | None = None
    messages: Text | None = None
    chat: Flag | Literal["auto"] = False

    @model_validator(mode="after")
    def _one_form(self, info: ValidationInfo) -> _Likelihood:
        """The suite with its columns, which are recognised where none is named and files may be looked at."""
        named = (self.text, self.prompt, self.completion, self.messages)
        if not any(named) and _may_look(info):
            return self.model_copy(update=_recognised(self, ("text", "prompt", "completion", "messages")))._checked()
        return self._checked()

    def _checked(self) -> _Likelihood:
        pair = self.prompt is not None and self.completion is not None
        halves = self.text is not None and bool(self.prompt or self.completion)
        if [self.text is not None, pair, self.messages is not None].count(True) != 1 or halves:
            what = "it needs text, or a prompt and a completion"
            raise fault(what, "set one of the two forms, or messages")
        if self.text is not None and self.chat is True:
            raise fault("plain text has no chat turns", "remove chat: true", ("chat",))
        return self


class CrossEntropy(_Likelihood):
    """Nats per UTF-8 byte on plain text, or on a completion after its prompt. Lower is better."""

    metric: Literal["cross_entropy"]


class Perplexity(_Likelihood):
    """Perplexity per token on plain text, or on a completion after its prompt, as its logarithm: nats per token.

    Lower is better. It depends on the tokenizer, so it compares a model with its base but not models of two families.
    """

    metric: Literal["perplexity"]


class Harness(_Promised):
    """A task of lm-evaluation-harness: one of its names, or the path of a task's YAML file.

    Scored as the harness itself would. `score` is one of the task's own metrics, its first one unless told.
    """

    metric: Literal["harness"] = "harness"
    harness: Text
    score: Text | None = None
    few_shot: Natural | None = None
    chat: Flag = False

    @field_validator("harness")
    @classmethod
    def _file_is_absolute(cls, value: str, info: ValidationInfo) -> str:
        """A task's file as an absolute path; a name as it is."""
        if not value.endswith((".yaml", ".yml")):
            return value
        context = info.context or {}
        path = (Path(context.get("folder", ".")) / Path(value).expanduser()).absolute()
        if context.get("look_at_files") and not path.is_file():
            raise fault(f"there is no file {path}", "a relative path starts at the spec's own folder")
        return str(path)


def _named_by_harness(value: Any) -> Any:
    """A section with the key `harness` needs no metric: the task has its own."""
    return {"metric": "harness", **value} if isinstance(value, dict) and "harness" in value else value


Answering = (
    ExactMatch
    | TokenF1
    | Rouge
    | Bleu
    | Chrf
    | Classification
    | Regex
    | ValidJson
    | ValidTable
    | Product
    | Length
    | Agreement
)
FileSuite = Answering | GreedyMatch | Accuracy | CrossEntropy | Perplexity
AnySuite = FileSuite | Harness
Suite = Annotated[AnySuite, Field(discriminator="metric"), BeforeValidator(_named_by_harness)]


class Suites(Section):
    """What is scored: target suites measure gain, retention suites measure forgetting.

    `inherit` adds the targets of the runs that the base model came from to the retention suites, `presets` ready-made
    ones: `knowledge` measures forgetting without data of the user's own.
    """

    target: Annotated[tuple[Suite, ...], Field(min_length=1)]
    retention: tuple[Suite, ...] = ()
    inherit: Flag = True
    presets: tuple[Literal["knowledge"], ...] = ()

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

    @model_validator(mode="after")
    def _targets_can_gain(self) -> Suites:
        for index, suite in enumerate(self.target):
            if isinstance(suite, Agreement) or (isinstance(suite, Length) and not has_answer(suite)):
                what = f"{suite.metric} compares with the base's own answers, so there is nothing to gain"
                raise fault(what, "list it under retention, or give a completion", ("target", index, "metric"))
        return self

    @property
    def every(self) -> tuple[AnySuite, ...]:
        """Targets, then retention."""
        return (*self.target, *self.retention)

    @property
    def all(self) -> tuple[FileSuite, ...]:
        """Those whose items are the rows of a file, so all but the tasks of lm-evaluation-harness."""
        return tuple(suite for suite in self.every if not isinstance(suite, Harness))


def has_answer(suite: FileSuite) -> bool:
    """Whether the items say what the right answer is, so that a loss on it can be told."""
    if isinstance(suite, Accuracy | CrossEntropy | Perplexity):
        return True
    return suite.completion is not None or suite.messages is not None
