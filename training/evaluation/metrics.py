"""What an answer is worth: one pure function a metric, each with its source, and what the metrics' scores mean."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from training.suite_spec import (
    Agreement,
    Bleu,
    Chrf,
    Classification,
    ExactMatch,
    Length,
    Product,
    Regex,
    Rouge,
    TokenF1,
    ValidJson,
    ValidTable,
)


@dataclass(frozen=True)
class Worth:
    """An answer's score in [0, 1], and whether the metric could read the answer at all."""

    score: float
    readable: bool = True


def exact_match(suite: ExactMatch, answer: str, right: str) -> Worth:
    """1 where both are equal, white space at the ends aside."""
    given, wanted = answer.strip(), right.strip()
    return Worth(float(given.lower() == wanted.lower() if suite.ignore_case else given == wanted))


def token_f1(_: TokenF1, answer: str, right: str) -> Worth:
    """2 P R / (P + R) over the words that both have, as often as both have them.

    Lower case, without punctuation and the articles a, an and the. Source: SQuAD's official script, arXiv 1606.05250.
    """
    given, wanted = squad_words(answer), squad_words(right)
    if not given or not wanted:
        return Worth(float(given == wanted))
    shared = sum((Counter(given) & Counter(wanted)).values())
    return Worth(2 * shared / (len(given) + len(wanted)))


def squad_words(text: str) -> list[str]:
    """The words of a text as SQuAD's script compares them."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge(suite: Rouge, answer: str, right: str) -> Worth:
    """The F-measure of ROUGE. Source: Lin, ROUGE, 2004; the package rouge_score, Porter-stemmed."""
    return Worth(float(_rouge_scorer(suite.variant).score(right, answer)[suite.variant].fmeasure))


@lru_cache(maxsize=4)
def _rouge_scorer(variant: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([variant], use_stemmer=True)


def bleu(_: Bleu, answer: str, right: str) -> Worth:
    """Sentence BLEU-4 over 100, smoothed, up to the order that the answer has. Source: sacrebleu, arXiv 1804.08771."""
    from sacrebleu import sentence_bleu

    return Worth(float(sentence_bleu(answer, [right], use_effective_order=True).score) / 100)


def chrf(_: Chrf, answer: str, right: str) -> Worth:
    """Sentence chrF2 over 100. Source: Popovic, chrF, 2015, as sacrebleu computes it."""
    from sacrebleu import sentence_chrf

    return Worth(float(sentence_chrf(answer, [right]).score) / 100)


def classification(suite: Classification, answer: str, right: str) -> Worth:
    """1 where the first label in the answer is the right one; an answer without a label is unreadable."""
    found = [(place, -len(label), label) for label in suite.labels if (place := _place(label, answer)) is not None]
    if not found:
        return Worth(0.0, readable=False)
    return Worth(float(min(found)[2].casefold() == right.strip().casefold()))


def _place(label: str, answer: str) -> int | None:
    found = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.IGNORECASE)
    return found.start() if found else None


def regex(suite: Regex, answer: str, right: str) -> Worth:
    """1 where the pattern is found, and what it found (its first group, where it has one) is the completion."""
    found = re.search(suite.pattern, answer)
    if found is None:
        return Worth(0.0, readable=not right)
    if not right:
        return Worth(1.0)
    return Worth(float((found[1] if found.re.groups else found[0] or "").strip() == right.strip()))


def valid_json(suite: ValidJson, answer: str, _: str) -> Worth:
    """1 where the answer is JSON, a Markdown fence around it aside, and fits the schema. Source: RFC 8259."""
    from jsonschema import ValidationError

    try:
        value = json.loads(unfenced(answer), parse_constant=_no_number)
    except (ValueError, RecursionError):
        return Worth(0.0)
    if suite.json_schema is None:
        return Worth(1.0)
    try:
        _validator(Path(suite.json_schema)).validate(value)
    except ValidationError:
        return Worth(0.0)
    return Worth(1.0)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@lru_cache(maxsize=16)
def _validator(path: Path) -> Any:
    from jsonschema.validators import validator_for

    schema = json.loads(path.read_text(encoding="utf-8"))
    return validator_for(schema)(schema)


def unfenced(answer: str) -> str:
    """An answer without the Markdown fence around all of it."""
    found = re.fullmatch(r"\s*```[^\n`]*\n(.*?)\n?```\s*", answer, re.DOTALL)
    return found[1] if found else answer


def valid_table(suite: ValidTable, answer: str, _: str) -> Worth:
    """1 where the whole answer is a table. Sources: GitHub Flavored Markdown 4.10; RFC 4180."""
    lines = [line for line in unfenced(answer).strip().splitlines() if line.strip()]
    rows = _markdown_rows(lines) if suite.format == "markdown" else _csv_rows(unfenced(answer).strip())
    widths = {len(row) for row in rows}
    return Worth(float(len(rows) >= 2 and len(widths) == 1 and widths.pop() >= 2))


def _markdown_rows(lines: list[str]) -> list[list[str]]:
    """The heading and the rows under its rule; nothing where there is no rule, or a line is no row."""
    if len(lines) < 3 or not all("|" in line for line in lines):
        return []
    heading, rule, *rows = [re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")) for line in lines]
    if len(rule) != len(heading) or not all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in rule):
        return []
    return [heading, *rows]


def _csv_rows(text: str) -> list[list[str]]:
    try:
        return [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except csv.Error:
        return []


def product(suite: Product, answer: str, _: str) -> Worth:
    """1 where every row of the table holds the product of its factors, each within the scale; unreadable without them.

    Source: IEC 60812 (failure modes and effects analysis), risk priority number = S x O x D.
    """
    lines = [line for line in unfenced(answer).strip().splitlines() if line.strip()]
    heading, *rows = _markdown_rows(lines) or [[]]
    names = [cell.strip().casefold() for cell in heading]
    wanted = [name.casefold() for name in (*suite.factors, suite.product)]
    if not rows or any(names.count(name) != 1 for name in wanted) or any(len(row) != len(names) for row in rows):
        return Worth(0.0, readable=False)
    places = [names.index(name) for name in wanted]
    return Worth(float(all(_multiplies(suite, [row[place].strip() for place in places]) for row in rows)))


def _multiplies(suite: Product, cells: list[str]) -> bool:
    """Whether the last cell is the product of the others, which are whole numbers within the scale."""
    if not all(re.fullmatch(r"[+-]?[0-9]{1,9}", cell) for cell in cells):
        return False
    *factors, given = (int(cell) for cell in cells)
    return math.prod(factors) == given and all(suite.least <= factor <= suite.greatest for factor in factors)


def length(_: Length, answer: str, right: str) -> Worth:
    """The shorter one's words over the longer one's; 1 where both are empty."""
    given, wanted = len(answer.split()), len(right.split())
    return Worth(min(given, wanted) / max(given, wanted) if given or wanted else 1.0)


def agreement(_: Agreement, answer: str, right: str) -> Worth:
    """1 where both say the same, but for case and white space."""
    return Worth(float(same_answer(answer, right)))


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are the same, but for case and white space."""
    return first.casefold().split() == second.casefold().split()


ANSWER_METRICS: dict[type, Callable[[Any, str, str], Worth]] = {
    ExactMatch: exact_match,
    TokenF1: token_f1,
    Rouge: rouge,
    Bleu: bleu,
    Chrf: chrf,
    Classification: classification,
    Regex: regex,
    ValidJson: valid_json,
    ValidTable: valid_table,
    Product: product,
    Length: length,
    Agreement: agreement,
}


def worth_of(suite: Any, answer: str, right: str) -> Worth:
    """What an answer is worth by its suite's metric; an empty one is wrong, whatever the metric makes of it."""
    found = ANSWER_METRICS[type(suite)](suite, answer, right)
    return found if answer.strip() else Worth(0.0, found.readable)


# Metrics whose items are no shares in [0, 1]: their unit. Of these, lower is better.
NATS = {"cross_entropy": "nats per byte", "perplexity": "nats per token"}
