"""The data report as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from training.inspection.figures import DataReport, Finding, Hit, Part, Share
from training.inspection.languages import SAMPLED
from training.reporting.html import Chart, environment
from training.reporting.plots import COLOURS, draw_histogram

SIGNS = {"stop": "✗ refused", "look": "! look", "note": "· note"}
_MAX_LEAKS = 200
# Languages of fewer rows of a sample than this share are told together.
_MIN_LANGUAGE_SHARE = 0.02


@dataclass(frozen=True)
class Totals:
    """What a run learns from, replayed rows included."""

    rows: int
    tokens: int
    targets: int
    overlong: int
    repeated: int
    near: int


def render_page(report: DataReport) -> str:
    """The page. Whatever rows hold is escaped."""
    pages = environment()
    pages.filters["place"] = short_place
    pages.filters["told"] = hit_text
    return pages.get_template("data.html.j2").render(
        report=report,
        verdict=verdict_of(report),
        learned=totals_of(report),
        stopping=of_level(report, "stop"),
        looking=of_level(report, "look"),
        findings=report.all_findings,
        signs=SIGNS,
        charts=[_chart(number, part, report) for number, part in enumerate(report.parts) if part.lengths],
        labelled=[part for part in report.parts if part.labels],
        languages=[(part.name, languages_of(part), part.languages.sampled) for part in report.parts if part.num_rows],
        sampled=SAMPLED,
        max_leaks=_MAX_LEAKS,
        colours=COLOURS,
    )


def verdict_of(report: DataReport) -> str:
    """The page's first line."""
    count = len(of_level(report, "look"))
    if of_level(report, "stop"):
        return "A run of this spec is refused"
    return f"{count} thing{'' if count == 1 else 's'} to look at" if count else "Nothing to look at"


def of_level(report: DataReport, level: str) -> list[tuple[str, Finding]]:
    """The findings of a level, each with its part."""
    return [(name, finding) for name, finding in report.all_findings if finding.level == level]


def totals_of(report: DataReport) -> Totals:
    """All sources together."""
    parts = [part for part in report.parts if part.role in ("train", "replay")]
    return Totals(
        rows=sum(part.num_rows for part in parts),
        tokens=sum(part.num_tokens for part in parts),
        targets=sum(part.num_target_tokens for part in parts),
        overlong=sum(part.num_overlong for part in parts),
        repeated=sum(part.num_repeated for part in parts),
        near=sum(part.num_near for part in parts),
    )


def languages_of(part: Part) -> list[Share]:
    """The languages of a part's sample, rare ones together, and what could not be told."""
    least = _MIN_LANGUAGE_SHARE * part.languages.sampled
    common = [share for share in part.languages.found if share.count >= least]
    others = sum(share.count for share in part.languages.found) - sum(share.count for share in common)
    rest = [Share(name="others", count=others), Share(name="too short or unclear", count=part.languages.unclear)]
    return [*common, *(share for share in rest if share.count)]


def short_place(where: str) -> str:
    """A row's place with the file's name alone; paths stand once, in the table of sources."""
    path, row, number = where.rpartition(" row ")
    return f"{Path(path).name}{row}{number}" if row else where


def hit_text(hit: Hit) -> str:
    """A row's place, the place of the row it repeats or stands in, and what is told of it."""
    places = " and ".join(short_place(place) for place in (hit.where, hit.other) if place)
    return f"{places}: {hit.excerpt}" if hit.excerpt else places


def _chart(number: int, part: Part, report: DataReport) -> Chart:
    assert part.lengths is not None
    lengths = part.lengths
    title = f"Lengths of {part.name}"
    svg = draw_histogram(f"lengths-{number}", lengths.edges, lengths.counts, title, report.max_length)
    note = f"{part.num_rows:,} rows, {lengths.least:,} to {lengths.most:,} tokens, mean {lengths.mean:,.1f}"
    return Chart(part.name, Markup(svg), note)
