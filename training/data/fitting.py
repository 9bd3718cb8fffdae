"""What is wrong with encoded rows as a whole: counted chunk by chunk, told once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from training.errors import Problem, TenureError

# What is wrong with a row, and what to do.
FAULTS = {
    "empty": (
        "no target token is left to learn",
        "fill the completion, raise training.max_length, or set data.untaught: drop",
    ),
    "alike": (
        "the chosen and the rejected answer are the same tokens: the pair teaches nothing",
        "remove the row, or raise training.max_length",
    ),
    "bare": ("the text has no tokens", "remove the row"),
}


def fault_of(fault: str, where: str, count: int = 1) -> Problem:
    """One of FAULTS, in the row where it first stands."""
    what, instead = FAULTS[fault]
    return Problem(what + (f" ({count} rows like this)" if count > 1 else ""), where, instead)


@dataclass
class Tally:
    """Rows that are longer than they may be, and rows with a fault: how many, and where the first one stands."""

    num_longer: int = 0
    longest: int = 0
    first_longer: str = ""
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)

    def longer(self, places: Sequence[str], longest: int) -> None:
        """Count rows that are longer than max_length."""
        self.first_longer = self.first_longer or next(iter(places), "")
        self.num_longer += len(places)
        self.longest = max(self.longest, longest)

    def faulty(self, fault: str, places: Sequence[str]) -> None:
        """Count rows with one of FAULTS."""
        if places:
            count, first = self.faults.get(fault, (0, places[0]))
            self.faults[fault] = (count + len(places), first)

    def add(self, other: Tally) -> None:
        """Count what was counted for the rows that follow."""
        self.first_longer = self.first_longer or other.first_longer
        self.num_longer += other.num_longer
        self.longest = max(self.longest, other.longest)
        for fault, (count, first) in other.faults.items():
            before, place = self.faults.get(fault, (0, first))
            self.faults[fault] = (before + count, place)

    def refuse(self, max_length: int, overlong: str) -> None:
        """Raise what was counted.

        Raises:
            TenureError: rows are longer and overlong is "refuse", or rows have a fault.
        """
        if self.num_longer and overlong == "refuse":
            rows = f"{self.num_longer} rows are longer than max_length {max_length}"
            instead = f"set training.max_length: {self.longest}, or data.overlong: drop (or truncate)"
            raise TenureError(Problem(f"{rows} (the longest has {self.longest} tokens)", self.first_longer, instead))
        found = [fault_of(fault, first, count) for fault, (count, first) in self.faults.items()]
        if found:
            raise TenureError(found)
