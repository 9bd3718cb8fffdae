"""The ground that every section of a spec stands on: closed, frozen, free of torch, ray and transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from training.data.instructions import LIBRARY, Kind
from training.data.locations import files_of, is_url, missing_store
from training.errors import TenureError

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


def _existing_data(value: Any, info: ValidationInfo) -> Any:
    """A path, absolute, or a URL as it is; refused when there is nothing (unless files are not to be looked at)."""
    context = info.context or {}
    if not isinstance(value, str | Path) or not str(value):
        raise fault("a path is wanted here", "give a file, a glob, a folder, or a URL such as s3://bucket/rows.jsonl")
    looked_at = context.get("look_at_files", False)
    if isinstance(value, str) and is_url(value):
        missing = missing_store(value) if looked_at else None
        if missing:
            raise fault(*missing)
        return value
    path = Path(os.path.abspath(Path(context.get("folder", ".")) / Path(value).expanduser()))
    if looked_at:
        _look_at(path)
    return path


def _look_at(path: Path) -> None:
    try:
        files = files_of(path)
    except TenureError as error:
        raise fault(error.problems[0].what, error.problems[0].instead) from None
    if all(os.path.getsize(file.path) == 0 for file in files):
        raise fault(f"the file {path} is empty", "write one JSON object per line")


DataLocation = Annotated[Path | str, BeforeValidator(_existing_data)]


class Section(BaseModel):
    """A closed, frozen part of the spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Learn = Literal["all", "last", "each"]


def _known_kind(value: Any) -> Any:
    if value not in LIBRARY:
        raise fault(f"{value!r} is no kind of template", f"known: {', '.join(LIBRARY)}; tenure templates shows them")
    return value


class Library(Section):
    """The templates of a kind of task, and what they name beside `prompt`: text, or a template over columns."""

    library: Annotated[Kind, BeforeValidator(_known_kind)]
    values: dict[str, Text] = Field(default_factory=dict)


class Source(Section):
    """Training rows of a file, a glob, a folder, a dataset of the hub or a URL, in one of four forms.

    A prompt and a completion; chat messages; a prompt with a chosen and a rejected answer; or plain text. Where no
    column is named the form is recognised by those that there are.
    `prompt`, `completion`, `chosen`, `rejected` and `text` name a column, or are a Jinja template over columns when
    they hold `{{`; `system` is text, or such a template.
    `chat` says whether prompts are rendered by the model's chat template (auto: when it has one).
    `templates` are Jinja templates of prompts, one drawn for every row; in them `prompt` is the source's own.
    `faulty` says whether rows that cannot be used are refused, or dropped and counted.
    `learn` says which of the assistant's turns are learned: all, the last, or each as a row of its own.
    `tools` is the column of functions that may be called, where rows of messages have it.
    """

    path: DataLocation
    prompt: Text | None = None
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    messages: Text | None = None
    text: Text | None = None
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"
    learn: Learn = "all"
    templates: Library | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    faulty: Literal["refuse", "drop"] = "refuse"
    tools: Text = "tools"

    @property
    def form(self) -> Form:
        """Which of the four forms the rows have; unknown until they are looked at, where no column is named."""
        if not self._given:
            return "unknown"
        if self.messages is not None:
            return "messages"
        if self.text is not None:
            return "text"
        return "preference" if self.chosen is not None else "completion"

    @property
    def _given(self) -> set[str]:
        columns = ("prompt", "completion", "chosen", "rejected", "messages", "text")
        return {name for name in columns if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _one_form(self, info: ValidationInfo) -> Source:
        """The source with its columns, which are recognised where none is named and files may be looked at."""
        if not self._given:
            return self._recognised()._checked() if (info.context or {}).get("look_at_files") else self
        return self._checked()

    def _checked(self) -> Source:
        given = self._given
        for alone in ("messages", "text"):
            if alone in given and (len(given) > 1 or self.system is not None):
                raise fault(f"{alone} stand beside other columns", f"give {alone} alone", (alone,))
        if isinstance(self.templates, tuple) and given & {"completion", "chosen"}:
            given = given | {"prompt"}
        pair = {"chosen", "rejected"}
        if given not in ({"messages"}, {"text"}, {"prompt", "completion"}, pair, pair | {"prompt"}):
            instead = "set prompt and completion (or messages, or text, or prompt, chosen and rejected) to columns"
            raise fault("rows need a prompt and a completion", instead)
        if self.messages is not None and self.chat is False:
            raise fault("messages need the chat template", "remove chat: false", ("chat",))
        if self.text is not None and self.chat is True:
            raise fault("plain text has no chat turns", "remove chat: true", ("chat",))
        if self.templates is not None and self.form not in ("completion", "preference"):
            raise fault(f"rows of the form {self.form} have no prompt to fill", "remove templates", ("templates",))
        return self

    def _recognised(self) -> Source:
        from training.data.shapes import reason_of, recognised

        try:
            source: Source = recognised(self)
        except TenureError as error:
            raise fault(*reason_of(error)) from None
        return source


Form = Literal["completion", "messages", "preference", "text", "unknown"]
