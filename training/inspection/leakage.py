"""What the rows that a run learns from give away of its suites, and whether that stops the run.

overlap.py says what is compared. The answer is computed once for the same files and settings, and cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.data.locations import hash_data
from training.errors import Problem, raise_all
from training.inspection.overlap import Found, find_overlap
from training.inspection.samples import Sample, read_samples, read_suite
from training.section import Source
from training.spec import RunSpec
from training.strategy import Replay
from training.workspace import Workspace, read_json, write_json

MAX_SHOWN = 5
# Raised when the same files come to give another answer.
_VERSION = 2

Role = Literal["target", "retention"]
Rows = Literal["train", "replay"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Leak(_Record):
    """An item of a suite that stands in a row: the share of its 8-grams there, and whether its answer is learned."""

    item: str
    row: str
    share: float
    with_answer: bool


class SuiteLeaks(_Record):
    """What the training rows, or the rows to replay, hold of one suite."""

    suite: str
    role: Role
    rows: Rows
    num_items: int
    leaks: tuple[Leak, ...]

    @property
    def leaked(self) -> tuple[Leak, ...]:
        """The items that are given away: those found together with their answers."""
        return tuple(leak for leak in self.leaks if leak.with_answer)

    @property
    def share(self) -> float:
        """Of the suite's items, how many are given away."""
        return len(self.leaked) / self.num_items if self.num_items else 0.0


def find_leaks(spec: RunSpec, workspace: Workspace) -> list[SuiteLeaks]:
    """Every suite against the training rows and, where they are given, against the rows to replay.

    Rows that the base writes itself are not looked at: it has not seen the suites.

    Raises:
        TenureError: a file has faults.
    """
    path = workspace.cache / "leakage" / f"{_content_key(spec)}.json"
    if not path.is_file():
        write_json(path, [leaks.model_dump(mode="json") for leaks in _compare(spec)])
    return [SuiteLeaks.model_validate(raw) for raw in read_json(path)]


def check_leakage(spec: RunSpec, workspace: Workspace) -> list[str]:
    """What is worth telling about overlaps that stop nothing, one sentence each.

    Raises:
        TenureError: the training rows hold more of a suite, or the rows to replay more of a target suite, than
            data.max_overlap, and data.allow_overlap does not name the suite.
    """
    found = find_leaks(spec, workspace)
    raise_all(_problem(leaks, spec) for leaks in found if stops(leaks, spec))
    return [describe(leaks) for leaks in found if leaks.leaked]


def stops(leaks: SuiteLeaks, spec: RunSpec) -> bool:
    """Whether a run may not start because of it.

    A retention suite may share rows with what is replayed: to go over what must be kept is what replay is for.
    """
    meant = leaks.suite in spec.data.allow_overlap or (leaks.rows == "replay" and leaks.role == "retention")
    return not meant and leaks.share > spec.data.max_overlap


def describe(leaks: SuiteLeaks) -> str:
    """How much of a suite is given away, in words."""
    where = "the training rows" if leaks.rows == "train" else "the rows to replay"
    count, share = len(leaks.leaked), leaks.share
    text = f"{count:,} of {leaks.num_items:,} items ({share:.1%}) of the suite '{leaks.suite}' stand in {where}"
    return text if leaks.rows == "train" else f"{text}: its score says less about what was not replayed"


def _problem(leaks: SuiteLeaks, spec: RunSpec) -> Problem:
    pairs = [f"{leak.item} is in {leak.row} ({leak.share:.0%})" for leak in leaks.leaked[:MAX_SHOWN]]
    more = len(leaks.leaked) - len(pairs)
    lines = "".join(f"\n    {line}" for line in [*pairs, *([f"and {more:,} more"] if more else [])])
    where = "the training rows" if leaks.rows == "train" else "the rows to replay"
    what = f"{len(leaks.leaked):,} of {leaks.num_items:,} items ({leaks.share:.1%}) stand in {where} with their answers"
    what = f"{what}, and data.max_overlap is {spec.data.max_overlap:.1%}:{lines}"
    instead = f"take them out of one of the two (tenure data lists all), or set data.allow_overlap: [{leaks.suite}]"
    return Problem(what, f"suite '{leaks.suite}'", instead)


def _compare(spec: RunSpec) -> list[SuiteLeaks]:
    suites = {suite.name: list(read_suite(suite)) for suite in spec.suites.all}
    replay = spec.protection(Replay)
    parts: list[tuple[Rows, Sequence[Source]]] = [("train", spec.data.train), ("replay", replay.data if replay else ())]
    return [leaks for rows, sources in parts if sources for leaks in _leaks_of(spec, rows, sources, suites)]


def _leaks_of(
    spec: RunSpec, rows: Rows, sources: Iterable[Source], suites: dict[str, list[Sample]]
) -> list[SuiteLeaks]:
    found = find_overlap(suites, chain.from_iterable(map(read_samples, sources)))
    targets = {suite.name for suite in spec.suites.target}
    return [
        SuiteLeaks(
            suite=name,
            role="target" if name in targets else "retention",
            rows=rows,
            num_items=len(items),
            leaks=tuple(map(_leak, found[name])),
        )
        for name, items in suites.items()
    ]


def _leak(found: Found) -> Leak:
    return Leak(item=found.item.where, row=found.row, share=round(found.share, 4), with_answer=found.with_answer)


def _content_key(spec: RunSpec) -> str:
    """A hash of all that decides the answer: the files, and how their rows are read."""
    replay = spec.protection(Replay)
    sources = [*spec.data.train, *(replay.data if replay else ())]
    parts = {
        "version": _VERSION,
        "files": [hash_data(part.path) for part in (*sources, *spec.suites.all)],
        "train": [source.model_dump(mode="json") for source in spec.data.train],
        "replay": [source.model_dump(mode="json") for source in (replay.data if replay else ())],
        "suites": spec.suites.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
