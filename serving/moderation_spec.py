"""Filters before and after generation, as the serving spec names them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from training.section import Count, Flag, Section, Text, fault

Where = Literal["input", "output", "both"]
Action = Literal["block", "mask"]


def _compiles(value: Any) -> Any:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise fault(f"{value!r} is no regular expression: {error}", "give one that Python's re takes") from None
    return value


Pattern = Annotated[str, BeforeValidator(_compiles)]


class Words(Section):
    """Words and phrases that may not occur, whole and in any case."""

    type: Literal["words"]
    words: Annotated[tuple[Text, ...], Field(min_length=1)]
    where: Where = "both"
    action: Action = "block"


class Patterns(Section):
    """Regular expressions that may not match. In a stream a match longer than `window` characters may get through."""

    type: Literal["patterns"]
    patterns: Annotated[tuple[Pattern, ...], Field(min_length=1)]
    where: Where = "both"
    action: Action = "block"
    window: Count = 256


class Private(Section):
    """Secrets and personal data: keys, tokens, passwords, card numbers, IBANs, e-mail addresses, phone numbers."""

    type: Literal["private"]
    kinds: tuple[Text, ...] | None = None
    where: Where = "both"
    action: Action = "mask"

    @model_validator(mode="after")
    def _known(self) -> Private:
        from training.inspection.private import PATTERNS

        known = sorted({pattern.kind for pattern in PATTERNS})
        for kind in self.kinds or ():
            if kind not in known:
                raise fault(f"{kind!r} is no kind of private data", f"known: {', '.join(known)}", ("kinds",))
        return self


class Length(Section):
    """The most characters of all messages or the prompt together, or of one answer."""

    type: Literal["length"]
    max_characters: Count
    where: Where = "input"


class ModelJudge(Section):
    """A served model that is asked whether a request may pass.

    `prompt` holds `{text}`; an answer that begins with one of `blocks`, in any case, blocks. Where the judge cannot be
    asked the request is refused, unless `fail_open`.
    """

    type: Literal["model"]
    model: Text
    prompt: Text
    blocks: Annotated[tuple[Text, ...], Field(min_length=1)] = ("unsafe", "yes")
    fail_open: Flag = False

    @model_validator(mode="after")
    def _has_text(self) -> ModelJudge:
        if "{text}" not in self.prompt:
            raise fault("the prompt does not hold {text}", "say where the text stands: ... {text} ...", ("prompt",))
        return self


Filter = Annotated[Words | Patterns | Private | Length | ModelJudge, Field(discriminator="type")]
