"""The ground that every section of a spec stands on: closed, frozen, free of torch, ray and transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
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


Learn = Literal["all", "last", "each"]


class Source(Section):
    """Training rows of a JSONL file, in one of four forms.

    A prompt and a completion; chat messages; a prompt with a chosen and a rejected answer; or plain text.
    `prompt`, `completion`, `chosen`, `rejected` and `text` name a column, or are a Jinja template over columns when
    they hold `{{`; `system` is text, or such a template.
    `chat` says whether prompts are rendered by the model's chat template (auto: when it has one).
    `learn` says which of the assistant's turns are learned: all, the last, or each as a row of its own.
    """

    path: DataFile
    prompt: Text | None = None
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    messages: Text | None = None
    text: Text | None = None
    system: Text | None = None
    chat: Flag | Literal["auto"] = "auto"
    learn: Learn = "all"

    @property
    def form(self) -> Form:
        """Which of the four forms the rows have."""
        if self.messages is not None:
            return "messages"
        if self.text is not None:
            return "text"
        return "preference" if self.chosen is not None else "completion"

    @model_validator(mode="after")
    def _one_form(self) -> Source:
        columns = ("prompt", "completion", "chosen", "rejected", "messages", "text")
        given = {name for name in columns if getattr(self, name) is not None}
        for alone in ("messages", "text"):
            if alone in given and (len(given) > 1 or self.system is not None):
                raise fault(f"{alone} stand beside other columns", f"give {alone} alone", (alone,))
        if given not in ({"messages"}, {"text"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"}):
            instead = "set prompt and completion (or messages, or text, or prompt, chosen and rejected) to columns"
            raise fault("rows need a prompt and a completion", instead)
        if self.messages is not None and self.chat is False:
            raise fault("messages need the chat template", "remove chat: false", ("chat",))
        if self.text is not None and self.chat is True:
            raise fault("plain text has no chat turns", "remove chat: true", ("chat",))
        return self


Form = Literal["completion", "messages", "preference", "text"]
