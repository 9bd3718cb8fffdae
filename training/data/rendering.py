"""Renders chat turns by the model's own template: one conversation, or many of them with one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from training.data.timelimit import time_limit
from training.errors import fail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]
RENDER_LIMIT_S = 20
# So few that a row which the template refuses costs no more than their rendering one by one.
RENDERED_AT_ONCE = 64


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Turn], where: str, tools: Sequence[Turn] = ()
) -> str:
    """The chat template's text up to and including the header of the assistant's next turn."""
    return render(tokenizer, messages, tools, where, add_generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Turn],
    tools: Sequence[Turn],
    where: str,
    *,
    add_generation_prompt: bool,
) -> str:
    """Rendered turns.

    Raises:
        TenureError: the template refuses them, fails, reaches for what the sandbox denies, or does not come to an end;
            many take no system turn, or want users and assistants in turns.
    """
    try:
        text = _applied(tokenizer, [dict(turn) for turn in messages], tools, add_generation_prompt)
    except (TemplateError, TimeoutError, *_TEMPLATE_FAULTS) as error:
        roles = ", ".join(turn["role"] for turn in messages)
        reason = str(error).strip() or type(error).__name__
        what = f"the model's chat template refuses the turns {roles}: {reason}"
        raise fail(what, where, "give other turns, or another chat_template.jinja beside the model") from None
    assert isinstance(text, str)
    return text


def render_all(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Turn]], *, add_generation_prompt: bool
) -> list[str | None]:
    """render() of every conversation, all without tools; None of those near one that the template refuses.

    One call costs less than half of as many: what surrounds the template takes longer than the template itself.
    """
    found: list[str | None] = []
    for start in range(0, len(conversations), RENDERED_AT_ONCE):
        some = conversations[start : start + RENDERED_AT_ONCE]
        try:
            found += _applied(tokenizer, some, (), add_generation_prompt)
        except TimeoutError:  # the others would take as long
            break
        except (TemplateError, *_TEMPLATE_FAULTS):
            found += [None] * len(some)
    return found + [None] * (len(conversations) - len(found))


def _applied(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Any], tools: Sequence[Turn], add_generation_prompt: bool
) -> Any:
    """The text of one conversation, or the texts of several."""
    with time_limit(RENDER_LIMIT_S):
        return tokenizer.apply_chat_template(
            [*turns],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )


# What an expression over turns can raise beside Jinja's own errors; the sandbox's limit on range() is an OverflowError.
_TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
