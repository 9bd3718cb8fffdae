"""What a row is, and what can be wrong with one."""

from __future__ import annotations

from typing import Any

from training.errors import Problem

Row = dict[str, Any]
MAX_ROW_BYTES = 32 * 2**20


class RowFault(Exception):
    """What is wrong with one row, and what to do; the reader adds file and row."""

    def __init__(self, what: str, instead: str = "") -> None:
        super().__init__(what)
        self.what, self.instead = what, instead

    def at(self, where: str) -> Problem:
        """The fault with its place."""
        return Problem(self.what, where, self.instead)


class LastFault(RowFault):
    """A fault after which the file cannot be read on: it is refused even where faulty rows are dropped."""


Read = Row | RowFault


def too_long() -> LastFault:
    """A row without an end in sight."""
    what = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB"
    return LastFault(what, "is each row on a line of its own? cut such a text into several rows")
