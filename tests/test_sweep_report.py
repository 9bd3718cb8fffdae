"""How a sweep's result reads, on screen and as a page."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from sweep_results import SPEC, finalist, made_up_sweep, point

from sweeps.importance import Importance
from sweeps.pareto import choose, on_validation, pareto_front
from sweeps.plots import draw_finalists, draw_front, parallel_axes, style_of
from sweeps.report import front_rows, print_sweep, ranked_finalists, render_sweep, write_sweep_report
from sweeps.result import SweepResult, Trial
from sweeps.words import causes, config_text, headline, recommendation, value_text


@pytest.fixture(scope="module")
def result() -> SweepResult:
    return made_up_sweep()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What mattered has tests of its own, and takes its time."""

    def told(result: SweepResult) -> list[Importance]:
        return [Importance("gain", None, 3, 0, (), "3 settings are too few to tell 2 dimensions apart; 12 would do")]

    monkeypatch.setattr("sweeps.report.importances", told)


def printed(result: SweepResult, price: float | None = None) -> str:
    out = io.StringIO()
    print_sweep(Console(file=out, width=110), result, price)
    return out.getvalue()


def empty(result: SweepResult, **fields: object) -> SweepResult:
    return result.model_copy(update={"points": (), "finalists": (), "winner": None, **fields})


def test_the_page_needs_nothing_else_and_says_the_verdict_first(result: SweepResult) -> None:
    page = render_sweep(result, price=2.5)
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert page.index("Winner: lora-kl") < page.index("Gain against retention")
    assert "out of memory at micro_batch_size 8" in page
    assert "tuning: {type: full}" in page
    assert page.count("<svg") == 3
    assert "too few to tell" in page


def test_names_cannot_steer_the_page(result: SweepResult) -> None:
    page = render_sweep(result.model_copy(update={"name": "<b>x</b>", "notes": ("<i>note</i>",)}))
    assert "<b>x</b>" not in page
    assert "<i>note</i>" not in page


def test_the_page_and_the_winners_spec_lie_side_by_side(result: SweepResult, tmp_path: Path) -> None:
    write_sweep_report(tmp_path / "report.html", result)
    assert (tmp_path / "winner.yaml").read_text() == SPEC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "winner.yaml"]


def test_the_terminal_tells_winner_front_cost_and_causes(result: SweepResult) -> None:
    text = printed(result, price=2.5)
    assert text.startswith("✓ Winner: lora-kl: sweep made-up-1")
    for told in ("winner", "hypervolume", "price, at 2.5 a GPU hour", "failed full-ewc-1: the loss became nan"):
        assert told in text
    assert "price" not in printed(result)


def test_a_gain_is_told_as_a_share_of_full_tunings_best(result: SweepResult) -> None:
    best = max(p.gain.value for p in result.points if p.strategy == "full")
    winner = next(f for f in result.finalists if f.strategy == "lora-kl")
    told = " ".join(recommendation(result))
    assert f"That is {100 * winner.gain.value / best:.0f} % of what plain full tuning gains" in told
    assert "On test, scored once, it gains" in told


def test_a_winner_that_was_not_tested_is_said_to_flatter(result: SweepResult) -> None:
    assert result.winner is not None
    untested = result.model_copy(update={"winner": result.winner.model_copy(update={"test": None})})
    assert "has not been scored on test" in " ".join(recommendation(untested))


def test_a_rival_that_keeps_more_is_named(result: SweepResult) -> None:
    winner = ranked_finalists(result)[0]
    rival = finalist(winner.gain.value - 0.01, 0.995, "full-0", strategy="full", trials=("full-0",))
    told = recommendation(result.model_copy(update={"finalists": (winner, rival)}))
    assert any("full is not told apart in gain" in line and "99.5 %" in line for line in told)


def test_without_a_winner_the_nearest_is_told(result: SweepResult) -> None:
    broken = [
        finalist(0.6, 0.5, "full-0", "broken", strategy="full", trials=("full-0",), reasons=("facts lost 0.4",)),
        finalist(0.5, 0.8, "lora-0", "broken", trials=("lora-0",), reasons=("facts lost 0.2",)),
    ]
    none = result.model_copy(update={"finalists": tuple(broken), "winner": None})
    assert choose(broken).best is None
    assert headline(none)[0] == "broken"
    told = " ".join(recommendation(none))
    assert "The nearest is lora (lora-0)" in told
    assert "It fails because facts lost 0.2" in told
    assert "No winner" in printed(none)
    assert "No winner" in render_sweep(none)


def test_nothing_finished_and_nothing_yet(result: SweepResult) -> None:
    assert "nothing to recommend" in printed(empty(result))
    under_way = empty(result, finished=None, trials=result.trials[:3])
    assert "Under way: 3 trials so far" in printed(under_way)
    for one in (under_way, empty(result), empty(result, trials=())):
        assert "<h2>What it cost</h2>" in render_sweep(one)


def test_without_finalists_the_best_single_trial_is_told(result: SweepResult) -> None:
    single = result.model_copy(update={"finalists": (), "winner": None})
    assert headline(single) == ("undecided", "No winner: no finalist was run under further seeds")
    best = max(p.gain.value for p in result.points if p.contract == "kept")
    told = " ".join(recommendation(single))
    assert f"under one seed and not tested: it gains +{100 * best:.1f} pts" in told
    assert "Nothing that was tried" not in told


def test_gains_in_nats_keep_their_unit(result: SweepResult) -> None:
    nats = result.model_copy(update={"gain_unit": "nats per byte"})
    told = " ".join(recommendation(nats))
    assert "it gains +0.558 [" in told
    assert "gain, nats per byte" in draw_front(nats)


def test_the_front_is_told_row_by_row(result: SweepResult) -> None:
    front = pareto_front(on_validation(result.points))
    rows = front_rows(result, 2.0)
    assert len(rows) == len(front)
    assert [row.mark for row in rows if row.mark] == ["winner, knee"]
    assert rows[0].price == f"{2.0 * front[0].gpu_hours:,.2f}"


def test_every_strategy_has_its_own_colour_and_shape(result: SweepResult) -> None:
    many = tuple(
        Trial(name=str(i), strategy=f"s{i}", config={}, seed=0, rung=0, state="finished", tokens=0, seconds=0,
              gpu_hours=0) for i in range(30)
    )  # fmt: skip
    looks = [style_of(empty(result, trials=many), f"s{i}") for i in range(30)]
    assert len(set(looks)) == 30
    assert len(set(looks[:6])) == len({colour for colour, _ in looks[:6]}) == len({mark for _, mark in looks[:6]})


def test_charts_draw_one_point_and_one_finalist(result: SweepResult) -> None:
    one = result.model_copy(update={"points": (point(0.2, 1.0, "lora-0"),), "winner": None})
    assert draw_front(one).startswith("<svg")
    assert draw_finalists(one, [finalist(0.2, 1.0, "lora-0")]).startswith("<svg")


def test_axes_that_have_no_room_are_named(result: SweepResult) -> None:
    drawn, left_out = parallel_axes(result, [])
    assert drawn[:3] == ["training.learning_rate", "training.global_batch_size", "tuning.rank"]
    assert len(drawn) == 5
    assert "protections.0.strength (full-ewc)" in drawn
    assert left_out == ["protections.0.share (full-replay)", "protections.0.weight (lora-kl)"]


def test_values_read_as_one_would_write_them(result: SweepResult) -> None:
    given = [2.634e-4, 1e-6, 0.95214, 10000.0, 2.5e5, 13, "linear", None, True, 0.0]
    assert [value_text(v) for v in given] == [
        "2.63e-4", "1e-6", "0.9521", "10000", "2.5e5", "13", "linear", "None", "True", "0",
    ]  # fmt: skip
    trial = result.trials[0].model_copy(update={"config": {"a.x": 1, "b.x": 2, "c.y": 3}})
    assert config_text(trial) == "a.x 1, b.x 2, y 3"


def test_causes_are_gathered(result: SweepResult) -> None:
    assert [names for _, names in causes(result, "failed")] == [["full-ewc-1"], ["lora-1"]]
