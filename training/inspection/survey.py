"""Reads a run's data once and says what is in it: `tenure data` without Ray and without the model's weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.encoding import Encoded, load_tokenizer, preview
from training.data.items import read_items
from training.data.rows import Faults, examples, place_of
from training.errors import Problem, TenureError, raise_all
from training.evaluation.suites import encode_item
from training.inspection.duplicates import Duplicates, DuplicateSearch, Pair
from training.inspection.figures import DataReport, Finding, Hit, Level, Part, PartRole, Piece, PreviewRow
from training.inspection.labels import LabelCounts, is_unbalanced
from training.inspection.languages import LanguageSample, load_identifier
from training.inspection.leakage import SuiteLeaks, describe, find_leaks, stops
from training.inspection.oddities import TEXTS, find_oddities
from training.inspection.private import find_private, mask_private
from training.inspection.samples import Sample, sample_of, sample_of_item
from training.inspection.tokens import RowEncoder, TokenCounts
from training.section import Source
from training.spec import RunSpec
from training.strategy import Replay
from training.suite_spec import FileSuite
from training.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_HITS = 10
_PREVIEWED = 3
_EXCERPT_CHARACTERS = 160
_PREVIEW_CHARACTERS = 1500
_NO_LIMIT = 10**9
_NOTES = ("very short",)
# A row this many times as long as the median one, and at least this long, is told.
_FAR_LONGER, _FAR_LONGER_TOKENS = 20, 512

Row = tuple[Sample, tuple[Encoded, ...]]


@dataclass
class _Scan:
    """What is counted of one part while its rows go by."""

    name: str
    role: PartRole
    path: Path
    form: str
    tokens: TokenCounts = field(default_factory=TokenCounts)
    labels: LabelCounts = field(default_factory=LabelCounts)
    languages: LanguageSample = field(default_factory=LanguageSample)
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, list[Hit]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    preview: list[PreviewRow] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)

    def add(self, sample: Sample, rows: tuple[Encoded, ...], special: list[str]) -> None:
        """Look at one row."""
        self.tokens.add(rows)
        self.places.append(sample.where)
        self.languages.add(f"{sample.prompt}\n{sample.answer}")
        if self.form != "text":
            self.labels.add(sample.answer)
        kinds = set(find_oddities(sample, self.form != "text", special))
        kinds.update(kind for kind, _ in find_private(f"{sample.system}\n{sample.text}"))
        for kind in kinds:
            self.count(kind, sample)

    def count(self, kind: str, sample: Sample) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        hits = self.hits.setdefault(kind, [])
        if len(hits) < MAX_HITS:
            hits.append(Hit(where=sample.where, excerpt=excerpt(sample)))


def survey(spec: RunSpec, path: Path, workspace: Workspace) -> DataReport:
    """Everything about the data of a spec.

    Raises:
        TenureError: with the faults of every file at once.
    """
    start = time.monotonic()
    tokenizer = load_tokenizer(Path(spec.model))
    special = [token for token in tokenizer.all_special_tokens if len(token) > 2]
    search, scans, problems = DuplicateSearch(MAX_HITS), [], list[Problem]()
    for scan, rows in _parts(spec, tokenizer):
        learned = scan.role in ("train", "replay")
        try:
            for sample, encoded in rows:
                scan.add(sample, encoded, special)
                if learned:
                    search.add(scan.name, sample)
                if len(scan.preview) < _PREVIEWED:
                    scan.preview.append(_preview_of(sample, encoded, tokenizer))
        except TenureError as error:
            problems += error.problems
        scans.append(scan)
    raise_all(dict.fromkeys(problems))
    leaks = find_leaks(spec, workspace)
    duplicates, identifier = search.found(), load_identifier()
    parts = tuple(_finish(scan, spec, duplicates, identifier) for scan in scans)
    return DataReport(
        spec=str(path),
        name=spec.name,
        model=spec.model,
        max_length=spec.training.max_length,
        overlong=spec.data.overlong,
        max_overlap=spec.data.max_overlap,
        parts=parts,
        leaks=tuple(leaks),
        findings=(*_leak_findings(leaks, spec), *_duplicate_findings(duplicates), *_label_findings(parts)),
        seconds=round(time.monotonic() - start, 2),
    )


def excerpt(sample: Sample, limit: int = _EXCERPT_CHARACTERS) -> str:
    """The start of a row's prompt and answer on one line, with nothing in it that is private."""
    shown = [" ".join(mask_private(part[: 4 * limit]).split()) for part in (sample.prompt, sample.answer) if part]
    return " → ".join(part if len(part) <= limit else f"{part[:limit]}…" for part in shown)


def _parts(spec: RunSpec, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[_Scan, Iterator[Row]]]:
    """Every source and suite with its rows, read as they are asked for."""
    replay = spec.protection(Replay)
    given: list[tuple[PartRole, tuple[Source, ...]]] = [("train", spec.data.train)]
    given += [("replay", replay.data)] if replay else []
    for role, sources in given:
        for number, source in enumerate(sources, start=1):
            name = role if len(sources) == 1 else f"{role} {number}"
            faults = Faults(drop=source.faulty == "drop")
            scan = _Scan(name, role, Path(source.path), source.form, faults=faults)
            yield scan, _rows_of(source, tokenizer, faults)
    for suite in spec.suites.all:
        role = "target" if suite in spec.suites.target else "retention"
        form = "text" if suite.metric == "cross_entropy" and suite.text is not None else suite.metric
        yield _Scan(suite.name, role, Path(suite.path), form), _items_of(suite, tokenizer)


def _rows_of(source: Source, tokenizer: PreTrainedTokenizerBase, faults: Faults) -> Iterator[Row]:
    """Every row with what it becomes; the faults of rows that cannot be encoded come after the last one, together."""
    encoder = RowEncoder(tokenizer, source)
    for example in examples(source, faults):
        row = faults.tried(place_of(example), lambda one: (sample_of(one), encoder.encode(one)), example)
        if row:
            yield row
    faults.close()


def _items_of(suite: FileSuite, tokenizer: PreTrainedTokenizerBase) -> Iterator[Row]:
    for item in read_items(suite):
        yield sample_of_item(item), (encode_item(suite, item, tokenizer, _NO_LIMIT),)


def _preview_of(sample: Sample, rows: tuple[Encoded, ...], tokenizer: PreTrainedTokenizerBase) -> PreviewRow:
    """A row as the model sees it (of a pair the chosen one), clipped and masked."""
    pieces, left = [], _PREVIEW_CHARACTERS
    for text, is_target in preview(tokenizer, rows[0]):
        if left > 0:
            shown = mask_private(text[: 4 * _PREVIEW_CHARACTERS])
            pieces.append(Piece(text=shown if len(shown) <= left else f"{shown[:left]}…", is_target=is_target))
            left -= len(shown)
    return PreviewRow(where=sample.where, pieces=tuple(pieces))


def _finish(scan: _Scan, spec: RunSpec, duplicates: Duplicates, identifier: object) -> Part:
    lengths = scan.tokens.summary()
    return Part(
        name=scan.name,
        role=scan.role,
        path=str(scan.path),
        form=scan.form,
        num_rows=len(scan.tokens.lengths),
        num_tokens=scan.tokens.num_tokens,
        num_target_tokens=scan.tokens.num_targets,
        num_overlong=scan.tokens.num_longer(spec.training.max_length),
        num_repeated=duplicates.num_repeated[scan.name],
        num_near=duplicates.num_near[scan.name],
        lengths=lengths,
        labels=scan.labels.found(),
        languages=scan.languages.found(identifier),
        findings=(
            *_dropped_findings(scan),
            *_row_findings(scan),
            *_length_findings(scan, spec),
            *_balance_findings(scan),
        ),
        preview=tuple(scan.preview),
    )


def _row_findings(scan: _Scan) -> Iterator[Finding]:
    for kind, count in sorted(scan.counts.items()):
        level: Level = "note" if kind in _NOTES else "look"
        text = TEXTS.get(kind, f"{'an' if kind[0] in 'aeAI' else 'a'} {kind} stands in the row")
        yield Finding(kind=kind, level=level, text=text, count=count, hits=tuple(scan.hits[kind]))


def _dropped_findings(scan: _Scan) -> Iterator[Finding]:
    if scan.faults.count:
        hits = tuple(Hit(where=one.where, excerpt=mask_private(one.what)) for one in scan.faults.first[:MAX_HITS])
        text = "cannot be read or encoded: dropped"
        yield Finding(kind="dropped", level="look", text=text, count=scan.faults.count, hits=hits)


def _length_findings(scan: _Scan, spec: RunSpec) -> Iterator[Finding]:
    longest = spec.training.max_length
    places = [(scan.places[i], length) for i, length in enumerate(scan.tokens.lengths) if length > longest]
    if places and scan.role in ("train", "replay"):
        what = "cut into pieces" if scan.form == "text" else _OVERLONG[spec.data.overlong]
        text = f"more than max_length {longest:,} tokens: {what}"
        level: Level = "stop" if scan.form != "text" and spec.data.overlong == "refuse" else "note"
        yield Finding(kind="overlong", level=level, text=text, count=len(places), hits=_of_lengths(places))
    summary = scan.tokens.summary()
    if summary is not None:
        bound = max(_FAR_LONGER * summary.median, _FAR_LONGER_TOKENS)
        far = [(scan.places[i], length) for i, length in enumerate(scan.tokens.lengths) if length > bound]
        if far:
            text = f"more than {_FAR_LONGER} times as long as the median row"
            yield Finding(kind="far longer", level="note", text=text, count=len(far), hits=_of_lengths(far))


_OVERLONG = {"refuse": "the run is refused", "drop": "dropped", "truncate": "cut at the end"}


def _of_lengths(places: list[tuple[str, int]]) -> tuple[Hit, ...]:
    longest = sorted(places, key=lambda place: -place[1])[:MAX_HITS]
    return tuple(Hit(where=where, excerpt=f"{length:,} tokens") for where, length in longest)


def _balance_findings(scan: _Scan) -> Iterator[Finding]:
    labels = scan.labels.found()
    if is_unbalanced(labels):
        most, total = labels[0], sum(label.count for label in labels)
        text = f"the answers are unbalanced: {most.name!r} stands for {most.count / total:.0%} of {total:,}"
        yield Finding(kind="label balance", level="look", text=mask_private(text), count=total)


def _label_findings(parts: tuple[Part, ...]) -> Iterator[Finding]:
    """Labels of a target suite that no training row teaches."""
    taught = {label.name for part in parts if part.role == "train" for label in part.labels}
    for part in parts:
        missing = [label for label in part.labels if label.name not in taught]
        if taught and part.role == "target" and missing:
            names = ", ".join(repr(label.name) for label in missing)
            text = f"answers of the suite '{part.name}' that no training row has: {names}"
            count = sum(label.count for label in missing)
            yield Finding(kind="labels not taught", level="look", text=mask_private(text), count=count)


def _leak_findings(leaks: list[SuiteLeaks], spec: RunSpec) -> Iterator[Finding]:
    for found in leaks:
        other = sum(not leak.with_answer for leak in found.leaks)
        if found.leaked:
            level: Level = "stop" if stops(found, spec) else "look"
            hits = tuple(
                Hit(where=leak.item, other=leak.row, excerpt=f"{leak.share:.0%}") for leak in found.leaked[:MAX_HITS]
            )
            yield Finding(kind="overlap", level=level, text=describe(found), count=len(found.leaked), hits=hits)
        if other:
            where = "the training rows" if found.rows == "train" else "the rows to replay"
            text = f"items of the suite '{found.suite}' stand in {where} without their answers being learned"
            yield Finding(kind="known question", level="note", text=text, count=other)


def _duplicate_findings(found: Duplicates) -> Iterator[Finding]:
    kinds: list[tuple[str, int, str, list[Pair], Level]] = [
        (
            "repeated",
            found.num_repeated.total(),
            "rows that repeat an earlier one word for word",
            found.repeated,
            "look",
        ),
        ("near duplicate", found.num_near.total(), "rows that nearly repeat an earlier one", found.near, "look"),
        (
            "disagreeing",
            found.num_disagreeing,
            "prompts that were answered otherwise before",
            found.disagreeing,
            "note",
        ),
    ]
    for kind, count, text, pairs, level in kinds:
        if count:
            hits = tuple(Hit(where=pair.row, other=pair.earlier, excerpt=_likeness(pair)) for pair in pairs)
            yield Finding(kind=kind, level=level, text=text, count=count, hits=hits)


def _likeness(pair: Pair) -> str:
    return f"{pair.similarity:.0%} alike" if 0 < pair.similarity < 1 else ""
