"""Reads, checks and encodes everything that a run is fed, before any worker starts; the result is cached by content."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from training.encoding import Encoded, encode_all, load_tokenizer, wants_chat
from training.errors import Problem, TenureError, fail
from training.models import hash_file
from training.plan import DataCounts
from training.rows import read_conversations, read_items
from training.spec import RunSpec
from training.suites import encode_item
from training.workspace import Workspace, read_json, write_json

# Raised when the same files and settings come to give other token ids.
_ENCODING_VERSION = 2


@dataclass(frozen=True)
class Prepared:
    """Encoded training examples and validation items of every suite, and how many rows were overlong."""

    train: tuple[Encoded, ...]
    validation: dict[str, tuple[Encoded, ...]]
    num_overlong: int

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every training example."""
        return tuple(len(example.ids) for example in self.train)

    def counts(self) -> DataCounts:
        """How many examples and tokens there are, and how long the longest example is."""
        return DataCounts(
            num_examples=len(self.train),
            num_tokens=sum(self.lengths),
            num_target_tokens=sum(example.num_targets for example in self.train),
            longest=max(self.lengths),
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
    )


def _encode(spec: RunSpec) -> Prepared:
    tokenizer = load_tokenizer(Path(spec.model))
    problems: list[Problem] = []
    train: list[Encoded] = []
    validation: dict[str, tuple[Encoded, ...]] = {}
    num_overlong = 0
    for source in spec.data.train:
        try:
            chat = wants_chat(True if source.messages else source.chat, tokenizer, str(source.path))
            examples = read_conversations(source)
            encoded, longer = encode_all(tokenizer, examples, chat, spec.training.max_length, spec.data.overlong)
            train += encoded
            num_overlong += longer
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
    return Prepared(tuple(train), validation, num_overlong)


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
        "validation": {name: [pack(item) for item in items] for name, items in prepared.validation.items()},
        "num_overlong": prepared.num_overlong,
    }


def _from_json(raw: list[list[int]]) -> Encoded:
    return Encoded(tuple(raw[0]), tuple(bool(wanted) for wanted in raw[1]))
