"""Renders chats by the model's own template and finds the tokens that the assistant writes.

The template renders the turns before an answer, as serving does, and the turns with it. The first must begin the
second, and what the second adds, up to the token at which serving stops, is the answer. Where a template marks what
the assistant writes (`{% generation %}`), its marks narrow that.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.rendering import Turn, render, render_all, render_prompt
from training.data.rows import Conversation
from training.data.seams import Seam, last_seam, prompt_within
from training.data.tokens import continued_ids, many_ids, text_ids
from training.data.turns import Messages
from training.errors import TenureError, fail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """One assistant turn: the prompt's ids as serving computes them, the ids to be written, and which are learned."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    is_target: tuple[bool, ...]


@dataclass(frozen=True)
class Draft:
    """An answer in rendered text, not yet in tokens: the prompt before it, the prompt with it, and the tokens marked.

    `index` is the answer's turn, `seam` the prompt's last_seam().
    """

    conversation: Conversation
    index: int
    prompt: str
    whole: str
    marks: list[int] | None
    seam: Seam | None


def chat_answers(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[Answer]:
    """The assistant's turns that the conversation is to teach, in order.

    Raises:
        TenureError: the template refuses the turns, leaves out a part of them, or does not begin an answer as the
            prompt ends; a turn to be learned is empty, or not there.
    """
    return finish(tokenizer, draft_answers(tokenizer, conversation))


def rendered_ahead(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation]
) -> list[dict[int, tuple[str, str]]]:
    """Prompt and whole of the answers of every row, by their turns, rendered with few calls for draft_answers().

    What has tools or reasoning is left out, and so is whatever a row cannot have rendered: draft_answers() tells why.
    """
    asked = [
        (number, index) for number, row in enumerate(rows) if not _may_lose_parts(row) for index in _learnable(row)
    ]
    before, turns = ([rows[number].messages[: index + more] for number, index in asked] for more in (0, 1))
    prompts = render_all(tokenizer, before, add_generation_prompt=True)
    wholes = render_all(tokenizer, turns, add_generation_prompt=False)
    found: list[dict[int, tuple[str, str]]] = [{} for _ in rows]
    for (number, index), prompt, whole in zip(asked, prompts, wholes, strict=True):
        if prompt is not None and whole is not None:
            found[number][index] = (prompt, whole)
    return found


def _learnable(conversation: Conversation) -> list[int]:
    """The turns to be learned that answer something; none where there is a fault in them."""
    try:
        return [index for index in learned_turns(conversation) if index]
    except TenureError:
        return []


def draft_answers(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ahead: Mapping[int, tuple[str, str]] | None = None
) -> list[Draft]:
    """chat_answers() as rendered text, for finish().

    Args:
        ahead: what rendered_ahead() has of the conversation.
    """
    conversation = _with_arguments_as_wanted(tokenizer, conversation)
    _refuse_what_is_left_out(tokenizer, conversation)
    return [_draft(tokenizer, conversation, index, (ahead or {}).get(index)) for index in learned_turns(conversation)]


def finish(
    tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft], ids: Sequence[list[int]] | None = None
) -> list[Answer]:
    """The answers in tokens.

    Args:
        ids: of texts_of() the drafts, where many conversations were put into tokens at once.
    """
    left = iter(many_ids(tokenizer, texts_of(drafts)) if ids is None else ids)
    return [_answer(tokenizer, draft, *islice(left, len(texts_of([draft])))) for draft in drafts]


def texts_of(drafts: Sequence[Draft]) -> list[str]:
    """The texts that finish() needs in tokens: of every draft the whole, and the prompt where no seam gives its ids."""
    return [text for draft in drafts for text in ((draft.whole,) if draft.seam else (draft.whole, draft.prompt))]


def learned_turns(conversation: Conversation) -> list[int]:
    """The places of the assistant's turns that are learned: those of weight 0 are not, and `last` means the last turn.

    Raises:
        TenureError: the conversation does not end with one, or one is empty.
    """
    messages, where = conversation.messages, conversation.where
    if messages[-1]["role"] != "assistant":
        raise fail(f"the last turn is the {messages[-1]['role']}'s: nothing to learn", where, "end with an answer")
    places = [place for place, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
    places = places[-1:] if conversation.learn == "last" else places
    for place in places:
        if not (str(messages[place].get("content") or "").strip() or messages[place].get("tool_calls")):
            raise fail(f"the assistant's turn {place + 1} is empty", where, "fill it, or remove the row")
    return places


def _draft(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, rendered: tuple[str, str] | None
) -> Draft:
    before, turns = conversation.messages[:index], conversation.messages[: index + 1]
    if not before:
        what = "the first turn is the assistant's: there is no prompt that it could answer"
        raise fail(what, conversation.where, "set learn: last, or remove the turn")
    prompt, whole = rendered or (
        render_prompt(tokenizer, before, conversation.where, conversation.tools),
        render(tokenizer, turns, conversation.tools, conversation.where, add_generation_prompt=False),
    )
    marks: list[int] | None = None
    if not whole.startswith(prompt):
        whole = _verbatim(tokenizer, conversation, index, prompt)
    elif tokenizer.is_fast and _is_marked(_template(tokenizer, conversation.tools)):
        marks = _marks(tokenizer, turns, conversation.tools)
    return Draft(conversation, index, prompt, whole, marks, last_seam(tokenizer, prompt))


def _answer(
    tokenizer: PreTrainedTokenizerBase, draft: Draft, ids: list[int], prompt: list[int] | None = None
) -> Answer:
    given = prompt_within(tokenizer, draft.seam, draft.whole, ids) if draft.seam else prompt
    if given is None:
        given = text_ids(tokenizer, draft.prompt)
    marks = draft.marks
    if ids[: len(given)] == given:
        answer, marks = ids[len(given) :], marks and marks[len(given) :]
    else:  # the answer's first characters are one token with the prompt's last, which serving keeps apart
        answer, marks = continued_ids(tokenizer, draft.whole[len(draft.prompt) :]), None
    answer = _to_its_end(tokenizer, draft.conversation, draft.index, answer)
    return Answer(tuple(given), tuple(answer), _targets(answer, marks))


def _template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Turn]) -> str:
    return str(tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None))


@lru_cache(maxsize=16)
def _is_marked(template: str) -> bool:
    """Whether a template marks what the assistant writes."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _marks(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Turn]) -> list[int]:
    """Which tokens of the rendered turns the template marks as the assistant's."""
    encoded: Any = tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tools=[dict(tool) for tool in tools] or None,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return list(encoded["assistant_masks"])


def _targets(answer: Sequence[int], marks: Sequence[int] | None) -> tuple[bool, ...]:
    """What is learned of an answer: all, or what is marked and the end token, which some templates leave unmarked."""
    if marks is None:
        return (True,) * len(answer)
    wanted = [bool(mark) for mark in marks[: len(answer)]]
    wanted += [False] * (len(answer) - len(wanted))
    return (*wanted[:-1], any(wanted))


def _verbatim(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, prompt: str) -> str:
    """The prompt with the answer as the row gives it, where the template writes a finished turn after another prompt.

    Some open the answer with `<think>` in the prompt and cut the reasoning out of finished turns; others move the
    system text to whichever turn is last. What both write between the turn before and the answer must be the same.

    Raises:
        TenureError: it is not.
    """
    before, turn = conversation.messages[:index], conversation.messages[index]
    marked = (*before[:-1], {**before[-1], "content": _MARK})
    header = render_prompt(tokenizer, marked, conversation.where, conversation.tools).rpartition(_MARK)[2]
    turns = (*marked, {**turn, "content": f"\v{_ANSWER_MARK}\v"})  # some templates strip what a turn says
    whole = render(tokenizer, turns, conversation.tools, conversation.where, add_generation_prompt=False)
    between, _, tail = whole.rpartition(_MARK)[2].partition(_ANSWER_MARK)
    content = str(turn.get("content") or "")
    content, between, tail = (
        (content, between[:-1], tail[1:]) if tail.startswith("\v") else (content.strip(), between, tail)
    )
    written = between + content
    if written.startswith(header) and not turn.get("tool_calls"):
        return prompt + written[len(header) :] + tail
    opening = header.removeprefix(between)
    if header.startswith(between) and not turn.get("tool_calls"):
        what = f"serving starts the assistant's turn {index + 1} with {opening!r}, which the row's answer lacks"
        raise fail(what, conversation.where, f"start its content with {opening!r}, the reasoning and its end")
    what = f"the chat template writes the assistant's turn {index + 1} otherwise than its own prompt for it begins"
    raise fail(what, conversation.where, "put another chat_template.jinja beside the model")


_MARK, _ANSWER_MARK = "tenure0mark", "tenure0answer"


def _to_its_end(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, answer: list[int]
) -> list[int]:
    """An answer up to and including the token at which serving stops: what the template writes after it is never
    generated.

    Raises:
        TenureError: the answer goes on after such a token, or the template ends turns with another one.
    """
    stops = stop_ids(tokenizer)
    place = min((answer.index(token) for token in stops.intersection(answer)), default=None)
    if place is not None:
        _refuse_text_after(tokenizer, answer, place, conversation.where)
        return answer[: place + 1]
    closing = _closing_token(tokenizer, answer)
    if closing is not None:
        text, folder = tokenizer.convert_ids_to_tokens(closing), tokenizer.name_or_path
        what = f"the chat template ends turns with {text}, at which the model does not stop"
        raise fail(what, folder, f"add its id {closing} to eos_token_id in generation_config.json beside the model")
    return [*answer, _next_token(tokenizer, conversation, index, stops)]


def _refuse_text_after(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], place: int, where: str) -> None:
    if _is_text(tokenizer, tuple(answer[place + 1 :])):
        token = tokenizer.convert_ids_to_tokens(answer[place])
        raise fail(f"an answer goes on after {token}, at which serving stops", where, "remove that from its text")


@lru_cache(maxsize=1024)
def _is_text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> bool:
    """Whether the ids say more than white space; kept, since a template ends most answers alike."""
    return bool(ids) and bool(str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip())


def _closing_token(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> int | None:
    """The special token that ends an answer, where nothing but white space follows it."""
    special = set(tokenizer.all_special_ids)
    last = next((place for place in reversed(range(len(answer))) if answer[place] in special), None)
    return None if last is None or _is_text(tokenizer, tuple(answer[last + 1 :])) else int(answer[last])


def _next_token(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int, stops: frozenset[int]
) -> int:
    """The end of an answer that the template ends with nothing: the next turn's first token, or the end token.

    The first is so of GLM, whose models stop at `<|user|>` and `<|observation|>`.
    """
    turn = {key: value for key, value in conversation.messages[index].items() if key != "reasoning_content"}
    turns = (*conversation.messages[:index], {**turn, "content": _ANSWER_MARK})
    after = {"role": "tool" if turn.get("tool_calls") else "user", "content": _MARK}
    assert tokenizer.eos_token_id is not None
    try:
        whole, text = (
            render(tokenizer, some, conversation.tools, "", add_generation_prompt=False)
            for some in (turns, (*turns, after))
        )
    except TenureError:  # the template takes no such turn, so it ends with the answer
        return int(tokenizer.eos_token_id)
    follows = text_ids(tokenizer, text[len(whole) :]) if text.startswith(whole) else []
    return follows[0] if follows and follows[0] in stops else int(tokenizer.eos_token_id)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which serving ends an answer: the generation config's beside the tokenizer, and its own."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return frozenset((*own, *_configured_stops(str(tokenizer.name_or_path or ""))))


@lru_cache(maxsize=16)
def _configured_stops(folder: str) -> tuple[int, ...]:
    """`eos_token_id` of a model's generation config, or of its config where it has no other."""
    files = [Path(folder) / name for name in ("generation_config.json", "config.json")] if folder else []
    found = next((path for path in files if path.is_file()), None)
    tokens = json.loads(found.read_text(encoding="utf-8")).get("eos_token_id") if found else None
    return tuple(tokens) if isinstance(tokens, list) else () if tokens is None else (int(tokens),)


def _with_arguments_as_wanted(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Conversation:
    """Tool calls with their arguments as objects, as most templates want them, or as JSON text where those fail."""
    if not any(turn.get("tool_calls") for turn in conversation.messages):
        return conversation
    try:
        render(tokenizer, conversation.messages, conversation.tools, conversation.where, add_generation_prompt=False)
    except TenureError as error:
        as_text = replace(conversation, messages=_with_text_arguments(conversation.messages))
        try:
            render(tokenizer, as_text.messages, conversation.tools, conversation.where, add_generation_prompt=False)
        except TenureError:
            raise error from None
        return as_text
    return conversation


def _with_text_arguments(messages: Messages) -> Messages:
    changed = copy.deepcopy(messages)
    for function in (call["function"] for turn in changed for call in turn.get("tool_calls") or ()):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return changed


def _refuse_what_is_left_out(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
    """Refuse tools, calls, results and reasoning that the template passes over in silence.

    Raises:
        TenureError: it writes none of a part of them.
    """
    if not _may_lose_parts(conversation):
        return
    marked, names = _with_marks(conversation)
    text = render(tokenizer, marked.messages, marked.tools, conversation.where, add_generation_prompt=False)
    missing = sorted({name for mark, name in names.items() if mark not in text})
    if missing:
        what = f"the model's chat template leaves out {', '.join(missing)}"
        raise fail(what, conversation.where, "remove them, or put another chat_template.jinja beside the model")


def _may_lose_parts(conversation: Conversation) -> bool:
    """Whether it holds what templates may not know."""
    turns = conversation.messages
    return bool(conversation.tools) or any(turn["role"] == "tool" or turn.keys() & _MAY_BE_LEFT_OUT for turn in turns)


_MAY_BE_LEFT_OUT = {"tool_calls", "reasoning_content"}


def _with_marks(conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
    """The conversation with a mark in each part that templates may not know, and what each mark stands for."""
    names: dict[str, str] = {}

    def mark(name: str) -> str:
        names[f"{_MARK}{len(names)}x"] = name
        return f"{_MARK}{len(names) - 1}x"

    messages, tools = copy.deepcopy(conversation.messages), copy.deepcopy(conversation.tools)
    if tools:
        tools[0]["function"]["name"] = mark("the tools")
    for place, turn in enumerate(messages):
        if turn["role"] == "tool":
            turn["content"] = mark("the tools' answers")
        for call in turn.get("tool_calls") or ():
            call["function"]["name"] = mark("tool calls")
        if turn.get("reasoning_content") and place == len(messages) - 1:
            turn["reasoning_content"] = mark("reasoning_content")
    return replace(conversation, messages=messages, tools=tools), names
