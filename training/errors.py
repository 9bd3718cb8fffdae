"""Faults that a user can mend, told in one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault: what is wrong, where it stands, and what to set instead."""

    what: str
    where: str = ""
    instead: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n    -> {self.instead}" if self.instead else text


class TenureError(Exception):
    """Every fault found in one pass; the command line prints it and exits with status 2."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[TenureError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class OutOfMemory(TenureError):
    """A worker's memory did not suffice; a smaller micro-batch may."""


class StorageFault(TenureError):
    """Storage failed in a way that passes, for longer than a worker waits."""


class WorkerLost(TenureError):
    """A worker, or its node, ended without saying what a user could mend."""


class Left(TenureError):
    """The run wrote a checkpoint and left, as it was asked to."""


def fail(what: str, where: str = "", instead: str = "") -> TenureError:
    """A TenureError of one problem, to be raised by the caller."""
    return TenureError(Problem(what, where, instead))


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise one TenureError with all of them, or return when there are none."""
    found = tuple(problems)
    if found:
        raise TenureError(found)
