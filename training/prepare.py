"""Reads, checks and encodes everything that a run is fed, before any worker starts; the result is cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from training.encoding import (
    Encoded,
    Untaught,
    encode_all,
    encode_passages,
    encode_preferences,
    load_tokenizer,
    wants_chat,
)
from training.errors import Problem, TenureError, fail
from training.generate import longest_row, read_written
from training.items import read_items
from training.locations import Location, hash_data
from training.plan import DataCounts
from training.rows import read_conversations, read_passages, read_preferences
from training.section import Source
from training.spec import RunSpec
from training.store import (
    META,
    JoinedRows,
    Numbers,
    RowWriter,
    StoredRows,
    lengths_of,
    publishing,
    targets_of,
    why_unusable,
    write_meta,
)
from training.strategy import Generate, Replay
from training.suite_spec import has_answer
from training.suites import encode_item
from training.workspace import Workspace, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when the same files and settings come to give other token ids.
_ENCODING_VERSION = 5
# What a folder tells beside its rows: the files of validation items by suite, and counts.
TOLD = ("validation", "num_overlong", "longest_to_come", "num_untaught")


@dataclass(frozen=True)
class Prepared:
    """Encoded training examples, rows to replay, validation items of every suite, and how many rows were overlong.

    Of preference data `train` holds the chosen answers, and `rejected` the others in the same order; else that is
    empty. `longest_to_come` bounds the tokens of the replay rows that the base writes (0 when it writes none);
    `num_untaught` rows were dropped because they had no target token.
    Rows are read from disk as they are asked for; their lengths and numbers of targets need no look at the tokens.
    """

    train: Sequence[Encoded]
    validation: dict[str, Sequence[Encoded]]
    num_overlong: int
    rejected: Sequence[Encoded] = ()
    replay: Sequence[Encoded] = ()
    longest_to_come: int = 0
    num_untaught: int = 0

    @cached_property
    def examples(self) -> Sequence[Encoded]:
        """All that batches are made of: the training examples, then the rows to replay."""
        return JoinedRows(self.train, self.replay)

    @cached_property
    def sequences(self) -> Sequence[Encoded]:
        """Every row that a model reads in training: an example's index is its place here. Pairs are never replayed."""
        return JoinedRows(self.train, self.rejected, self.replay)

    @cached_property
    def lengths(self) -> Numbers:
        """Tokens (examples,) of every one of `examples`, of both answers for a pair."""
        return self._of_examples(lengths_of)

    @cached_property
    def target_counts(self) -> Numbers:
        """Target tokens (examples,) of every one of `examples`, of both answers for a pair."""
        return self._of_examples(targets_of)

    def _of_examples(self, count: Callable[[Sequence[Encoded]], Numbers]) -> Numbers:
        return count(self.train) + count(self.rejected) if len(self.rejected) else count(self.examples)

    def num_targets(self, index: int) -> int:
        """Target tokens of an example, of both answers for a pair."""
        return int(self.target_counts[index])

    def counts(self) -> DataCounts:
        """How many examples and tokens there are, and how long the longest row is."""
        return DataCounts(
            num_examples=len(self.train),
            num_tokens=int(self.lengths[: len(self.train)].sum(dtype="int64")),
            num_target_tokens=int(self.target_counts[: len(self.train)].sum(dtype="int64")),
            longest=max(self.longest_to_come, int(lengths_of(self.sequences).max())),
            num_overlong=self.num_overlong,
            lengths=self.lengths,
            num_replay=len(self.replay),
            num_replay_target_tokens=int(targets_of(self.replay).sum(dtype="int64")),
            num_untaught=self.num_untaught,
        )


def prepare(spec: RunSpec, workspace: Workspace, written: Path | None = None) -> Path:
    """The cached folder with everything encoded; made when it is not there, or is not whole.

    Args:
        written: the rows that the base wrote to be replayed, where the spec asks for such and they are there.

    Raises:
        TenureError: with the faults of every file at once, or the disk is full.
    """
    target = workspace.cache / "tokens" / _content_key(spec, written)
    reason = why_unusable(target) if target.exists() else "new"
    if reason:
        if reason != "new":
            print(f"the encoded data in {target} are made again: {reason}", flush=True)
        with publishing(target) as folder:
            _write(folder, _encode(spec, written))
    return target


def load_prepared(path: Path) -> Prepared:
    """What prepare() wrote.

    Raises:
        TenureError: it is not there, or not whole.
    """
    reason = why_unusable(path)
    if reason:
        raise fail(f"the encoded data cannot be read: {reason}", str(path), "run tenure check, which makes them again")
    told = read_json(path / META)
    return Prepared(
        train=StoredRows(path / "train.arrow"),
        validation={name: StoredRows(path / file) for name, file in told["validation"].items()},
        num_overlong=told["num_overlong"],
        rejected=StoredRows(path / "rejected.arrow"),
        replay=StoredRows(path / "replay.arrow"),
        longest_to_come=told["longest_to_come"],
        num_untaught=told["num_untaught"],
    )


def _write(folder: Path, prepared: Prepared) -> None:
    validation = {name: f"validation-{number}.arrow" for number, name in enumerate(prepared.validation)}
    files = {"train.arrow": prepared.train, "rejected.arrow": prepared.rejected, "replay.arrow": prepared.replay}
    for file, rows in (files | {validation[name]: rows for name, rows in prepared.validation.items()}).items():
        with RowWriter(folder / file) as writer:
            writer.write_rows(rows)
    told = (validation, prepared.num_overlong, prepared.longest_to_come, prepared.num_untaught)
    write_meta(folder, dict(zip(TOLD, told, strict=True)))


def _encode(spec: RunSpec, written: Path | None) -> Prepared:
    tokenizer = load_tokenizer(Path(spec.model))
    problems: list[Problem] = []
    train = _encode_sources(spec, spec.data.train, tokenizer, problems)
    replayed = _encode_sources(spec, _replay_sources(spec), tokenizer, problems)
    replay, to_write, longest_to_come = replayed.examples, _to_write(spec), 0
    if to_write:
        with _gathered(problems):
            longest_to_come = longest_row(to_write, tokenizer, spec.training.max_length, spec.data.overlong)
    validation: dict[str, Sequence[Encoded]] = {}
    for suite in spec.suites.all:
        with _gathered(problems):
            items = read_items(suite)[: spec.training.validation_items if has_answer(suite) else 0]
            encoded_items = [encode_item(suite, item, tokenizer, spec.training.max_length) for item in items]
            if encoded_items:
                validation[suite.name] = tuple(encoded_items)
    if problems:
        raise TenureError(dict.fromkeys(problems))
    if written:
        replay = read_written(written, tokenizer, longest_to_come)
    if not train.examples:
        raise fail("no example is left to train on", "data", "raise training.max_length, or give shorter rows")
    if _replay_sources(spec) and not replay:
        raise fail("no row is left to replay", "protections", "raise training.max_length, or give shorter rows")
    return Prepared(
        train=tuple(train.examples),
        validation=validation,
        num_overlong=train.num_overlong + replayed.num_overlong,
        rejected=tuple(train.rejected),
        replay=tuple(replay),
        longest_to_come=longest_to_come,
        num_untaught=train.num_untaught + replayed.num_untaught,
    )


@dataclass(frozen=True)
class EncodedSource:
    """The examples of one source, and of preference data the rejected answers in the same order."""

    examples: list[Encoded]
    num_overlong: int
    rejected: Sequence[Encoded] = ()
    num_untaught: int = 0


def encode_source(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    max_length: int,
    overlong: str,
    untaught: str = "refuse",
    seed: int = 0,
) -> EncodedSource:
    """All rows of a source, whatever its form; of text, num_overlong counts those that were cut into pieces.

    Raises:
        TenureError: every row's fault at once.
    """
    if source.form == "text":
        return EncodedSource(*encode_passages(tokenizer, read_passages(source), max_length))
    chat = wants_chat(True if source.messages else source.chat, tokenizer, str(source.path))
    lost = Untaught(drop=untaught == "drop")
    if source.form == "preference":
        pairs = read_preferences(source, seed)
        chosen, rejected, num_overlong = encode_preferences(tokenizer, pairs, chat, max_length, overlong, lost)
        return EncodedSource(chosen, num_overlong, rejected, lost.count)
    examples, num_overlong = encode_all(tokenizer, read_conversations(source, seed), chat, max_length, overlong, lost)
    return EncodedSource(examples, num_overlong, (), lost.count)


@contextmanager
def _gathered(problems: list[Problem]) -> Iterator[None]:
    """Keep the faults of one file, so that those of the others are found too."""
    try:
        yield
    except TenureError as error:
        problems += error.problems


def _replay_sources(spec: RunSpec) -> tuple[Source, ...]:
    replay = spec.protection(Replay)
    return replay.data if replay else ()


def _to_write(spec: RunSpec) -> Generate | None:
    replay = spec.protection(Replay)
    return replay.generate if replay else None


def _encode_sources(
    spec: RunSpec, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> EncodedSource:
    """The rows of all sources as of one; faults go to `problems`."""
    encoded: list[EncodedSource] = []
    for source in sources:
        with _gathered(problems):
            asked = (spec.training.max_length, spec.data.overlong, spec.data.untaught, spec.training.seed)
            encoded.append(encode_source(tokenizer, source, *asked))
    return EncodedSource(
        examples=[row for one in encoded for row in one.examples],
        num_overlong=sum(one.num_overlong for one in encoded),
        rejected=[row for one in encoded for row in one.rejected],
        num_untaught=sum(one.num_untaught for one in encoded),
    )


# Tokens, template, and the tokens at which serving stops.
_DECIDING = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json"),
    *("chat_template.jinja", "generation_config.json", "config.json"),
)


def _content_key(spec: RunSpec, written: Path | None) -> str:
    """A hash of all that decides the token ids: files, columns, tokenizer and template, lengths."""
    model = Path(spec.model)
    files: list[Location] = [model / name for name in _DECIDING if (model / name).is_file()]
    files += sorted(model.glob("additional_chat_templates/*.jinja"))
    files += [source.path for source in (*spec.data.train, *spec.suites.all)]
    replay = spec.protection(Replay)
    files += replay.files if replay else ()
    files += [written] if written else []
    sources = (*spec.data.train, *_replay_sources(spec))
    parts = {
        "encoding": _ENCODING_VERSION,
        "files": [hash_data(file) for file in files],
        "data": spec.data.model_dump(mode="json"),
        "replay": replay.model_dump(mode="json", exclude={"share"}) if replay else None,
        "suites": spec.suites.model_dump(mode="json"),
        "seed": spec.training.seed if any(one.templates for one in sources) else None,
        "max_length": spec.training.max_length,
        "validation_items": spec.training.validation_items,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
