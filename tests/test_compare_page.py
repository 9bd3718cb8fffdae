"""The page of a comparison, the filter in a browser, marked differences, and seeds pooled."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_report import (
    CHROMIUM,
    CHROMIUM_FLAGS,
    asdiv,
    attribute_urls,
    boolq,
    prose,
    scorecard,
    step_row,
    write_metrics,
)

from cluster.cli import cli
from training.errors import TenureError
from training.evaluation.comparison import compare_runs
from training.evaluation.pooling import pool_seeds
from training.evaluation.scorecard import DataSummary, KlToBase, Scorecard, SuiteScore
from training.evaluation.stats import pooled_interval
from training.reporting.compare import render_comparison
from training.reporting.curves import Gpus, cost_rows, read_metrics
from training.reporting.html import render_html
from training.reporting.marks import marked
from training.workspace import RunFolder, write_json

DATA = DataSummary(num_examples=4000, num_faulty=0, num_untaught=0, num_overlong=0)


def turned(suite: SuiteScore, every: int) -> SuiteScore:
    """The suite with the tuned model's right and wrong exchanged on every nth item."""
    items = tuple(
        item.model_copy(update={"tuned_score": 1 - item.tuned_score, "tuned_answer": f"now {item.expected} <b>"})
        if item.index % every == 0
        else item
        for item in suite.items
    )
    tuned = float(np.mean([item.tuned_score for item in items]))
    return suite.model_copy(update={"items": items, "tuned": tuned, "change": tuned - suite.base})


def a_run(workspace: Path, name: str, seed: int, every: int) -> tuple[RunFolder, Scorecard]:
    """A folder as a run leaves it, with three suites, curves, a spec of one seed and lineage."""
    run = RunFolder(workspace / "runs" / name)
    run.path.mkdir(parents=True)
    kl = {"target": KlToBase(nats=0.01 * every, interval=(0.01, 0.2), num_items=9, num_tokens=80)}
    card = scorecard(turned(asdiv(), every), boolq(), prose(), run=name, kl_to_base=kl, data=DATA)
    run.scorecard.write_text(card.model_dump_json(), encoding="utf-8")
    validation = [{"kind": "validation", "step": 20, "suite": "asdiv", "loss": 0.5 + seed}]
    write_metrics(run.metrics, [*(step_row(step, loss=2.0 / step + seed) for step in range(1, 30)), *validation])
    scaling = {"workers": 2, "gpus_per_worker": 1, "price_per_gpu_hour": 3.5}
    write_json(run.spec, {"name": name, "training": {"seed": seed, "learning_rate": 1e-4}, "scaling": scaling})
    write_json(run.lineage, {"commit": f"c0ffee{seed}", "packages": {"ray": "2.60.0"}, "parent": {"run": "older-1"}})
    return run, card


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[RunFolder, Scorecard]]:
    return [a_run(tmp_path, "first-1", 0, 7), a_run(tmp_path, "second-1", 1, 5)]


def page_of(two: list[tuple[RunFolder, Scorecard]]) -> str:
    runs, cards = [run for run, _ in two], [card for _, card in two]
    return render_comparison(runs, cards, compare_runs(cards))


def test_the_page_holds_both_runs_and_needs_nothing_else(two: list[tuple[RunFolder, Scorecard]]) -> None:
    page = page_of(two)
    assert attribute_urls(page) == []
    assert page.count("<script") == 1
    for words in (
        "first-1",
        "second-1",
        "c0ffee0",
        "c0ffee1",
        "older-1",
        "Training loss",
        "Learning rate",
        "GPU hours",
    ):
        assert words in page
    assert "KL to the base on target prompts 0.0700 nats per token" in page
    assert "&lt;b&gt;" in page
    chart = page[page.index("<h2>Gained and forgotten") : page.index("<h2>Suites")]
    names = [f"{suite}: {run}" for suite in ("asdiv", "boolq", "prose") for run in ("first-1", "second-1")]
    assert sorted(names, key=chart.index) == names
    assert "first-1: Trained on 4,000 examples." in page
    assert "<b>now" not in page
    lost, won = page.count('data-fate="lost"'), page.count('data-fate="won"')
    differences = {suite.name: suite for suite in compare_runs([card for _, card in two]).pairs[0].suites}
    assert lost == sum(len(suite.lost) for suite in differences.values()) > 0
    assert won == sum(len(suite.won) for suite in differences.values()) > 0


def in_browser(page: str, folder: Path, script: str, width: int = 1200) -> str:
    """What a script in a frame around the page puts into the title."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    attributes = f'id=f src="page.html" width={width} height=800 style="border:0" onload="{script}"'
    (folder / "frame.html").write_text(f"<iframe {attributes}></iframe>", encoding="utf-8")
    flags = [*CHROMIUM_FLAGS, "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    command = [str(CHROMIUM), *flags, (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert found, done.stdout[:500]
    return found[1]


FILTER = (
    "const d = f.contentDocument, b = d.querySelector('.filter'), w = f.contentWindow;"
    "b.querySelector('select').value = 'lost'; b.dispatchEvent(new w.Event('input'));"
    "const seen = [...d.querySelectorAll('details .item')].filter(x => !x.hidden);"
    "document.title = b.hidden + ' ' + seen.length + ' ' + seen.every(x => x.dataset.fate === 'lost')"
    " + ' ' + [...d.querySelectorAll('details.items')].filter(x => x.open).length"
)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_items_are_filtered_in_the_browser(two: list[tuple[RunFolder, Scorecard]], tmp_path: Path) -> None:
    lost = page_of(two).count('data-fate="lost"')
    assert in_browser(page_of(two), tmp_path, FILTER) == f"false {lost} true 1"
    report = render_html(two[0][0], two[0][1])
    folded = report[report.index('<details class="items">') :]
    hidden, shown, all_lost, _ = in_browser(report, tmp_path, FILTER).split()
    assert (hidden, int(shown), all_lost) == ("false", folded.count('data-fate="lost"'), "true")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [375, 1200])
def test_the_page_is_no_wider_than_the_screen(
    two: list[tuple[RunFolder, Scorecard]], tmp_path: Path, width: int
) -> None:
    script = "const d = f.contentDocument; d.querySelectorAll('details').forEach(x => x.open = true);"
    script += "document.title = d.documentElement.scrollWidth"
    assert int(in_browser(page_of(two), tmp_path, script, width)) <= width


def test_the_words_that_differ_are_marked() -> None:
    assert marked("the sky is blue", "the sky is red") == "the sky is <mark>blue</mark>"
    assert marked("a <b> c", "a x c") == "a <mark>&lt;b&gt;</mark> c"
    assert marked("same", "same") == "same"
    assert marked("nothing <alike>", "other") == "nothing &lt;alike&gt;"


def test_gpu_hours_and_their_price_are_told(two: list[tuple[RunFolder, Scorecard]]) -> None:
    metrics = read_metrics(two[0][0].metrics)
    rows = dict(cost_rows(metrics, 1.0, Gpus(4, 3.0)))
    hours = 29 * 0.9 * 4 / 3600
    assert rows["GPU hours of training"] == f"{hours:.3f}"
    assert rows["price of training"] == f"{3 * hours:.2f} (3 a GPU hour)"
    assert "GPU hours of training" not in dict(cost_rows(metrics, 1.0))
    assert "price of training" not in dict(cost_rows(metrics, 1.0, Gpus(4)))


def spec(seed: int, **training: Any) -> dict[str, Any]:
    return {
        "name": f"run-{seed}",
        "model": "m",
        "scaling": {"workers": seed + 1},
        "training": {"seed": seed} | training,
    }


def test_seeds_are_pooled_by_mean_spread_and_both_kinds_of_chance() -> None:
    cards = [scorecard(turned(asdiv(), every), prose(), run=f"run-{every}") for every in (3, 5, 7)]
    pooled = pool_seeds(cards, [spec(seed) for seed in range(3)])
    changes = [card.suites[0].change for card in cards]
    first = pooled.suites[0]
    assert first.changes == tuple(changes)
    assert first.change == pytest.approx(np.mean(changes))
    assert first.deviation == pytest.approx(np.std(changes, ddof=1))
    gains = np.array([[i.tuned_score - i.base_score for i in card.suites[0].items] for card in cards])
    assert first.interval == pooled_interval(gains, np.ones(gains.shape[1]))
    assert pooled.suites[1].deviation == pytest.approx(0, abs=1e-12)
    assert pooled.seeds == (0, 1, 2)


def test_runs_that_are_no_seeds_of_one_spec_are_refused() -> None:
    cards = [scorecard(run="a-1"), scorecard(run="b-1")]
    with pytest.raises(TenureError, match=r"more than the seed: training\.learning_rate"):
        pool_seeds(cards, [spec(0, learning_rate=1e-4), spec(1, learning_rate=2e-4)])
    with pytest.raises(TenureError, match="both have the seed 0"):
        pool_seeds(cards, [spec(0), spec(0)])
    with pytest.raises(TenureError, match="two runs or more"):
        pool_seeds(cards[:1], [spec(0)])
    with pytest.raises(TenureError, match="bases differ"):
        pool_seeds([cards[0], scorecard(run="b-1", base_hash="0" * 64)], [spec(0), spec(1)])
    with pytest.raises(TenureError, match="different protocols"):
        pool_seeds([cards[0], scorecard(run="b-1", protocol_hash="0" * 64)], [spec(0), spec(1)])


def test_the_command_writes_the_page_and_pools_seeds(two: list[tuple[RunFolder, Scorecard]], tmp_path: Path) -> None:
    def tenure(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["--workspace", str(tmp_path), "compare", "first-1", "second-1", *arguments])

    pooled = json.loads(tenure("--seeds", "--json").output)
    assert pooled["seeds"] == [0, 1]
    compared = json.loads(tenure("--json").output)
    assert compared["pairs"][0]["kl_to_base"] == {"target": [0.07, 0.05]}
