"""What a suite can show is told before training, with the number of items that it would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_spec import write_tiny_spec

from training.evaluation.power import Power, powers, warnings
from training.evaluation.scoring import Answered
from training.spec import RunSpec
from training.specfile import load_spec


def spec_with(folder: Path, **contract: Any) -> RunSpec:
    spec = load_spec(write_tiny_spec(folder, Path("some/model")))
    return spec.model_copy(update={"contract": spec.contract.model_copy(update=contract)})


def answers(scores: list[float], chance: float = 0.0) -> list[Answered]:
    return [Answered("q", "a", "a", score, 1.0, chance) for score in scores]


def found(spec: RunSpec, target: list[Answered], retention: list[Answered]) -> dict[str, Power]:
    return {power.name: power for power in powers(spec, {"sums": target, "sentences": retention})}


def with_accuracy(folder: Path) -> RunSpec:
    """The tiny spec with a multiple choice in place of its text."""
    suites = {
        "target": [{"name": "sums", "path": "sums.jsonl", "metric": "exact_match", "prompt": "q", "completion": "a"}],
        "retention": [
            {"name": "sentences", "path": "sums.jsonl", "metric": "accuracy", "prompt": "q", "choices": "c"}
            | {"answer": "a"}
        ],
    }
    return load_spec(write_tiny_spec(folder, Path("some/model"), suites=suites))


def test_items_follow_from_the_bases_own_scores(tmp_path: Path) -> None:
    """A base right on half of its items has variance 1/4, its retention suite's paired differences a quarter of it."""
    half = [0.0, 1.0] * 50
    weak = found(with_accuracy(tmp_path), answers(half), answers(half))["sentences"]
    assert weak.items_to_see == pytest.approx((1.95996 + 0.84162) ** 2 * 0.0625 / 0.02**2, rel=0.01)
    assert not weak.enough


def test_a_threshold_of_nothing_needs_no_number(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, min_gain=0.0)
    power = found(spec, answers([0.0, 1.0]), answers([1.0, 1.1]))["sums"]
    assert (power.items_to_see, power.enough) == (None, True)


def test_a_target_that_the_base_knows_nothing_of_still_needs_items(tmp_path: Path) -> None:
    power = found(spec_with(tmp_path, min_gain=0.1), answers([0.0] * 10), answers([1.0, 1.1]))["sums"]
    assert power.items_to_see == pytest.approx((1.95996 + 0.84162) ** 2 * 0.09 / 0.01, rel=0.02)


def test_texts_that_are_alike_are_enough_and_more_if_they_are_not(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, max_loss=0.02)
    alike = found(spec, answers([1.0] * 4), answers([1.0, 1.001] * 20))["sentences"]
    apart = found(spec, answers([1.0] * 4), answers([0.5, 1.5] * 20))["sentences"]
    assert alike.enough
    assert not apart.enough
    assert apart.above_chance  # a cross-entropy knows no chance


def test_a_suite_at_chance_is_named_with_the_items_that_it_would_take(tmp_path: Path) -> None:
    spec = with_accuracy(tmp_path)
    scores = [1.0] * 28 + [0.0] * 72
    power = found(spec, answers([0.0, 1.0]), answers(scores, chance=0.25))["sentences"]
    assert not power.above_chance
    assert power.items_above_chance == pytest.approx(1.645**2 * 0.1875 / 0.03**2, abs=1)
    told = [line for line in warnings([power]) if "guess" in line]
    assert told == [
        "sentences: the base scores 0.2800 and a guess 0.2500: 100 items do not show more than chance, about 564 might"
    ]
    enough = found(spec, answers([0.0, 1.0]), answers(scores * 6, chance=0.25))["sentences"]
    assert enough.above_chance


def test_a_base_that_knows_nothing_has_nothing_to_forget(tmp_path: Path) -> None:
    power = found(with_accuracy(tmp_path), answers([0.0, 1.0]), answers([0.0] * 30))["sentences"]
    assert (power.above_chance, power.items_above_chance) == (False, None)
    assert any("knows nothing here that could be forgotten" in line for line in warnings([power]))


def test_suites_that_can_show_what_is_asked_are_not_spoken_of(tmp_path: Path) -> None:
    assert (
        list(warnings(powers(spec_with(tmp_path), {"sums": answers([0, 1] * 5), "sentences": answers([1] * 10)}))) == []
    )
