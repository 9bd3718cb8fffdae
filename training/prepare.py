"""Reads, checks and encodes everything that a run is fed, before any worker starts; the result is cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from training.encoding import Encoded, encode_all, load_tokenizer, wants_chat
from training.errors import Problem, TenureError, fail
from training.generate import longest_row, read_written
from training.models import hash_file
from training.plan import DataCounts
from training.rows import read_conversations, read_items
from training.section import Source
from training.spec import RunSpec
from training.strategy import Generate, Replay
from training.suites import encode_item
from training.workspace import Workspace, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when the same files and settings come to give other token ids.
_ENCODING_VERSION = 3


@dataclass(frozen=True)
class Prepared:
    """Encoded training examples, rows to replay, validation items of every suite, and how many rows were overlong.

    `longest_to_come` bounds the tokens of the replay rows that the base has yet to write (0 when there are none).
    """

    train: tuple[Encoded, ...]
    validation: dict[str, tuple[Encoded, ...]]
    num_overlong: int
    replay: tuple[Encoded, ...] = ()
    longest_to_come: int = 0

    @cached_property
    def examples(self) -> tuple[Encoded, ...]:
        """All that batches are made of: the training examples, then the rows to replay."""
        return self.train + self.replay

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every one of `examples`."""
        return tuple(len(example.ids) for example in self.examples)

    def counts(self) -> DataCounts:
        """How many examples and tokens there are, and how long the longest example is."""
        return DataCounts(
            num_examples=len(self.train),
            num_tokens=sum(self.lengths[: len(self.train)]),
            num_target_tokens=sum(example.num_targets for example in self.train),
            longest=max(*self.lengths, self.longest_to_come),
            num_overlong=self.num_overlong,
            num_replay=len(self.replay),
            num_replay_target_tokens=sum(example.num_targets for example in self.replay),
        )


def prepare(spec: RunSpec, workspace: Workspace, written: Path | None = None) -> Path:
    """The cached file with everything encoded; made when it is not there.

    Args:
        written: the rows that the base wrote to be replayed, where the spec asks for such and they are there.

    Raises:
        TenureError: with the faults of every file at once.
    """
    key = _content_key(spec, written)
    path = workspace.cache / "tokens" / f"{key}.json"
    if not path.is_file():
        write_json(path, _to_json(_encode(spec, written)))
    return path


def load_prepared(path: Path) -> Prepared:
    """What prepare() wrote."""
    raw = read_json(path)
    return Prepared(
        train=tuple(_from_json(example) for example in raw["train"]),
        validation={name: tuple(_from_json(item) for item in items) for name, items in raw["validation"].items()},
        num_overlong=raw["num_overlong"],
        replay=tuple(_from_json(example) for example in raw["replay"]),
        longest_to_come=raw["longest_to_come"],
    )


def _encode(spec: RunSpec, written: Path | None) -> Prepared:
    tokenizer = load_tokenizer(Path(spec.model))
    problems: list[Problem] = []
    train, num_overlong = _encode_sources(spec, spec.data.train, tokenizer, problems)
    replay, longer = _encode_sources(spec, _replay_sources(spec), tokenizer, problems)
    to_write = _to_write(spec)
    longest_to_come = 0
    if to_write:
        with _gathered(problems):
            longest_to_come = longest_row(to_write, tokenizer, spec.training.max_length, spec.data.overlong)
    validation: dict[str, tuple[Encoded, ...]] = {}
    for suite in spec.suites.all:
        with _gathered(problems):
            items = read_items(suite)[: spec.training.validation_items]
            encoded_items = [encode_item(suite, item, tokenizer, spec.training.max_length) for item in items]
            if encoded_items:
                validation[suite.name] = tuple(encoded_items)
    if problems:
        raise TenureError(dict.fromkeys(problems))
    if written:
        replay = read_written(written, tokenizer, longest_to_come)
    if not train:
        raise fail("no example is left to train on", "data", "raise training.max_length, or give shorter rows")
    if _replay_sources(spec) and not replay:
        raise fail("no row is left to replay", "protections", "raise training.max_length, or give shorter rows")
    return Prepared(tuple(train), validation, num_overlong + longer, tuple(replay), longest_to_come)


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
) -> tuple[list[Encoded], int]:
    """The rows of all sources, and how many were overlong; faults go to `problems`."""
    encoded: list[Encoded] = []
    num_overlong = 0
    for source in sources:
        with _gathered(problems):
            rows, longer = encode_source(tokenizer, source, spec.training.max_length, spec.data.overlong)
            encoded += rows
            num_overlong += longer
    return encoded, num_overlong


def encode_source(
    tokenizer: PreTrainedTokenizerBase, source: Source, max_length: int, overlong: str
) -> tuple[list[Encoded], int]:
    """All rows of a source, and how many were longer than max_length.

    Raises:
        TenureError: every row's fault at once.
    """
    chat = wants_chat(True if source.messages else source.chat, tokenizer, str(source.path))
    return encode_all(tokenizer, read_conversations(source), chat, max_length, overlong)


def _content_key(spec: RunSpec, written: Path | None) -> str:
    """A hash of all that decides the token ids: files, columns, tokenizer and template, lengths."""
    model = Path(spec.model)
    deciding = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "vocab.json")
    files = [model / name for name in deciding if (model / name).is_file()]
    files += [source.path for source in (*spec.data.train, *spec.suites.all)]
    replay = spec.protection(Replay)
    files += replay.files if replay else ()
    files += [written] if written else []
    parts = {
        "encoding": _ENCODING_VERSION,
        "files": [hash_file(file) for file in files],
        "data": spec.data.model_dump(mode="json"),
        "replay": replay.model_dump(mode="json", exclude={"share"}) if replay else None,
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
        "replay": [pack(example) for example in prepared.replay],
        "longest_to_come": prepared.longest_to_come,
    }


def _from_json(raw: list[list[int]]) -> Encoded:
    return Encoded(tuple(raw[0]), tuple(bool(wanted) for wanted in raw[1]))
