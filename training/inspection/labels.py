"""Whether answers are few distinct short ones, and how evenly they are spread."""

from __future__ import annotations

from collections import Counter

from training.inspection.figures import Share

MAX_LABELS = 20
_LONGEST = 60
_MIN_ROWS = 20
_MAX_SHARE = 0.9
_MAX_RATIO = 10


class LabelCounts:
    """Counts answers until they turn out to be too many or too long to be labels."""

    def __init__(self) -> None:
        self._counts: Counter[str] | None = Counter()

    def add(self, answer: str) -> None:
        """A row's answer."""
        if self._counts is None:
            return
        self._counts[answer.strip()] += 1
        if len(self._counts) > MAX_LABELS or len(answer) > _LONGEST:
            self._counts = None

    def found(self) -> tuple[Share, ...]:
        """The labels, the commonest first; none where the answers are no labels."""
        if self._counts is None or self._counts.total() < max(_MIN_ROWS, 5 * len(self._counts)):
            return ()
        return tuple(Share(name=name, count=count) for name, count in self._counts.most_common())


def is_unbalanced(labels: tuple[Share, ...]) -> bool:
    """One label stands for nine rows in ten, or is ten times as common as another."""
    if not labels:
        return False
    total, most, least = sum(label.count for label in labels), labels[0].count, labels[-1].count
    return most >= _MAX_SHARE * total or most >= _MAX_RATIO * least
