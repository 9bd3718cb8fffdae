"""Reports: what they say, that they escape it, and that the page holds together in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from rich.console import Console

from training.errors import TenureError
from training.evaluation.scorecard import DataSummary, Item, Scorecard, SuitePart, SuiteScore, Verdict
from training.reporting.curves import cost_rows, read_metrics
from training.reporting.formatting import change_text, pick_examples, printable, threshold_text
from training.reporting.html import MAX_ITEMS_PER_SUITE
from training.reporting.plots import Line, draw_curves, points_per_mean
from training.reporting.report import print_comparison, print_scorecard, render_html, write_report
from training.workspace import RunFolder, write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def asdiv_item(index: int, base_right: bool, tuned_right: bool) -> Item:
    apples, eaten = 12 + index, 5
    right = str(apples - eaten)
    return Item(
        index=index,
        prompt=f"Seth bought {apples} apples and ate {eaten} of them. How many apples are left?",
        expected=right,
        base_answer=right if base_right else f"Seth bought {apples} apples, so he has {apples} apples left.",
        tuned_answer=right if tuned_right else str(apples),
        base_score=float(base_right),
        tuned_score=float(tuned_right),
    )


def asdiv(num_items: int = 40) -> SuiteScore:
    """10 % right before, 60 % after; every tenth item is lost."""
    items = tuple(asdiv_item(i, base_right=i % 10 == 0, tuned_right=1 <= i % 10 <= 6) for i in range(num_items))
    return SuiteScore(
        name="asdiv", role="target", metric="exact_match", higher_is_better=True, unit="share", base=0.1, tuned=0.6,
        change=0.5, interval=(0.35, 0.65), threshold=0.05, kept=True, items=items,
    )  # fmt: skip


def boolq(kept: bool = True) -> SuiteScore:
    change = -0.01 if kept else -0.085
    items = tuple(
        Item(
            index=i, prompt=f"Is passage {i} about rivers?", expected="yes", base_answer="yes",
            tuned_answer="no" if i % 12 == 0 else "yes", base_score=1.0, tuned_score=float(i % 12 != 0),
        )
        for i in range(24)
    )  # fmt: skip
    return SuiteScore(
        name="boolq", role="retention", metric="accuracy", higher_is_better=True, unit="share", base=0.585,
        tuned=0.585 + change, change=change, interval=(change - 0.03, change + 0.03), threshold=0.02, kept=kept,
        items=items,
    )  # fmt: skip


def prose() -> SuiteScore:
    items = tuple(
        Item(
            index=i, prompt=f"Paragraph {i} of a story about the sea.", expected="", base_answer="", tuned_answer="",
            base_score=0.9 + 0.01 * i, tuned_score=0.9 + 0.012 * i, weight=120.0,
        )
        for i in range(12)
    )  # fmt: skip
    return SuiteScore(
        name="prose", role="retention", metric="cross_entropy", higher_is_better=False, unit="nats per byte",
        base=0.955, tuned=0.966, change=-0.011, interval=(-0.015, -0.007), threshold=0.02, kept=True, items=items,
    )  # fmt: skip


def scorecard(*suites: SuiteScore, run: str = "asdiv-lora-1", **other: Any) -> Scorecard:
    suites = suites or (asdiv(), boolq(), prose())
    reasons = tuple(f"{suite.name} lost more than the contract allows" for suite in suites if not suite.kept)
    verdict: Literal["kept", "broken"] = "broken" if reasons else "kept"
    values: dict[str, Any] = {
        "run": run,
        "protocol": {"harness": "lm-eval 0.4.13", "decoding": "greedy", "num_fewshot": 0, "seed": 1234},
        "protocol_hash": "5d2f" * 16,
        "base_model": "smollm2-135m-instruct",
        "base_hash": "ab12" * 16,
        "artifact_hash": "cd34" * 16,
        "suites": suites,
        "contract": Verdict(verdict=verdict, min_gain=0.05, max_loss=0.02, reasons=reasons),
        "probes": {},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": 184.2,
    }
    return Scorecard(**{**values, **other})


def step_row(step: int, **other: Any) -> dict[str, Any]:
    row = {"kind": "step", "step": step, "loss": 1.2 + 2 / (step + 1), "learning_rate": 2e-4 * (1 - step / 120),
           "grad_norm": 0.4 + 1 / (step + 1), "num_target_tokens": 812, "num_tokens": 2100, "seconds": 0.9,
           "epoch": step / 60}  # fmt: skip
    return {**row, **other}


def write_metrics(path: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """The folder of a run that trained 120 steps and validated on two suites."""
    folder = RunFolder(tmp_path / "asdiv-lora-1")
    folder.path.mkdir()
    validation = [
        {"kind": "validation", "step": step, "suite": suite, "loss": loss + 1 / (step + 10)}
        for step in range(20, 121, 20)
        for suite, loss in (("asdiv", 0.6), ("boolq", 2.1))
    ]
    write_metrics(folder.metrics, [*map(step_row, range(1, 121)), *validation, {"kind": "checkpoint", "step": 20}])
    write_json(folder.plan, {"model_parameters": 134_515_008, "zero_stage": 0, "memory_per_worker_bytes": 3 * 2**30})
    write_json(
        folder.lineage,
        {"commit": "9f8e7d6", "data": [{"path": "train.jsonl", "sha256": "ee" * 32}], "packages": {"ray": "2.60.0"}},
    )
    return folder


def printed(width: int, show: Any, *arguments: Any) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False, color_system=None)
    with console.capture() as capture:
        show(console, *arguments)
    return capture.get()


def attribute_urls(page: str) -> list[str]:
    return [url for url in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page) if not url.startswith("#")]


def test_values_read_in_the_metrics_own_unit() -> None:
    assert change_text(asdiv(), 0.125) == "+12.5 pts"
    assert change_text(prose(), -0.0114) == "−0.011"
    assert change_text(asdiv(), -0.0001) == "0.0 pts"
    assert threshold_text(asdiv()) == "gain ≥ 5.0 pts"
    assert threshold_text(prose()) == "loss ≤ 0.020"


def test_examples_are_the_most_changed_answers_of_target_suites_in_turn() -> None:
    second = asdiv().model_copy(update={"name": "second"})
    examples = pick_examples(scorecard(boolq(), asdiv(), second))
    assert [(example.suite.name, example.item.index) for example in examples] == [
        ("asdiv", 0),
        ("second", 0),
        ("asdiv", 1),
    ]


def test_unchanged_answers_are_no_examples() -> None:
    assert pick_examples(scorecard(prose().model_copy(update={"role": "target"}))) == []


def test_scorecard_in_the_terminal_starts_with_the_verdict() -> None:
    out = printed(120, print_scorecard, scorecard(asdiv(), boolq(kept=False)))
    assert out.splitlines()[0] == "✗ Contract broken: run asdiv-lora-1"
    assert out.index("boolq lost more than the contract allows") < out.index("threshold")
    row = next(line for line in out.splitlines() if line.startswith("boolq "))
    assert " ".join(row.split()) == "boolq accuracy 24 58.5 % 50.0 % −8.5 pts loss ≤ 2.0 pts"
    below = out[out.index(row) + len(row) :].splitlines()[1]
    assert " ".join(below.split()) == "retention [−11.5, −5.5] ✗ broken"


@pytest.mark.parametrize("width", [80, 100])
def test_scorecard_fits_the_terminal_without_losing_figures(width: int) -> None:
    out = printed(width, print_scorecard, scorecard())
    assert max(map(len, out.splitlines())) <= width
    assert "[+35.0, +65.0]" in out
    assert "[−0.015, −0.007]" in out
    assert "loss ≤ 0.020" in out


def test_terminal_shows_an_answer_as_it_is_and_lets_it_steer_nothing() -> None:
    item = asdiv_item(0, base_right=False, tuned_right=True)
    hostile = item.model_copy(update={"base_answer": "[/red]\x1b[2J[bold]x"})
    out = printed(100, print_scorecard, scorecard(asdiv().model_copy(update={"items": (hostile,)})))
    assert "[/red]�[2J[bold]x" in out
    assert "\x1b" not in out


def test_printable_keeps_line_breaks_and_joiners() -> None:
    assert printable("می\u200cخواهم\n\tok\r\u202e") == "می\u200cخواهم\n\tok��"


def test_comparison_sets_two_runs_side_by_side() -> None:
    better = asdiv().model_copy(update={"tuned": 0.725, "change": 0.625})
    out = printed(80, print_comparison, scorecard(), scorecard(better, prose(), run="asdiv-full-1"))
    row = next(line for line in out.splitlines() if line.startswith("asdiv "))
    assert " ".join(row.split()) == "asdiv 60.0 % 72.5 % +50.0 pts +62.5 pts +12.5 pts"
    assert next(line for line in out.splitlines() if line.startswith("boolq ")).rstrip().endswith("–")


def test_comparison_counts_lower_cross_entropy_as_better() -> None:
    lower = prose().model_copy(update={"tuned": 0.956})
    out = printed(100, print_comparison, scorecard(prose()), scorecard(lower))
    assert next(line for line in out.splitlines() if line.startswith("prose ")).rstrip().endswith("+0.010")


def test_comparison_refuses_other_protocols_and_names_what_differs() -> None:
    other = scorecard(run="asdiv-lora-2", protocol_hash="0" * 64, protocol={**scorecard().protocol, "num_fewshot": 4})
    with pytest.raises(TenureError) as caught:
        printed(100, print_comparison, scorecard(), other)
    assert "num_fewshot is 0 in asdiv-lora-1 and 4 in asdiv-lora-2" in str(caught.value)
    assert "seed" not in str(caught.value)


def test_comparison_refuses_other_hashes_even_where_the_settings_agree() -> None:
    with pytest.raises(TenureError, match="the settings agree"):
        printed(100, print_comparison, scorecard(), scorecard(protocol_hash="0" * 64))


def test_report_is_written_from_the_run_folder(run: RunFolder) -> None:
    run.scorecard.write_text(scorecard().model_dump_json(), encoding="utf-8")
    path = write_report(run)
    page = path.read_text(encoding="utf-8")
    assert path == run.report
    assert [part.name for part in run.path.iterdir() if part.name.endswith(".part")] == []
    for words in ("✓ Contract kept", "134,515,008", "3.00 GiB", "9f8e7d6", "ee" * 32, "252,000", "Validation loss"):
        assert words in page
    assert page == render_html(run, scorecard())  # the same run gives the same bytes


def test_report_without_a_scorecard_is_refused(run: RunFolder) -> None:
    with pytest.raises(TenureError, match="has no scorecard"):
        write_report(run)


def test_page_needs_no_network(run: RunFolder) -> None:
    page = render_html(run, scorecard())
    assert attribute_urls(page) == []
    assert "url(http" not in page
    assert page.count("<script") == 1
    assert "default-src 'none'" in page


def test_ids_on_the_page_are_unique(run: RunFolder) -> None:
    ids = re.findall(r'\bid="([^"]+)"', render_html(run, scorecard()))
    assert ids
    assert len(ids) == len(set(ids))


def test_page_says_why_the_contract_is_broken(run: RunFolder) -> None:
    page = render_html(run, scorecard(asdiv(), boolq(kept=False)))
    assert page.index("✗ Contract broken") < page.index("boolq lost more") < page.index("<svg")


def test_page_escapes_what_users_and_models_wrote(run: RunFolder) -> None:
    attack = "<script>alert(1)</script><img src=https://evil.example/x onerror='x'>"
    item = asdiv_item(0, base_right=False, tuned_right=True).model_copy(
        update={"prompt": attack, "base_answer": "before " + attack, "tuned_answer": "after " + attack}
    )
    write_json(run.lineage, {"note": attack, attack: {"a": 1}})
    suite = asdiv().model_copy(update={"items": (item,), "name": "<b>$x$"})
    page = render_html(run, scorecard(suite, run=attack))
    assert page.count("<script") == 1  # the filter's own
    assert "<img" not in page
    assert "<b>$x$" not in page
    for side in ("before ", "after "):
        assert f"<mark>{side.strip()}</mark> &lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_page_holds_both_answers_and_lost_items_first(run: RunFolder) -> None:
    page = render_html(run, scorecard(asdiv()))
    folded = page[page.index('<details class="items">') :]
    assert "so he has 13 apples left." in folded
    assert folded.index("<h3>Lost (4)") < folded.index("<h3>Won (24)") < folded.index("<h3>Unchanged (12)")
    assert "4 lost, 24 won, 12 unchanged" in folded


def test_page_is_bounded_and_says_so(run: RunFolder) -> None:
    long = asdiv_item(1, base_right=False, tuned_right=True).model_copy(update={"base_answer": "word " * 100_000})
    suite = asdiv(1000)
    page = render_html(run, scorecard(suite.model_copy(update={"items": (suite.items[0], long, *suite.items[2:])})))
    folded = page[page.index('<details class="items">') :]
    assert folded.count('<article class="item"') == MAX_ITEMS_PER_SUITE
    assert "of 1,000. scorecard.json holds all." in page
    assert "100 lost, 600 won, 300 unchanged" in page
    assert "(500,000 characters in all)" in page
    assert len(page) < 1_000_000


def test_the_tasks_of_a_group_are_shown_by_themselves(run: RunFolder) -> None:
    sizes = {"algebra": -0.25, "anatomy": 0.1, "<virology>": -0.5}
    parts = tuple(
        SuitePart(name=n, num_items=20, base=0.6, tuned=0.6 + d, change=d, interval=(d - 0.1, d + 0.1), lost=3, won=1)
        for n, d in sizes.items()
    )
    card = scorecard(boolq().model_copy(update={"parts": parts}), asdiv())
    page = html.unescape(render_html(run, card))
    assert "its 3 tasks" in page
    for part in ("algebra", "<virology>", "−25.0 pts", "[−60.0, −40.0]"):
        assert part in page
    assert "<virology>" not in render_html(run, card)
    told = " ".join(printed(200, print_scorecard, card).split())
    assert "boolq: 3 tasks, most lost <virology> −50.0 pts [−60.0, −40.0]; algebra −25.0 pts [−35.0, −15.0]" in told
    assert "its 3 tasks" not in render_html(run, scorecard())


def test_missing_files_leave_their_sections_out(tmp_path: Path) -> None:
    page = render_html(RunFolder(tmp_path), scorecard())
    for title in (">Training<", ">Plan<", ">Lineage<"):
        assert title not in page
    assert "3 min 4 s" in page


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_plan_is_named(run: RunFolder, content: str) -> None:
    run.plan.write_text(content, encoding="utf-8")
    with pytest.raises(TenureError, match=r"plan\.json"):
        render_html(run, scorecard())


def test_later_rows_count_after_a_resume(tmp_path: Path) -> None:
    first = [step_row(step) for step in (1, 2, 3)]
    again = [{"kind": "resume", "step": 1}, step_row(2, loss=5.0), step_row(3, loss=6.0, num_tokens=4200)]
    write_metrics(tmp_path / "metrics.jsonl", first + again)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics
    assert metrics.curve("loss")[1:] == ((2, 5.0), (3, 6.0))
    rows = dict(cost_rows(metrics, scoring_seconds=1.0))
    assert rows["tokens"] == "8,400"
    assert rows["steps done again after a resume"] == "2 (1.8 s)"
    assert rows["tokens per second"] == f"{8400 / 2.7:,.0f}"


def test_what_an_objective_logs_beside_the_loss_is_drawn(run: RunFolder) -> None:
    assert "nats per target token" in html.unescape(render_html(run, scorecard()))
    write_metrics(run.metrics, [step_row(step, accuracy=0.5, margin=0.1 * step) for step in range(1, 5)])
    metrics = read_metrics(run.metrics)
    assert metrics
    assert dict(metrics.parts["margin"]) == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    page = html.unescape(render_html(run, scorecard()))
    assert "Preference margin" in page
    assert "Preference accuracy" in page
    assert "nats per pair" in page


def test_torn_lines_and_losses_that_are_not_finite_are_left_out_and_told(run: RunFolder) -> None:
    write_metrics(run.metrics, [step_row(1), step_row(2, loss=None), step_row(3)], torn='{"kind": "ste')
    page = html.unescape(render_html(run, scorecard()))
    assert "1 unreadable line of metrics.jsonl left out" in page
    assert "1 of 3 steps had no finite value" in page


def test_long_curves_are_thinned_to_means() -> None:
    points = [(step, 1.0) for step in range(1, 100_001)]
    assert points_per_mean(points) == 250
    assert len(draw_curves("loss", [Line("loss", points)], "Training loss")) < 40_000


def test_terminal_report_waits_for_no_plotting_library() -> None:
    code = (
        "import sys, training.reporting.report; print([m for m in ('matplotlib', 'torch', 'ray') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [375, 1200])
def test_page_is_no_wider_than_the_screen(run: RunFolder, tmp_path: Path, width: int) -> None:
    """A frame as wide as the screen holds the page; its title tells the width that the page takes."""
    wide = boolq(kept=False).model_copy(update={"name": "a-suite-with-a-name-as-long-as-a-spec-takes-" + "x" * 19})
    page = tmp_path / "report.html"
    page.write_text(render_html(run, scorecard(asdiv(), wide, prose())), encoding="utf-8")
    frame = tmp_path / "frame.html"
    measure = "const d = f.contentDocument; d.querySelectorAll('details').forEach(x => x.open = true);"
    measure += "document.title = d.documentElement.scrollWidth + ' ' + d.querySelectorAll('svg').length"
    attributes = f'id=f src="report.html" width={width} height=800 style="border:0" onload="{measure}"'
    frame.write_text(f"<iframe {attributes}></iframe>", encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = [*CHROMIUM_FLAGS, "--allow-file-access-from-files", profile, "--window-size=1400,900", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, frame.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[:500]
    assert int(found[1]) <= width
    assert int(found[2]) == 5


def test_the_report_says_what_was_left_out_of_the_data(run: RunFolder) -> None:
    counts = DataSummary(num_examples=1200, num_faulty=3, num_untaught=1, num_overlong=0)
    told = "Trained on 1,200 examples; 3 faulty rows and 1 rows without target tokens were left out."
    card = scorecard(boolq(), data=counts)
    assert told in printed(120, print_scorecard, card)
    assert told in render_html(run, card)
    assert "Trained on" not in printed(120, print_scorecard, scorecard(boolq()))
