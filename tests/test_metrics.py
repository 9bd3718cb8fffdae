"""Metrics of free text: known answers, the packages' own figures, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from training.evaluation.metrics import ANSWER_METRICS, Worth, same_answer, squad_words
from training.suite_spec import Suite, Suites

ADAPTER: TypeAdapter[Any] = TypeAdapter(Suite)


def worth(metric: str, answer: str, right: str = "", **fields: Any) -> Worth:
    suite = ADAPTER.validate_python(
        {"name": "s", "path": "f", "metric": metric, "prompt": "q", "completion": "a", **fields}
    )
    return ANSWER_METRICS[type(suite)](suite, answer, right)


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles and punctuation aside
        ("the black cat", "cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
    ],
)
def test_token_f1_is_squads(answer: str, right: str, f1: float) -> None:
    assert worth("token_f1", answer, right).score == pytest.approx(f1)


def test_words_are_normalised_as_by_squads_script() -> None:
    assert squad_words("An apple's core, the U.S.!") == ["apples", "core", "us"]


def test_rouge_is_lins() -> None:
    """Of "police killed the gunman", "police kill the gunman" and "the gunman kill police" (Lin 2004, section 3)."""
    assert worth("rouge", "police kill the gunman", "police killed the gunman").score == 1.0  # stemmed
    assert worth("rouge", "the gunman kill police", "police killed the gunman").score == pytest.approx(0.5)
    assert worth("rouge", "a b", "a c", variant="rouge1").score == pytest.approx(0.5)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    from sacrebleu import sentence_bleu, sentence_chrf

    pair = ("the cat sat on a mat", "the cat sat on the mat")
    assert worth("bleu", *pair).score == pytest.approx(
        sentence_bleu(pair[0], [pair[1]], use_effective_order=True).score / 100
    )
    assert worth("chrf", *pair).score == pytest.approx(sentence_chrf(pair[0], [pair[1]]).score / 100)
    assert worth("bleu", pair[1], pair[1]).score == pytest.approx(1.0)
    assert worth("chrf", pair[1], pair[1]).score == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("positive", Worth(1.0)),
        ("I think it is POSITIVE, not negative.", Worth(1.0)),
        ("Negative!", Worth(0.0)),
        ("not positively sure", Worth(0.0, readable=False)),
        ("very positive", Worth(0.0)),
        ("", Worth(0.0, readable=False)),
    ],
)
def test_a_class_is_the_first_label_in_the_answer(answer: str, expected: Worth) -> None:
    labels = ["positive", "negative", "very positive"]
    assert worth("classification", answer, "Positive", labels=labels) == expected


def test_a_pattern_is_found_or_finds_the_answer() -> None:
    assert worth("regex", "so #### 42", "42", pattern=r"#### (\d+)") == Worth(1.0)
    assert worth("regex", "so #### 41", "42", pattern=r"#### (\d+)") == Worth(0.0)
    assert worth("regex", "forty-two", "42", pattern=r"#### (\d+)") == Worth(0.0, readable=False)
    assert worth("regex", "forty-two", pattern=r"\d") == Worth(0.0)
    assert worth("regex", "42", pattern=r"\d") == Worth(1.0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"name": "Ada"}', 1.0),
        ('```json\n{"name": "Ada"}\n```', 1.0),
        ('{"name": 3}', 0.0),
        ('Here: {"name": "Ada"}', 0.0),
        ('{"name": "Ada",}', 0.0),
        ("NaN", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_must_be_whole_and_fit_its_schema(tmp_path: Path, answer: str, score: float) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}))
    assert worth("json", answer, json_schema=str(schema)).score == score
    assert worth("json", '{"name": 3}').score == 1.0


@pytest.mark.parametrize(
    ("answer", "form", "score"),
    [
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", "markdown", 1.0),
        ("a | b\n--- | ---\n1 | 2\n3 | 4", "markdown", 1.0),
        ("| a | b |\n| 1 | 2 |\n| 3 | 4 |", "markdown", 0.0),  # no rule
        ("| a | b |\n|---|---|\n| 1 |", "markdown", 0.0),
        ("Sure!\n| a | b |\n|---|---|\n| 1 | 2 |", "markdown", 0.0),
        ("| a |\n|---|\n| 1 |", "markdown", 0.0),  # one column is a list
        ('a,b\n1,"two, three"', "csv", 1.0),
        ("a,b\n1", "csv", 0.0),
        ("a,b", "csv", 0.0),
        ('a,b\n"1,2', "csv", 0.0),
    ],
)
def test_a_table_must_be_whole(answer: str, form: str, score: float) -> None:
    assert worth("table", answer, format=form).score == score


def test_lengths_are_compared_in_words() -> None:
    assert worth("length", "one two", "one two three four").score == 0.5
    assert worth("length", "", "").score == 1.0
    assert worth("length", "", "one").score == 0.0


def test_answers_agree_but_for_case_and_white_space() -> None:
    assert same_answer(" The Sea\n", "the sea")
    assert not same_answer("the sea", "the seas")


@pytest.mark.parametrize("metric", ["agreement", "length"])
def test_what_compares_with_the_base_is_no_target(metric: str) -> None:
    suite = {"name": "s", "path": "f", "metric": metric, "prompt": "q"}
    with pytest.raises(ValueError, match="nothing to gain"):
        Suites.model_validate({"target": [suite]})
    target = {"name": "t", "path": "f", "metric": "exact_match", "prompt": "q", "completion": "a"}
    assert Suites.model_validate({"target": [target], "retention": [suite]}).retention[0].metric == metric


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"metric": "regex", "prompt": "q", "pattern": "("}, "is no regular expression"),
        (
            {"metric": "classification", "prompt": "q", "completion": "a", "labels": ["Yes", "yes"]},
            "two labels are alike",
        ),
        ({"metric": "exact_match", "messages": "m", "prompt": "q"}, "messages stand beside prompt"),
        ({"metric": "exact_match", "messages": "m", "chat": False}, "messages need the chat template"),
        ({"metric": "rouge", "prompt": "q"}, "this key is missing"),
        ({"metric": "perplexity"}, "needs text, or a prompt and a completion"),
    ],
)
def test_wrong_suites_are_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ADAPTER.validate_python({"name": "s", "path": "f", **fields})


def dfmea(*rows: str) -> str:
    return "\n".join(("| Mode | S | O | D | RPN |", "| --- | --- | --- | --- | --- |", *rows))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (dfmea("| Leak | 7 | 2 | 3 | 42 |"), Worth(1.0)),
        (dfmea("| Leak | 7 | 2 | 3 | 42 |", "| Crack | 10 | 1 | 10 | 100 |"), Worth(1.0)),
        ("```markdown\n" + dfmea("| Leak | 7 | 2 | 3 | 42 |") + "\n```", Worth(1.0)),
        ("| rpn | d | o | s |\n|---|---|---|---|\n| 42 | 3 | 2 | 7 |", Worth(1.0)),  # any order, any case
        (dfmea("| Leak | 7 | 2 | 3 | 41 |"), Worth(0.0)),
        (dfmea("| Leak | 7 | 2 | 3 | 42 |", "| Crack | 2 | 2 | 2 | 6 |"), Worth(0.0)),  # one wrong row is enough
        (dfmea("| Leak | 11 | 2 | 3 | 66 |"), Worth(0.0)),  # right, but beyond the scale
        (dfmea("| Leak | 0 | 2 | 3 | 0 |"), Worth(0.0)),
        (dfmea("| Leak | high | 2 | 3 | 42 |"), Worth(0.0)),
        (dfmea("| Leak | 7 | 2 | 3 | 42.0 |"), Worth(0.0)),
        (dfmea("| Leak | 7 | 2 | 3 | \u0664\u0662 |"), Worth(0.0)),  # digits of another script
        (dfmea("| Leak | 7 | 2 | 3 |"), Worth(0.0, readable=False)),  # a cell is missing
        ("| Mode | S | O | RPN |\n|---|---|---|---|\n| Leak | 7 | 2 | 14 |", Worth(0.0, readable=False)),
        ("| S | S | O | D | RPN |\n|---|---|---|---|---|\n| 7 | 7 | 2 | 3 | 42 |", Worth(0.0, readable=False)),
        (dfmea(), Worth(0.0, readable=False)),  # no row
        ("The RPN is 7 x 2 x 3 = 42.", Worth(0.0, readable=False)),
        ("", Worth(0.0, readable=False)),
    ],
)
def test_a_product_is_right_in_every_row(answer: str, expected: Worth) -> None:
    assert worth("product", answer, factors=["S", "O", "D"], product="RPN") == expected


def test_a_scale_of_ones_own() -> None:
    answer = "| a | b | c |\n|---|---|---|\n| -2 | 5 | -10 |"
    assert worth("product", answer, factors=["a", "b"], product="c").score == 0.0
    assert worth("product", answer, factors=["a", "b"], product="c", least=-5, greatest=5).score == 1.0


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"factors": ["S", "s"], "product": "RPN"}, "alike but for case"),
        ({"factors": ["S", "O"], "product": "O"}, "alike but for case"),
        ({"factors": ["S", "O"], "product": "RPN", "least": 5, "greatest": 4}, "least 5 exceeds greatest 4"),
        ({"factors": ["S"], "product": "RPN"}, "at least 2"),
    ],
)
def test_columns_of_a_product_that_cannot_be_are_refused(keys: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        worth("product", "", **keys)
