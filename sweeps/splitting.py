"""Validation and test halves of suites: the winner is chosen on the one, and told how good it is by the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from sweeps.spec import Split
from training.data.items import read_items
from training.data.locations import hash_data
from training.data.readers import open_rows
from training.data.row import Row, RowFault
from training.errors import fail
from training.spec import Suites
from training.suite_spec import FileSuite, Harness
from training.workspace import Workspace, write_text


def split_suites(suites: Suites, split: Split, workspace: Workspace) -> tuple[Suites, Suites, list[str]]:
    """Suites of the validation and of the test items, and what a user should know.

    An item belongs to one half by the hash of its row and the seed, so equal rows are never on both sides. The rows are
    written as JSONL files of the workspace's cache. A task of lm-evaluation-harness is not split.

    Raises:
        TenureError: a suite has no item on one side.
    """
    notes = [
        f"suite '{s.name}' is a task of the harness, and not split" for s in suites.every if isinstance(s, Harness)
    ]
    halves = {suite.name: _halves(suite, split, workspace) for suite in suites.all}
    return (
        _with(suites, {name: half[0] for name, half in halves.items()}),
        _with(suites, {name: half[1] for name, half in halves.items()}),
        notes,
    )


def _with(suites: Suites, paths: dict[str, Path]) -> Suites:
    def placed(suite: object) -> object:
        path = paths.get(getattr(suite, "name", ""))
        return suite.model_copy(update={"path": path, "limit": None}) if path else suite  # type: ignore[attr-defined]

    target, retention = (tuple(map(placed, group)) for group in (suites.target, suites.retention))
    changes = {"target": target, "retention": retention, "presets": (), "inherit": False}
    return suites.model_copy(update=changes)


def _halves(suite: FileSuite, split: Split, workspace: Workspace) -> tuple[Path, Path]:
    read_items(suite)  # every row's fault at once
    key = json.dumps([hash_data(suite.path), suite.limit, split.model_dump()], sort_keys=True)
    folder = workspace.cache / "splits" / hashlib.sha256(key.encode()).hexdigest()[:32]
    paths = folder / "validation.jsonl", folder / "test.jsonl"
    if not all(path.is_file() for path in paths):
        rows = list(islice(_rows(suite), suite.limit))
        for is_test, path in enumerate(paths):
            own = [row for row in rows if _is_test(row, split) == bool(is_test)]
            if not own:
                what = f"suite '{suite.name}' has {len(rows)} items, and none for {path.stem}"
                raise fail(what, str(suite.path), "give more items, another split.test_share, or suites under test")
            write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in own))
    return paths


def _rows(suite: FileSuite) -> Iterable[Row]:
    for _, row in open_rows(suite.path):
        if not isinstance(row, RowFault):
            yield row


def _is_test(row: Row, split: Split) -> bool:
    text = json.dumps([split.seed, row], sort_keys=True, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < split.test_share * 2**64
