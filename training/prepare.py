"""Reads, checks and encodes everything that a run is fed, before any worker starts; the result is cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from training.encoding import (
    Encoded,
    encode_all,
    encode_passages,
    encode_preferences,
    load_tokenizer,
    wants_chat,
)
from training.errors import Problem, TenureError, fail
from training.models import hash_file
from training.plan import DataCounts
from training.rows import read_conversations, read_items, read_passages, read_preferences
from training.section import Source
from training.spec import RunSpec
from training.suites import encode_item
from training.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when the same files and settings come to give other token ids.
_ENCODING_VERSION = 3


@dataclass(frozen=True)
class Prepared:
    """Encoded training examples and validation items of every suite, and how many rows were overlong.

    Of preference data `train` holds the chosen answers, and `rejected` the others in the same order; else that is
    empty.
    """

    train: tuple[Encoded, ...]
    validation: dict[str, tuple[Encoded, ...]]
    num_overlong: int
    rejected: tuple[Encoded, ...] = ()

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """Every row that a model reads in training: an example's index is its place here."""
        return self.train + self.rejected

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every training example, of both answers for a pair."""
        return tuple(sum(len(row.ids) for row in self.rows_of(index)) for index in range(len(self.train)))

    def rows_of(self, index: int) -> tuple[Encoded, ...]:
        """The rows of an example: one, or the chosen and the rejected."""
        return (self.train[index], self.rejected[index]) if self.rejected else (self.train[index],)

    def num_targets(self, index: int) -> int:
        """Target tokens of an example, of both answers for a pair."""
        return sum(row.num_targets for row in self.rows_of(index))

    def counts(self) -> DataCounts:
        """How many examples and tokens there are, and how long the longest row is."""
        return DataCounts(
            num_examples=len(self.train),
            num_tokens=sum(self.lengths),
            num_target_tokens=sum(self.num_targets(index) for index in range(len(self.train))),
            longest=max(len(row.ids) for row in self.sequences),
            num_overlong=self.num_overlong,
        )


def prepare(spec: RunSpec, workspace: Workspace) -> Path:
    """The cached file with everything encoded; made when it is not there.

    Raises:
        TenureError: with the faults of every file at once.
    """
    key = _content_key(spec)
    path = workspace.cache / "tokens" / f"{key}.json"
    if not path.is_file():
        write_json(path, _to_json(_encode(spec)))
    return path


def load_prepared(path: Path) -> Prepared:
    """What prepare() wrote."""
    raw = read_json(path)
    return Prepared(
        train=tuple(_from_json(example) for example in raw["train"]),
        validation={name: tuple(_from_json(item) for item in items) for name, items in raw["validation"].items()},
        num_overlong=raw["num_overlong"],
        rejected=tuple(_from_json(example) for example in raw["rejected"]),
    )


def _encode(spec: RunSpec) -> Prepared:
    tokenizer = load_tokenizer(Path(spec.model))
    problems: list[Problem] = []
    train: list[Encoded] = []
    rejected: list[Encoded] = []
    validation: dict[str, tuple[Encoded, ...]] = {}
    num_overlong = 0
    for source in spec.data.train:
        try:
            encoded = encode_source(tokenizer, source, spec.training.max_length, spec.data.overlong)
            train += encoded.examples
            rejected += encoded.rejected
            num_overlong += encoded.num_overlong
        except TenureError as error:
            problems += error.problems
    for suite in spec.suites.all:
        try:
            items = read_items(suite)[: spec.training.validation_items]
            encoded_items = [encode_item(suite, item, tokenizer, spec.training.max_length) for item in items]
            if encoded_items:
                validation[suite.name] = tuple(encoded_items)
        except TenureError as error:
            problems += error.problems
    if problems:
        raise TenureError(dict.fromkeys(problems))
    if not train:
        raise fail("no example is left to train on", "data", "raise training.max_length, or give shorter rows")
    return Prepared(tuple(train), validation, num_overlong, tuple(rejected))


@dataclass(frozen=True)
class EncodedSource:
    """The examples of one source, and of preference data the rejected answers in the same order."""

    examples: list[Encoded]
    num_overlong: int
    rejected: Sequence[Encoded] = ()


def encode_source(tokenizer: PreTrainedTokenizerBase, source: Source, max_length: int, overlong: str) -> EncodedSource:
    """All rows of a source, whatever its form; of text, num_overlong counts those that were cut into pieces.

    Raises:
        TenureError: every row's fault at once.
    """
    if source.form == "text":
        return EncodedSource(*encode_passages(tokenizer, read_passages(source), max_length))
    chat = wants_chat(True if source.messages else source.chat, tokenizer, str(source.path))
    if source.form == "preference":
        pairs = read_preferences(source)
        chosen, rejected, num_overlong = encode_preferences(tokenizer, pairs, chat, max_length, overlong)
        return EncodedSource(chosen, num_overlong, rejected)
    return EncodedSource(*encode_all(tokenizer, read_conversations(source), chat, max_length, overlong))


def _content_key(spec: RunSpec) -> str:
    """A hash of all that decides the token ids: files, columns, tokenizer and template, lengths."""
    model = Path(spec.model)
    deciding = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "vocab.json")
    files = [model / name for name in deciding if (model / name).is_file()]
    files += [source.path for source in (*spec.data.train, *spec.suites.all)]
    parts = {
        "encoding": _ENCODING_VERSION,
        "files": [hash_file(file) for file in files],
        "data": spec.data.model_dump(mode="json"),
        "suites": spec.suites.model_dump(mode="json"),
        "max_length": spec.training.max_length,
        "validation_items": spec.training.validation_items,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _to_json(prepared: Prepared) -> dict[str, object]:
    def pack(example: Encoded) -> list[list[int]]:
        return [list(example.ids), [int(wanted) for wanted in example.is_target]]

    return {
        "train": [pack(example) for example in prepared.train],
        "rejected": [pack(example) for example in prepared.rejected],
        "validation": {name: [pack(item) for item in items] for name, items in prepared.validation.items()},
        "num_overlong": prepared.num_overlong,
    }


def _from_json(raw: list[list[int]]) -> Encoded:
    return Encoded(tuple(raw[0]), tuple(bool(wanted) for wanted in raw[1]))
