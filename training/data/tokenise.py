"""Encodes the rows of a source chunk by chunk, in several processes where there are many: memory stays bounded."""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, cast

from training.data.encoding import (
    Encoded,
    Untaught,
    encode_all,
    encode_passages,
    encode_preferences,
    load_tokenizer,
    wants_chat,
)
from training.data.fitting import Tally
from training.data.rows import Conversation, Example, Faults, Passage, Preference, examples
from training.data.store import ROWS_AT_ONCE, batch_of
from training.errors import TenureError
from training.section import Source

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

# A process takes seconds to start: as few chunks as most data have are encoded in this one.
CHUNKS_ALONE = 3
_MOST_PROCESSES = 16
CHARACTERS_AT_ONCE = 2**24
# Encoding makes many objects and no cycles: Python's usual threshold has it search for them all the time.
_OBJECTS_PER_COLLECTION = 100_000


@dataclass(frozen=True)
class Recipe:
    """How the rows of a source are encoded; plain values, so that any process can do it."""

    model: str
    form: str
    chat: bool
    max_length: int
    overlong: str
    untaught: str
    faulty: str = "refuse"


@dataclass(frozen=True)
class Chunk:
    """Encoded rows of a stretch of a source, and of preference data the rejected answers beside them.

    `num_overlong` rows were dropped or truncated, or of text cut into pieces; `num_untaught` had no target and were
    dropped; `faults` are those of rows that could not be encoded.
    """

    rows: pa.RecordBatch
    rejected: pa.RecordBatch
    num_overlong: int
    num_untaught: int
    tally: Tally
    faults: Faults


def encoded_chunks(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    model: str,
    max_length: int,
    overlong: str,
    untaught: str = "refuse",
    seed: int = 0,
    faults: Faults | None = None,
) -> Iterator[Chunk]:
    """The rows of a source in order, whatever its form.

    Args:
        faults: what becomes of rows that cannot be used; by default what the source says.

    Raises:
        TenureError: after the last chunk, every row's fault at once.
    """
    chat = source.form != "text" and wants_chat(True if source.messages else source.chat, tokenizer, str(source.path))
    recipe = Recipe(model, source.form, chat, max_length, overlong, untaught, source.faulty)
    faults, tally = faults or Faults(drop=source.faulty == "drop"), Tally()
    for chunk in _encoded(tokenizer, recipe, _stretches(examples(source, faults, seed))):
        tally.add(chunk.tally)
        faults.merge(chunk.faults)
        yield chunk
    faults.close()
    tally.refuse(max_length, overlong)


def _stretches(rows: Iterator[Example]) -> Iterator[list[Example]]:
    """Rows to be encoded together, so many that calls are few and so few that long ones do not fill the memory."""
    stretch: list[Example] = []
    room = CHARACTERS_AT_ONCE
    for row in rows:
        stretch.append(row)
        room -= _num_characters(row)
        if len(stretch) == ROWS_AT_ONCE or room <= 0:
            yield stretch
            stretch, room = [], CHARACTERS_AT_ONCE
    if stretch:
        yield stretch


def _num_characters(row: Example) -> int:
    if isinstance(row, Passage):
        return len(row.text)
    turns = row.chosen.messages + row.rejected.messages if isinstance(row, Preference) else row.messages
    return sum(len(turn["content"]) for turn in turns)


def _encoded(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stretches: Iterator[list[Example]]) -> Iterator[Chunk]:
    """Every stretch encoded, in order: a few of them here, many in as many processes as there are processors."""
    processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    first = list(islice(stretches, CHUNKS_ALONE + 1)) if processes > 1 else []
    if len(first) > CHUNKS_ALONE:
        yield from _in_processes(tokenizer, recipe, chain(first, stretches), processes)
        return
    for stretch in chain(first, stretches):
        yield encode_chunk(tokenizer, recipe, stretch)


def _in_processes(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stretches: Iterator[list[Example]], processes: int
) -> Iterator[Chunk]:
    """In order. While all others have work, as while they start, this process encodes, too; what waits is bounded."""
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(processes, get_context("spawn"), _lean) as pool:
        try:
            for stretch in stretches:
                busy = sum(not one.done() for one in waiting) >= 2 * processes
                waiting.append(
                    _done(tokenizer, recipe, stretch) if busy else pool.submit(_encode_there, recipe, stretch)
                )
                while waiting and (waiting[0].done() or len(waiting) > 4 * processes):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _done(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stretch: list[Example]) -> Future[Chunk]:
    future: Future[Chunk] = Future()
    future.set_result(encode_chunk(tokenizer, recipe, stretch))
    return future


def _lean() -> None:
    """There is a process for every processor already; and encoding needs no torch, whose import takes seconds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # how Python is told that there is none
    gc.set_threshold(_OBJECTS_PER_COLLECTION)


def _encode_there(recipe: Recipe, stretch: list[Example]) -> Chunk:
    return encode_chunk(_tokenizer(recipe.model), recipe, stretch)


@lru_cache(maxsize=1)
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(Path(model))


def encode_chunk(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, stretch: list[Example]) -> Chunk:
    """The encoded rows of a stretch of one form. Faults are counted and returned, so that those of others are found."""
    tally, faults = Tally(), Faults(drop=recipe.faulty == "drop")
    untaught = Untaught(drop="drop" in (recipe.untaught, recipe.faulty))
    try:
        rows, rejected, num_overlong = _by_form(tokenizer, recipe, stretch, untaught, tally, faults)
    except TenureError as error:
        return Chunk(batch_of([]), batch_of([]), 0, 0, tally, Faults(False, len(error.problems), [*error.problems]))
    return Chunk(batch_of(rows), batch_of(rejected), num_overlong, untaught.count, tally, faults)


def _by_form(
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    stretch: list[Example],
    untaught: Untaught,
    tally: Tally,
    faults: Faults,
) -> tuple[list[Encoded], list[Encoded], int]:
    """Rows, rejected answers, and how many were overlong."""
    if recipe.form == "text":
        pieces, num_cut = encode_passages(tokenizer, cast(list[Passage], stretch), recipe.max_length, tally, faults)
        return pieces, [], num_cut
    settings = (recipe.chat, recipe.max_length, recipe.overlong, untaught, tally, faults)
    if recipe.form == "preference":
        return encode_preferences(tokenizer, cast(list[Preference], stretch), *settings)
    rows, num_longer = encode_all(tokenizer, cast(list[Conversation], stretch), *settings)
    return rows, [], num_longer
