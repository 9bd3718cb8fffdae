"""Verdicts: kept, broken, or left undecided by too few items; and what all suites come to together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from training.evaluation.contract import judge
from training.evaluation.judge import corrected, score_suite
from training.evaluation.overall import promises, summarise_forgetting
from training.evaluation.scorecard import Scorecard, SuiteScore
from training.evaluation.scoring import Answered
from training.spec import Contract, CrossEntropy, ExactMatch
from training.suite_spec import Agreement, AnySuite, Classification, Length, Regex

BY_INTERVAL = Contract(min_gain=0.1, max_loss=0.05, judge_by="interval")


def exact(name: str = "skill", **fields: Any) -> ExactMatch:
    return ExactMatch(name=name, path=Path("f"), metric="exact_match", prompt="q", completion="a", **fields)


def entropy(**fields: Any) -> CrossEntropy:
    return CrossEntropy(name="text", path=Path("f"), metric="cross_entropy", text="t", **fields)


def answers(scores: list[float], chance: float = 0.0, said: str = "x") -> list[Answered]:
    return [Answered(f"q{n}", "right", f"{said} {score}", score, 1.0, chance) for n, score in enumerate(scores)]


def scored(
    base: list[float],
    tuned: list[float],
    contract: Contract = BY_INTERVAL,
    role: Literal["target", "retention"] = "retention",
    suite: AnySuite | None = None,
    chance: float = 0.0,
) -> SuiteScore:
    return score_suite(suite or exact(), role, answers(base, chance), answers(tuned, chance), contract)


def test_the_intervals_end_that_speaks_against_the_promise_decides() -> None:
    many_kept = scored([1.0] * 200, [1.0] * 200)
    assert (many_kept.verdict, many_kept.lost, many_kept.won) == ("kept", 0, 0)
    lost = scored([1.0] * 200, [0.0] * 40 + [1.0] * 160)
    assert (lost.verdict, lost.kept) == ("broken", False)
    few = scored([1.0] * 20, [1.0] * 20)
    assert (few.verdict, few.kept) == ("undecided", False)


def test_an_undecided_suite_says_how_many_items_would_decide() -> None:
    """Nothing lost of 20: the score interval reaches z^2 / (n + z^2) = 0.161 down, 3.2 times the allowed 0.05."""
    few = scored([1.0] * 20, [1.0] * 20)
    assert few.items_to_decide == int(np.ceil(20 * (3.8415 / (20 + 3.8415) / 0.05) ** 2))
    verdict = judge((few,), BY_INTERVAL)
    assert verdict.verdict == "undecided"
    assert verdict.reasons == (
        "skill lost -0.0000 (share), and its interval [-0.1611, 0.1611] holds the allowed 0.0500: "
        "about 208 items would decide; it has 20",
    )


def test_that_many_items_do_decide() -> None:
    few = scored([1.0] * 20, [1.0] * 20)
    assert few.items_to_decide is not None
    assert scored([1.0] * few.items_to_decide, [1.0] * few.items_to_decide).verdict == "kept"


def test_a_target_is_judged_by_the_low_end_of_its_gain() -> None:
    assert scored([0.0] * 50, [1.0] * 20 + [0.0] * 30, role="target").verdict == "kept"
    assert scored([0.0] * 50, [1.0] * 6 + [0.0] * 44, role="target").verdict == "undecided"
    assert scored([0.0] * 200, [0.0] * 200, role="target").verdict == "broken"


def test_an_estimate_is_never_undecided() -> None:
    by_estimate = BY_INTERVAL.model_copy(update={"judge_by": "estimate"})
    assert scored([1.0] * 20, [1.0] * 20, by_estimate).verdict == "kept"
    assert scored([1.0] * 20, [0.0] * 2 + [1.0] * 18, by_estimate).verdict == "broken"


def test_one_broken_promise_outweighs_an_undecided_one() -> None:
    undecided, broken = scored([1.0] * 20, [1.0] * 20), scored([1.0] * 200, [0.0] * 200)
    kept = scored([1.0] * 200, [1.0] * 200)
    assert judge((kept, undecided), BY_INTERVAL).verdict == "undecided"
    assert judge((kept, undecided, broken), BY_INTERVAL).verdict == "broken"
    assert judge((kept,), BY_INTERVAL).verdict == "kept"


def test_one_graded_item_is_never_proof() -> None:
    assert scored([1.0], [0.5], suite=entropy()).verdict == "undecided"


def test_an_artifact_compared_with_itself_loses_nothing() -> None:
    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, 300).astype(float).tolist()
    nats = generator.uniform(0.5, 2.0, 300).tolist()
    for suite, scores in ((exact(), right), (entropy(), nats)):
        score = corrected([scored(scores, scores, suite=suite)])[0]
        assert (score.change, score.lost, score.won, score.p_value, score.p_holm) == (0.0, 0, 0, 1.0, 1.0)
        assert score.verdict == "kept"
    assert score.agreement is None


def test_p_values_are_corrected_over_the_suites() -> None:
    lost = scored([1.0] * 50, [0.0] * 6 + [1.0] * 44)
    same = scored([1.0] * 50, [1.0] * 50)
    first, second = corrected([lost, same])
    assert first.p_value == pytest.approx(2 / 2**6)
    assert (first.p_holm, second.p_holm) == (pytest.approx(4 / 2**6), 1.0)


def test_retention_leaves_out_and_names_a_suite_that_the_base_does_not_know() -> None:
    known = scored([1.0] * 6 + [0.0] * 4, [1.0] * 4 + [0.0] * 6, suite=exact("known"), chance=0.2)
    guessed = scored([1.0, 0.0, 0.0, 0.0], [0.0] * 4, suite=exact("guessed"), chance=0.25)
    kept = summarise_forgetting((known, guessed))
    assert kept.left_out == ("guessed",)
    assert kept.retention == pytest.approx((0.4 - 0.2) / (0.6 - 0.2))
    assert kept.general_ability_delta == pytest.approx((-0.2 - 0.25) / 2)
    assert any("there is nothing that could be forgotten" in note for note in guessed.notes)


def test_a_cross_entropys_change_is_told_in_nats_and_enters_no_mean_of_shares() -> None:
    kept = summarise_forgetting((scored([1.0, 2.0], [1.5, 2.5], suite=entropy()),))
    assert (kept.retention, kept.general_ability_delta, kept.rise_in_nats) == (None, None, {"text": 0.5})


def test_promises_over_all_suites() -> None:
    contract = Contract(max_loss=1.0, min_retention=0.9, max_mean_loss=0.1)
    suites = (
        scored([1.0] * 40, [0.0] * 10 + [1.0] * 30, contract, suite=exact("a")),
        scored([1.0] * 40, [1.0] * 40, contract, suite=exact("b")),
    )
    retention, loss = promises(suites, contract)
    assert (retention.value, loss.value) == (pytest.approx(0.875), pytest.approx(0.125))
    assert (retention.state, loss.state) == ("broken", "broken")
    assert retention.interval is not None
    assert retention.interval[0] < 0.875 < retention.interval[1]
    verdict = judge(suites, contract, (retention, loss))
    assert verdict.verdict == "broken"
    assert [reason.split(" (")[0] for reason in verdict.reasons] == [
        "retention over all suites is 0.8750",
        "the mean loss over retention suites is 0.1250",
    ]
    by_interval = contract.model_copy(update={"judge_by": "interval"})
    assert [promise.state for promise in promises(suites, by_interval)] == ["undecided", "undecided"]


def test_a_promise_over_no_suite_is_undecided() -> None:
    (promise,) = promises((scored([1.0, 2.0], [1.0, 2.0], suite=entropy()),), Contract(min_retention=0.9))
    assert (promise.value, promise.state) == (None, "undecided")
    assert "cannot be told" in judge((), Contract(), (promise,)).reasons[0]


def test_what_a_reader_must_know_is_said() -> None:
    three = scored([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    assert three.notes[0].startswith("3 items are too few")
    twenty = scored([1.0] * 20, [1.0] * 20, Contract(max_loss=0.02))
    assert twenty.notes == ("one of 20 items is 0.0500, more than the threshold 0.0200: give more items",)


def test_a_model_that_answers_nothing_is_told_of() -> None:
    base = answers([1.0] * 12)
    silent = [Answered(answer.prompt, answer.expected, " \n", 0.0, 1.0) for answer in base]
    notes = score_suite(exact(), "target", base, silent, Contract()).notes
    assert "the tuned model answered nothing to 12 of 12 items" in notes


def test_answers_that_the_metric_cannot_read_are_counted() -> None:
    suite = Classification(
        name="mood", path=Path("f"), metric="classification", prompt="q", completion="a", labels=("good", "bad")
    )
    base = answers([1.0] * 12)
    unread = [Answered(answer.prompt, answer.expected, "hm", 0.0, 1.0, 0.5, readable=False) for answer in base]
    notes = score_suite(suite, "target", base, unread, Contract()).notes
    assert "the metric can read nothing in 12 of 12 answers of the tuned model; they count as wrong" in notes


def test_agreement_and_length_compare_with_the_bases_own_answer() -> None:
    base = [Answered("q", "", text, 1.0, 1.0) for text in ("The sea.", "one two three four", "red")]
    tuned = [Answered("q", "", text, 1.0, 1.0) for text in ("the  SEA.", "one two", "blue")]
    same = Agreement(name="same", path=Path("f"), metric="agreement", prompt="q")
    words = Length(name="words", path=Path("f"), metric="length", prompt="q")
    agreed = score_suite(same, "retention", base, tuned, Contract())
    assert (agreed.base, agreed.tuned, agreed.agreement) == (1.0, pytest.approx(1 / 3), pytest.approx(1 / 3))
    long = score_suite(words, "retention", base, tuned, Contract())
    assert (long.base, long.tuned) == (1.0, pytest.approx((1 + 0.5 + 1) / 3))
    assert long.answer_words == (pytest.approx(7 / 3), pytest.approx(5 / 3))


def test_free_text_tells_how_long_the_answers_are() -> None:
    suite = Regex(name="r", path=Path("f"), metric="regex", prompt="q", pattern="x")
    assert scored([1.0] * 12, [1.0] * 12, suite=suite).answer_words == (2.0, 2.0)


def test_a_scorecard_of_version_1_can_still_be_read() -> None:
    suite = {"name": "s", "role": "target", "metric": "exact_match", "higher_is_better": True, "unit": "share"}
    suite |= {"base": 0.5, "tuned": 1.0, "change": 0.5, "interval": [0.1, 0.9], "threshold": 0.0, "kept": True}
    contract = {"verdict": "kept", "min_gain": 0.0, "max_loss": 0.02, "reasons": []}
    card = {"schema_version": 1, "run": "r-1", "protocol": {}, "protocol_hash": "h", "base_model": "b"}
    card |= {"base_hash": "b", "artifact_hash": "a", "suites": [suite | {"items": []}], "contract": contract}
    card |= {"probes": {}, "versions": {}, "seconds": 1.0}
    read = Scorecard.model_validate_json(json.dumps(card))
    assert (read.schema_version, read.suites[0].verdict, read.suites[0].p_value) == (1, "kept", None)
    assert read.forgetting is None
