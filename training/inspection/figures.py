"""What `tenure data` finds: the same figures on screen, in the HTML page and in the JSON file.

Every excerpt of a row in here is clipped, and its secrets and personal data are masked.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from training.inspection.leakage import SuiteLeaks

PartRole = Literal["train", "replay", "target", "retention"]
Level = Literal["stop", "look", "note"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Record):
    """Tokens of the rows: order statistics, and counts between the edges of a histogram (one fewer than edges)."""

    least: int
    median: float
    mean: float
    p95: float
    most: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Hit(_Record):
    """One row that a finding is about, and the row that it repeats or stands in, if that is what was found."""

    where: str
    excerpt: str = ""
    other: str = ""


class Finding(_Record):
    """Something about a part of the data that a person should know: how many rows, and the first of them."""

    kind: str
    level: Level
    text: str
    count: int
    hits: tuple[Hit, ...] = ()


class Share(_Record):
    """A label or a language with the number of rows that have it."""

    name: str
    count: int


class Languages(_Record):
    """Languages (ISO 639-1) of a sample of rows; texts too short or unclear to tell are counted apart."""

    sampled: int
    unclear: int
    found: tuple[Share, ...]


class Piece(_Record):
    """A stretch of a row as the model sees it, and whether it carries loss."""

    text: str
    is_target: bool


class PreviewRow(_Record):
    """One row as the model sees it."""

    where: str
    pieces: tuple[Piece, ...]


class Part(_Record):
    """One source of rows, or one suite."""

    name: str
    role: PartRole
    path: str
    form: str
    num_rows: int
    num_tokens: int
    num_target_tokens: int
    num_overlong: int
    num_repeated: int
    num_near: int
    lengths: Lengths | None
    labels: tuple[Share, ...]
    languages: Languages
    findings: tuple[Finding, ...]
    preview: tuple[PreviewRow, ...]


class DataReport(_Record):
    """All of it. `num_` figures of `train` and `replay` parts are of what a run learns from."""

    spec: str
    name: str
    model: str
    max_length: int
    overlong: str
    max_overlap: float
    parts: tuple[Part, ...]
    leaks: tuple[SuiteLeaks, ...]
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def all_findings(self) -> tuple[tuple[str, Finding], ...]:
        """Every finding with the part that it is about, what stops a run first, then by how many rows."""
        everywhere = [("", finding) for finding in self.findings]
        everywhere += [(part.name, finding) for part in self.parts for finding in part.findings]
        order = {"stop": 0, "look": 1, "note": 2}
        return tuple(sorted(everywhere, key=lambda pair: (order[pair[1].level], -pair[1].count)))
