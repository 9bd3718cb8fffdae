"""Turns conversations into token ids with the loss on the assistant's tokens alone.

The ids before every answer are those that serving computes for the same prompt, and the ids of an answer end with the
token at which serving stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.chat import Draft, draft_answers, finish, learned_turns, rendered_ahead, texts_of
from training.data.fitting import Tally, fault_of
from training.data.rows import Conversation, Faults, Passage, Preference
from training.data.tokens import many_continued_ids, many_ids, many_prompt_ids
from training.errors import TenureError, fail

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example and, for each, whether it carries loss.

    The first token is never learned, whatever is_target says: nothing stands before it.
    """

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    @property
    def num_targets(self) -> int:
        return self.is_target[1:].count(True)


# Rows that stand or fall together, and their place.
Placed = tuple[tuple[Encoded, ...], str]


@dataclass
class Untaught:
    """What becomes of rows of which no target token is left: they are refused, or dropped and counted."""

    drop: bool = False
    count: int = 0


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, with a pad token (the end token where it has none).

    Raises:
        TenureError: it cannot be read, or has no end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().splitlines()[0]
        raise fail(f"the tokenizer cannot be read: {reason}", str(folder), "save it beside the model again") from None
    if tokenizer.eos_token_id is None:
        raise fail("the tokenizer has no end token", str(folder), "set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def wants_chat(chat: bool | str, tokenizer: PreTrainedTokenizerBase, where: str) -> bool:
    """Whether prompts are rendered by the chat template.

    Raises:
        TenureError: chat is asked for and the model has no chat template.
    """
    has_template = bool(tokenizer.chat_template)
    if chat is True and not has_template:
        raise fail("chat is asked for, but the model has no chat template", where, _NO_TEMPLATE)
    return has_template if chat == "auto" else bool(chat)


_NO_TEMPLATE = "use an instruct model, put a chat_template.jinja beside its tokenizer, or give prompt and completion"


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, chat: bool) -> Encoded:
    """Token ids and loss mask of one conversation. A plain prompt gets the tokenizer's own start tokens.

    Raises:
        TenureError: as chat_answers(), or serving would not write earlier turns as they are learned.
    """
    faults = Faults()
    (encoded,) = encode_many(tokenizer, [conversation], chat, faults)
    faults.close()
    assert encoded is not None
    return encoded


def encode_many(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation], chat: bool, faults: Faults
) -> list[Encoded | None]:
    """encode() of every row, with few calls of the tokenizer; None for a row whose fault is kept instead."""
    return _encode_chats(tokenizer, rows, faults) if chat else [*_encode_plain(tokenizer, rows)]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation]) -> Iterator[Encoded]:
    prompts = ["\n".join(turn["content"] for turn in row.messages[:-1]) for row in rows]
    answers = [spaced(prompt, row.messages[-1]["content"]) for prompt, row in zip(prompts, rows, strict=True)]
    given = many_prompt_ids(tokenizer, prompts)
    alone = many_ids(tokenizer, ["" if prompt else answer for prompt, answer in zip(prompts, answers, strict=True)])
    after = many_continued_ids(
        tokenizer, [text if prompt else "" for prompt, text in zip(prompts, answers, strict=True)]
    )
    assert tokenizer.eos_token_id is not None
    for prompt, *answer in zip(given, alone, after, strict=True):
        ids = (*prompt, *answer[0], *answer[1], int(tokenizer.eos_token_id))
        yield Encoded(ids, (False,) * len(prompt) + (True,) * (len(ids) - len(prompt)))


def spaced(prompt: str, completion: str) -> str:
    """A plain completion with the space that parts it from its prompt, unless one of them brings its own."""
    needs = bool(prompt) and not prompt[-1].isspace() and not completion[:1].isspace()
    return f" {completion}" if needs else completion


def _encode_chats(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation], faults: Faults
) -> list[Encoded | None]:
    """All rows rendered, then all of their texts put into tokens at once, then cut into answers."""
    ahead = zip(rows, rendered_ahead(tokenizer, rows), strict=True)
    drafts = [faults.tried(row.where, draft_answers, tokenizer, row, rendered) for row, rendered in ahead]
    ids = iter(many_ids(tokenizer, [text for one in drafts for text in texts_of(one or ())]))
    found: list[Encoded | None] = []
    for row, draft in zip(rows, drafts, strict=True):
        own = list(islice(ids, len(texts_of(draft or ()))))
        made = None if draft is None else faults.tried(row.where, _encode_chat, tokenizer, row.where, draft, own)
        found.append(made)
    return found


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, where: str, drafts: Sequence[Draft], texts: Sequence[list[int]]
) -> Encoded:
    """The answers to be learned, each after the prompt of which serving would ask it."""
    ids: tuple[int, ...] = ()
    is_target: tuple[bool, ...] = ()
    for answer in finish(tokenizer, drafts, texts):
        if answer.prompt[: len(ids)] != ids:
            raise _rewritten(tokenizer, ids, answer.prompt, where)
        is_target += (False,) * (len(answer.prompt) - len(ids)) + answer.is_target
        ids = answer.prompt + answer.ids
    return Encoded(ids, is_target)


def _rewritten(
    tokenizer: PreTrainedTokenizerBase, learned: Sequence[int], served: Sequence[int], where: str
) -> TenureError:
    """Why a conversation is no single row: what was learned is not what later turns would be answered after."""
    pairs = enumerate(zip(learned, served, strict=False))
    place = next((place for place, (one, two) in pairs if one != two), min(len(learned), len(served)))
    was, now = (_decoded(tokenizer, ids[place : place + 8]) for ids in (learned, served))
    change = f"{was!r} in the row of one answer is {now!r} in the prompt of the next"
    what = f"the chat template rewrites earlier turns: {change}"
    return fail(what, where, "set the source's learn: each (a row for every answer, as served), or learn: last")


def preview(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[tuple[str, bool]]:
    """A row's text in pieces, each with whether it carries loss; the texts join to the decoded row.

    The cuts are looked for in the whole text: pieces decoded apart lose spaces and characters of several tokens.
    """
    wanted = encoded.is_target
    ends = [place for place in range(1, len(wanted)) if wanted[place] != wanted[place - 1]]
    whole = _decoded(tokenizer, encoded.ids)
    cuts = [0, *(_num_shared(whole, _decoded(tokenizer, encoded.ids[:end])) for end in ends), len(whole)]
    return [(whole[cuts[n] : cuts[n + 1]], wanted[start]) for n, start in enumerate([0, *ends])]


def _num_shared(text: str, other: str) -> int:
    """How many characters both texts start with."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    chat: bool,
    max_length: int,
    overlong: str,
    untaught: Untaught | None = None,
    tally: Tally | None = None,
    faults: Faults | None = None,
) -> tuple[list[Encoded], int]:
    """All examples encoded, and how many were longer than max_length (dropped or truncated as asked).

    Args:
        tally: counts what would be refused for the whole of the rows; else it is refused here.
        faults: what becomes of rows that cannot be encoded; by default they are refused.

    Raises:
        TenureError: rows are longer and overlong is "refuse", or a row cannot be encoded or has no target token.
    """
    faults = Faults() if faults is None else faults
    split = [faults.tried(one.where, split_rows, one, chat) or [] for one in conversations]
    rows = [row for some in split for row in some]
    encoded = encode_many(tokenizer, rows, chat, faults)
    faults.close()
    counted = Tally() if tally is None else tally
    before = counted.num_longer
    made = [((example,), row.where) for example, row in zip(encoded, rows, strict=True) if example]
    kept = _fit(made, max_length, overlong, untaught, counted)
    if tally is None:
        counted.refuse(max_length, overlong)
    return [example for (example,), _ in kept], counted.num_longer - before


def split_rows(conversation: Conversation, chat: bool) -> list[Conversation]:
    """The rows that a conversation becomes: one, or one for every answer where each is to be learned by itself."""
    if not chat or conversation.learn != "each":
        return [conversation]
    ends = [place + 1 for place in learned_turns(conversation)] or [len(conversation.messages)]
    return [replace(conversation, messages=conversation.messages[:end], learn="last") for end in ends]


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    preferences: Sequence[Preference],
    chat: bool,
    max_length: int,
    overlong: str,
    untaught: Untaught | None = None,
    tally: Tally | None = None,
    faults: Faults | None = None,
) -> tuple[list[Encoded], list[Encoded], int]:
    """The chosen and the rejected answers with their prompts, pair by pair, and how many pairs were overlong.

    A pair is overlong when either row is; truncation cuts the ends of the answers.

    Raises:
        TenureError: as encode_all(), or nothing is left by which the answers of a pair differ.
    """
    faults = Faults() if faults is None else faults
    encoded = _encode_pairs(tokenizer, preferences, chat, faults)
    faults.close()
    counted = Tally() if tally is None else tally
    before = counted.num_longer
    kept = _fit(encoded, max_length, overlong, untaught, counted)
    alike = [where for (chosen, rejected), where in kept if chosen == rejected]
    _refuse_or_drop("alike", alike, counted, faults)
    kept = [((one, two), where) for (one, two), where in kept if one != two]
    if tally is None:
        counted.refuse(max_length, overlong)
    return [pair[0] for pair, _ in kept], [pair[1] for pair, _ in kept], counted.num_longer - before


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, preferences: Sequence[Preference], chat: bool, faults: Faults
) -> list[Placed]:
    """The pairs of which both answers can be encoded."""
    chosen = encode_many(tokenizer, [replace(pair.chosen, learn="last") for pair in preferences], chat, faults)
    left = [(one, pair.rejected) for one, pair in zip(chosen, preferences, strict=True) if one]
    others = encode_many(tokenizer, [replace(rejected, learn="last") for _, rejected in left], chat, faults)
    return [((one, two), rejected.where) for (one, rejected), two in zip(left, others, strict=True) if two]


def encode_passages(
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    max_length: int,
    tally: Tally | None = None,
    faults: Faults | None = None,
) -> tuple[list[Encoded], int]:
    """All texts as pieces of at most max_length tokens, and how many texts were cut.

    Every token of a text but its first is learned once, the end token among them: a piece starts with the last token
    of the one before it, which is read there and was learned in that one.

    Raises:
        TenureError: max_length leaves nothing to learn.
    """
    if max_length < 2:
        what = "a piece of one token has nothing to learn"
        raise fail(what, passages[0].where, "set training.max_length: 2 or more")
    texts = many_prompt_ids(tokenizer, [passage.text for passage in passages])
    cut = [_pieces(tokenizer, ids, max_length) for ids in texts]
    counted = Tally() if tally is None else tally
    bare = [passage.where for passage, pieces in zip(passages, cut, strict=True) if not pieces]
    _refuse_or_drop("bare", bare, counted, Faults() if faults is None else faults)
    if tally is None:
        counted.refuse(max_length, "truncate")
    return [piece for pieces in cut for piece in pieces], sum(len(pieces) > 1 for pieces in cut)


def _refuse_or_drop(fault: str, places: Sequence[str], tally: Tally, faults: Faults) -> None:
    if not faults.drop:
        tally.faulty(fault, places)
        return
    for where in places:
        faults.put(where, fault_of(fault, where))


def _pieces(tokenizer: PreTrainedTokenizerBase, text: Sequence[int], max_length: int) -> list[Encoded]:
    assert tokenizer.eos_token_id is not None
    ids = (*text, int(tokenizer.eos_token_id))
    starts = range(0, len(ids) - 1, max_length - 1)
    pieces = [ids[start : start + max_length] for start in starts]
    return [Encoded(piece, (False,) + (True,) * (len(piece) - 1)) for piece in pieces]


def _fit(
    groups: Sequence[Placed], max_length: int, overlong: str, untaught: Untaught | None, tally: Tally
) -> list[Placed]:
    """The groups of rows that stand or fall together, each with its place. What is wrong with them is counted."""
    longest = [max(len(row.ids) for row in group) for group, _ in groups]
    longer = [where for (_, where), length in zip(groups, longest, strict=True) if length > max_length]
    tally.longer(longer, max(longest, default=0))
    if overlong == "drop":
        kept = [one for one, length in zip(groups, longest, strict=True) if length <= max_length]
    else:
        kept = [(tuple(_cut(row, max_length) for row in group), where) for group, where in groups]
    empty = [where for group, where in kept if not all(row.num_targets for row in group)]
    if not (untaught and untaught.drop):
        tally.faulty("empty", empty)
    if untaught and empty:
        untaught.count += len(empty)
        kept = [(group, where) for group, where in kept if all(row.num_targets for row in group)]
    return kept


def _cut(example: Encoded, max_length: int) -> Encoded:
    if len(example.ids) <= max_length:
        return example
    return Encoded(example.ids[:max_length], example.is_target[:max_length])
