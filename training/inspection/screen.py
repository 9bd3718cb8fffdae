"""The data report in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from training.inspection.figures import DataReport, Finding, Part, PreviewRow
from training.inspection.page import SIGNS, hit_text, of_level, short_place, totals_of, verdict_of
from training.reporting.formatting import printable

_STYLES = {"stop": "bold yellow", "look": "bold cyan", "note": "dim"}
_MAX_HITS = 3


def print_report(console: Console, report: DataReport) -> None:
    """Print the verdict, what to look at with the first rows, and the table of sources and suites."""
    stopped, looked = of_level(report, "stop"), of_level(report, "look")
    sign, style = ("✗", "bold yellow") if stopped else (("!", "bold cyan") if looked else ("✓", "bold cyan"))
    console.print(_plain(f"{sign} {verdict_of(report)}: data of {report.name}", style))
    learned = totals_of(report)
    told = f"{learned.rows:,} rows to learn from, {learned.tokens:,} tokens, {learned.targets:,} carry loss"
    console.print(Padding(_plain(told), (0, 0, 0, 2)))
    for name, finding in report.all_findings:
        _print_finding(console, name, finding)
    console.print(Padding(_part_table(report), (1, 0)))
    console.print(_overlap_table(report))
    for part in report.parts:
        if part.role == "train" and part.preview:
            _print_preview(console, part, part.preview[0])


def _print_finding(console: Console, name: str, finding: Finding) -> None:
    of = f"{name}: " if name else ""
    rows = "row" if finding.count == 1 else "rows"
    head = Text.assemble(
        _plain(f"{SIGNS[finding.level]:<10}", _STYLES[finding.level]),
        _plain(f"{of}{finding.text} "),
        _plain(f"({finding.count:,} {rows})", "dim"),
    )
    console.print(head)
    for hit in finding.hits[:_MAX_HITS]:
        console.print(Padding(_plain(hit_text(hit), "dim"), (0, 0, 0, 10)))


def _part_table(report: DataReport) -> Table:
    over = f"over\n{report.max_length:,}>"
    figures = ("rows>", "tokens>", "loss>", "median>", "longest>", over, "repeated\nnearly>")
    table = _table("part", "role", *figures, "language")
    for part in report.parts:
        compared = part.role in ("train", "replay")
        table.add_row(
            _plain(part.name),
            part.role,
            f"{part.num_rows:,}",
            f"{part.num_tokens:,}",
            f"{part.num_target_tokens / part.num_tokens:.0%}" if part.num_tokens else "–",
            f"{part.lengths.median:,.0f}" if part.lengths else "–",
            f"{part.lengths.most:,}" if part.lengths else "–",
            f"{part.num_overlong:,}",
            f"{part.num_repeated:,}\n{part.num_near:,}" if compared else "–",
            _plain(_main_language(part)),
        )
    learned = totals_of(report)
    copies = f"{learned.repeated:,}\n{learned.near:,}"
    share = f"{learned.targets / learned.tokens:.0%}" if learned.tokens else "–"
    total = (f"{learned.rows:,}", f"{learned.tokens:,}", share, "", "", f"{learned.overlong:,}", copies, "")
    table.add_row("learned from", "", *total, style="bold")
    return table


def _main_language(part: Part) -> str:
    """The commonest language and its share of the texts whose language can be told."""
    found = part.languages.found
    return f"{found[0].name} {found[0].count / sum(share.count for share in found):.0%}" if found else "–"


def _overlap_table(report: DataReport) -> Table:
    table = _table("suite", "against", "items>", "given away>", "without answer>")
    for leaks in report.leaks:
        given = len(leaks.leaked)
        against = "training rows" if leaks.rows == "train" else "rows to replay"
        known = f"{len(leaks.leaks) - given:,}"
        table.add_row(_plain(leaks.suite), against, f"{leaks.num_items:,}", f"{given:,} ({leaks.share:.1%})", known)
    return table


def _print_preview(console: Console, part: Part, row: PreviewRow) -> None:
    console.print()
    console.print(_plain(f"{part.name}, {short_place(row.where)}, as the model sees it; [brackets] carry loss:", "dim"))
    text = Text()
    for piece in row.pieces:
        shown = f"[{piece.text}]" if piece.is_target else piece.text
        text.append(_plain(shown, "bold green" if piece.is_target else "dim"))
    console.print(text, soft_wrap=True)


def _table(*headings: str) -> Table:
    """An empty table; a heading with '>' stands over figures, set right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading.replace(">", ""), justify="right" if ">" in heading else "left", overflow="fold")
    return table


def _plain(body: str, style: str = "") -> Text:
    """Text of rows, shown as it is: no markup, and nothing that steers the terminal."""
    return Text(printable(body), style)
