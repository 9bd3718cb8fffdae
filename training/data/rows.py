"""Turns rows into training examples and test items, one at a time, naming the row of every fault."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from training.data.instructions import LIBRARY, draw
from training.data.locations import Location
from training.data.readers import open_rows
from training.data.row import LastFault, Row, RowFault
from training.data.shapes import as_messages, check_order, is_turns, recognised
from training.data.templating import fill, fill_text
from training.data.turns import Messages, checked_tools, checked_turns
from training.errors import Problem, TenureError, raise_all
from training.section import Learn, Library, Source
from training.strategy import Prompts

MAX_PROBLEMS = 20
Built = TypeVar("Built")


@dataclass(frozen=True)
class Conversation:
    """A training example: chat turns, of which the assistant's are learned, or a plain prompt and completion.

    A turn has `role` and `content` (text), and where the row gives them `tool_calls`, `tool_call_id`, `name`,
    `reasoning_content` and `weight` (0: not learned), as in OpenAI's API. `tools` are the functions that may be called,
    as JSON Schema. Of the assistant's turns are learned all, the last, or each in a row of its own.
    """

    messages: Messages
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    learn: Learn = "all"


@dataclass(frozen=True)
class Preference:
    """A prompt with the answer to prefer and the one to avoid: two conversations that differ in their last turn."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True)
class Passage:
    """Plain text, of which every token is learned."""

    text: str
    where: str


@dataclass
class Faults:
    """The rows that cannot be used: refused all at once (the first twenty), or dropped and counted.

    `first` are the faults of the first such rows.
    """

    drop: bool = False
    count: int = 0
    first: list[Problem] = field(default_factory=list)

    def add(self, fault: RowFault, where: str) -> None:
        """Keep a row's fault.

        Raises:
            TenureError: there are too many to go on, or the file cannot be read on.
        """
        self.count += 1
        if len(self.first) < MAX_PROBLEMS:
            self.first.append(fault.at(where))
        if isinstance(fault, LastFault):
            raise_all([fault.at(where)] if self.drop else self.first)
        self._stop_at_most()

    def tried(self, where: str, build: Callable[..., Built], *given: Any) -> Built | None:
        """What is made of a row; None for one of which nothing can be made, whose fault is kept.

        Raises:
            TenureError: there are too many to go on; or rows are dropped, and the fault is another's, as the model's.
        """
        try:
            return build(*given)
        except TenureError as error:
            self.put(where, *error.problems)
        return None

    def put(self, where: str, *problems: Problem) -> None:
        """Keep the faults of a row, found when it was put into tokens; raises as tried()."""
        if self.drop:
            raise_all(problem for problem in problems if problem.where != where)
        self.count += 1
        self._keep(problems)

    def merge(self, other: Faults) -> None:
        """Keep what was found in the rows that follow; raises as add(), and what is no row's own as tried()."""
        if self.drop and not other.drop:
            raise_all(other.first)
        self.count += other.count
        self._keep(other.first)

    def _keep(self, problems: Iterable[Problem]) -> None:
        self.first = list(dict.fromkeys([*self.first, *problems]))[:MAX_PROBLEMS]
        self._stop_at_most()

    def _stop_at_most(self) -> None:
        if not self.drop and len(self.first) >= MAX_PROBLEMS:
            raise_all(self.first)

    def close(self) -> None:
        """After the last row: raise what was found, unless faulty rows are dropped."""
        if not self.drop:
            raise_all(self.first)


Example = Conversation | Preference | Passage


def place_of(example: Example) -> str:
    """The file and row that an example was made from."""
    return example.chosen.where if isinstance(example, Preference) else example.where


def examples(source: Source, faults: Faults | None = None, seed: int = 0) -> Iterator[Example]:
    """The training examples of a source in its rows' order, as they are asked for.

    Args:
        faults: what becomes of rows that cannot be used; by default what the source says.
        seed: draws one of the source's templates for every row.

    Raises:
        TenureError: every row's fault at once (the first twenty).
    """
    builders: dict[str, Callable[[Source, Row, str], Example]] = {
        "completion": _conversation,
        "messages": _conversation,
        "preference": _preference,
        "text": _passage,
    }
    source = recognised(source)
    build = builders[source.form]
    faults = faults or Faults(drop=source.faulty == "drop")
    return rows_of(source.path, lambda row, where: build(source, prompted(source, row, seed), where), faults)


def rows_of(path: Location, build: Callable[[Row, str], Built], faults: Faults) -> Iterator[Built]:
    for where, row in open_rows(path):
        try:
            if isinstance(row, RowFault):
                raise row
            built = build(row, where)
        except RowFault as fault:
            faults.add(fault, where)
        else:
            yield built
    faults.close()


def read_conversations(source: Source, seed: int = 0) -> list[Conversation]:
    """All examples() of a source of the form completion or messages."""
    return [example for example in examples(source, seed=seed) if isinstance(example, Conversation)]


def read_preferences(source: Source, seed: int = 0) -> list[Preference]:
    """All examples() of a source of the form preference."""
    return [example for example in examples(source, seed=seed) if isinstance(example, Preference)]


def read_passages(source: Source) -> list[Passage]:
    """All examples() of a source of the form text."""
    return [example for example in examples(source) if isinstance(example, Passage)]


def read_prompts(prompts: Prompts) -> list[Conversation]:
    """The turns before an answer of every row of a file of prompts, or every row's fault at once."""

    def build(row: Row, where: str) -> Conversation:
        system = ({"role": "system", "content": fill_text(prompts.system, row)},) if prompts.system else ()
        return Conversation((*system, {"role": "user", "content": _filled(prompts.prompt, row)}), where)

    return list(rows_of(prompts.path, build, Faults()))


def _filled(column: str, row: Row) -> str:
    text = fill(column, row)
    if not text.strip():
        raise RowFault(f"'{column}' is empty: there is nothing to answer", "fill or remove the row")
    return text


def _conversation(source: Source, row: Row, where: str) -> Conversation:
    tools = checked_tools(row.get(source.tools), source.tools) if source.messages else ()
    return Conversation(_messages(source, row), where, tools, source.learn)


PROMPTED = "prompt from a template"


def prompted(source: Source, row: Row, seed: int) -> Row:
    """The row, with the prompt that a template drawn for it gives, where the source has templates."""
    if source.templates is None:
        return row
    scope = row | ({"prompt": fill(source.prompt, row)} if source.prompt else {})
    templates: tuple[str, ...] | None = source.templates if isinstance(source.templates, tuple) else None
    if isinstance(source.templates, Library):
        scope |= {name: fill_text(value, row) for name, value in source.templates.values.items()}
        templates = LIBRARY[source.templates.library]
    assert templates is not None
    return row | {PROMPTED: fill_text(draw(templates, row, seed), scope)}


def _passage(source: Source, row: Row, where: str) -> Passage:
    assert source.text is not None
    return Passage(non_empty(source.text, row), where)


def _messages(source: Source, row: Row) -> Messages:
    if source.messages is not None:
        return turns_of(as_messages(row.get(source.messages)), source.messages, row)
    assert source.completion is not None
    return (*_prompt_turns(source, row), {"role": "assistant", "content": non_empty(source.completion, row)})


def turns_of(given: Any, column: str, row: Row) -> Messages:
    return check_order(checked_turns(given, column, ", ".join(row)))


def _prompt_turns(source: Source, row: Row) -> Messages:
    if source.prompt is None and source.templates is None:
        return ()
    filled = fill_text(source.system, row) if source.system else ""
    system = ({"role": "system", "content": filled},) if filled.strip() else ()
    if source.templates is not None:
        return (*system, {"role": "user", "content": row[PROMPTED]})
    assert source.prompt is not None
    turns = as_messages(row.get(source.prompt))
    return (*system, *turns) if is_turns(turns) else (*system, {"role": "user", "content": fill(source.prompt, row)})


def _preference(source: Source, row: Row, where: str) -> Preference:
    chosen, rejected = (_answered(source, row, column) for column in (source.chosen, source.rejected))
    if chosen == rejected:
        raise RowFault("the chosen and the rejected answer are the same: the pair teaches nothing", "remove the row")
    if chosen[:-1] != rejected[:-1]:
        raise RowFault("the turns before the chosen and the rejected answer differ", "give both the same ones")
    return Preference(*(Conversation(messages, where, learn="last") for messages in (chosen, rejected)))


def _answered(source: Source, row: Row, column: str | None) -> Messages:
    """The prompt with one of its answers: a text, or turns, which may hold the prompt themselves."""
    assert column is not None
    if not isinstance(row.get(column), list | dict):
        if source.prompt is None:
            raise RowFault(f"'{column}' is no list of turns, and there is no prompt", "set prompt to a column")
        return (*_prompt_turns(source, row), {"role": "assistant", "content": non_empty(column, row)})
    turns = as_messages(row[column])
    whole = turns if not isinstance(turns, list) or len(turns) > 1 else [*_prompt_turns(source, row), *turns]
    return turns_of(whole, column, row)


def non_empty(column: str, row: Row) -> str:
    text = fill(column, row)
    if not text.strip():
        raise RowFault(f"'{column}' is empty: there is no target token to learn or score", "fill or remove the row")
    return text
