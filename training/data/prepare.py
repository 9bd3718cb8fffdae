"""Reads, checks and encodes everything that a run is fed, before any worker starts; the result is cached by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.data.encoding import Encoded, load_tokenizer
from training.data.items import read_items
from training.data.locations import Location, hash_data
from training.data.rows import Faults
from training.data.store import (
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
from training.data.tokenise import encoded_chunks
from training.errors import Problem, TenureError, fail
from training.evaluation.suites import encode_item
from training.objective.generate import longest_row, read_written
from training.plan import DataCounts, SourceCounts
from training.section import Source
from training.spec import RunSpec
from training.strategy import Generate, Replay
from training.suite_spec import has_answer
from training.workspace import Workspace, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when the same files and settings come to give other token ids.
_ENCODING_VERSION = 8
# What a folder tells beside its rows: the files of validation items by suite, counts, examples and faults by source.
TOLD = ("validation", "num_overlong", "longest_to_come", "num_untaught", "sizes", "faulty")
# What of a source decides how rows are mixed, and not their token ids.
_MIXING = {"name", "weight", "cap", "repeats"}


class Faulty(NamedTuple):
    """Rows of a source that were dropped, and what was wrong with the first of them."""

    num_rows: int
    first: tuple[Problem, ...]


@dataclass(frozen=True)
class Prepared:
    """Encoded training examples, rows to replay, validation items of every suite, and how many rows were overlong.

    Of preference data `train` holds the chosen answers, and `rejected` the others in the same order; else that is
    empty. `longest_to_come` bounds the tokens of the replay rows that the base writes (0 when it writes none);
    `num_untaught` rows were dropped because they had no target token.
    `sizes` says how many of the training examples each source gave, in the spec's order; `faulty` which rows were
    dropped of it, and then of every source of rows to replay, because they could not be read or encoded.
    Rows are read from disk as they are asked for; their lengths and numbers of targets need no look at the tokens.
    """

    train: Sequence[Encoded]
    validation: dict[str, Sequence[Encoded]]
    num_overlong: int
    rejected: Sequence[Encoded] = ()
    replay: Sequence[Encoded] = ()
    longest_to_come: int = 0
    num_untaught: int = 0
    sizes: tuple[int, ...] = ()
    faulty: tuple[Faulty, ...] = ()

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
        ends = accumulate(self.sizes)
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
            num_faulty=sum(source.num_rows for source in self.faulty),
            sources=tuple(self._count(end - size, end) for size, end in zip(self.sizes, ends, strict=True)),
        )

    def _count(self, start: int, end: int) -> SourceCounts:
        counted = (numbers[start:end].sum(dtype="int64") for numbers in (self.lengths, self.target_counts))
        return SourceCounts(end - start, *map(int, counted))


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
            _encode(spec, written, folder)
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
        sizes=tuple(told["sizes"]),
        faulty=tuple(Faulty(count, tuple(Problem(*one) for one in first)) for count, first in told["faulty"]),
    )


def _encode(spec: RunSpec, written: Path | None, folder: Path) -> None:
    """Everything of a run encoded into a folder, chunk by chunk."""
    tokenizer = load_tokenizer(Path(spec.model))
    problems: list[Problem] = []
    to_write, longest_to_come = _to_write(spec), 0
    with (
        _writer(folder, "train") as train,
        _writer(folder, "rejected") as rejected,
        _writer(folder, "replay") as replay,
    ):
        given = _encode_sources(spec, spec.data.train, tokenizer, problems, train, rejected)
        replayed = _encode_sources(spec, _replay_sources(spec), tokenizer, problems, replay, rejected)
        if to_write:
            with _gathered(problems):
                longest_to_come = longest_row(to_write, tokenizer, spec.training.max_length, spec.data.overlong)
        validation = _encode_validation(spec, tokenizer, problems, folder)
        if problems:
            raise TenureError(dict.fromkeys(problems))
        if written:
            replay.write_rows(read_written(written, tokenizer, longest_to_come))
    if not train.num_rows:
        raise fail("no example is left to train on", "data", "raise training.max_length, or give shorter rows")
    if _replay_sources(spec) and not replay.num_rows:
        raise fail("no row is left to replay", "protections", "raise training.max_length, or give shorter rows")
    sources = (*given, *replayed)
    lost = (sum(source.num_overlong for source in sources), sum(source.num_untaught for source in sources))
    faulty = [(source.faults.count, [astuple(one) for one in source.faults.first[:_FAULTS_TOLD]]) for source in sources]
    told = (validation, lost[0], longest_to_come, lost[1], [source.num_examples for source in given], faulty)
    write_meta(folder, dict(zip(TOLD, told, strict=True)))


_FAULTS_TOLD = 5


def _writer(folder: Path, name: str) -> RowWriter:
    return RowWriter(folder / f"{name}.arrow")


class EncodedSource(NamedTuple):
    """How many examples a source gave, and how many of its rows were overlong, had no target, or were faulty."""

    num_examples: int
    num_overlong: int
    num_untaught: int
    faults: Faults


def _encode_sources(
    spec: RunSpec,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    rows: RowWriter,
    rejected: RowWriter,
) -> list[EncodedSource]:
    """The rows of all sources, one after the other; faults go to `problems`."""
    found: list[EncodedSource] = []
    asked = (spec.model, spec.training.max_length, spec.data.overlong, spec.data.untaught, spec.training.seed)
    for source in sources:
        before, num_overlong, num_untaught = rows.num_rows, 0, 0
        faults = Faults(drop=source.faulty == "drop")
        with _gathered(problems):
            for chunk in encoded_chunks(tokenizer, source, *asked, faults):
                rows.write(chunk.rows)
                rejected.write(chunk.rejected)
                num_overlong += chunk.num_overlong
                num_untaught += chunk.num_untaught
        found.append(EncodedSource(rows.num_rows - before, num_overlong, num_untaught, faults))
    return found


def _encode_validation(
    spec: RunSpec, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], folder: Path
) -> dict[str, str]:
    """The file of every suite's validation items, by the suite's name."""
    files: dict[str, str] = {}
    for suite in spec.suites.all:
        with _gathered(problems):
            items = read_items(suite)[: spec.training.validation_items if has_answer(suite) else 0]
            encoded = [encode_item(suite, item, tokenizer, spec.training.max_length) for item in items]
            if encoded:
                files[suite.name] = f"validation-{len(files)}.arrow"
                with RowWriter(folder / files[suite.name]) as writer:
                    writer.write_rows(encoded)
    return files


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
        "data": spec.data.model_dump(mode="json", exclude={"mixture", "train"}),
        "train": [source.model_dump(mode="json", exclude=_MIXING) for source in spec.data.train],
        "replay": replay.model_dump(mode="json", exclude={"share"}) if replay else None,
        "suites": spec.suites.model_dump(mode="json"),
        "seed": spec.training.seed if any(one.templates for one in sources) else None,
        "max_length": spec.training.max_length,
        "validation_items": spec.training.validation_items,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
