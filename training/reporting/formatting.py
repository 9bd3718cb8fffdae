"""How scores, changes and other values read in the terminal and in the HTML report, and which items are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from training.evaluation.scorecard import Item, Scorecard, SuitePart, SuiteScore
from training.reporting.wise import WiseCurve

MAX_TEXT_CHARACTERS = 2000
_METRICS = {
    "exact_match": "exact match",
    "greedy_match": "greedy match",
    "cross_entropy": "cross-entropy",
    "token_f1": "token F1",
    "rouge": "ROUGE",
    "bleu": "BLEU",
    "chrf": "chrF",
    "json": "valid JSON",
    "table": "valid table",
    "harness": "lm-evaluation-harness",
}
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Example:
    """One item with the suite that it belongs to."""

    suite: SuiteScore
    item: Item


def is_share(suite: SuiteScore) -> bool:
    """Whether the scores are shares in [0, 1]; otherwise they are nats per byte or per token."""
    return suite.unit == "share"


def metric_text(suite: SuiteScore) -> str:
    return _METRICS.get(suite.metric, suite.metric.replace("_", " "))


def score_text(suite: SuiteScore, value: float) -> str:
    """A share as a percentage, nats with three decimals, and the perplexity that they are the logarithm of."""
    if suite.metric == "perplexity":
        return f"{value:.3f} (ppl {math.exp(value):.4g})" if value < 700 else f"{value:.3f}"
    return f"{100 * value:.1f} %" if is_share(suite) else f"{value:.3f}"


def change_text(suite: SuiteScore, value: float) -> str:
    """A signed change in percentage points, or in nats per byte; positive is better."""
    return f"{_signed(suite, value)} pts" if is_share(suite) else _signed(suite, value)


def amount_text(unit: str, value: float) -> str:
    """A signed amount in a suite's unit: percentage points of a share, else nats."""
    return (f"{100 * value:+.1f} pts" if unit == "share" else f"{value:+.4f}").replace("-", "−")


def interval_text(suite: SuiteScore) -> str:
    """The 95 % interval of the change, in the change's unit."""
    low, high = (_signed(suite, value) for value in suite.interval)
    return f"[{low}, {high}]"


def part_interval_text(suite: SuiteScore, part: SuitePart) -> str:
    """The 95 % interval of one task's change."""
    return interval_text(suite.model_copy(update={"interval": part.interval}))


def part_lines(scorecard: Scorecard, limit: int = 3) -> Iterator[str]:
    """Of every suite that is a group of tasks, the tasks that lost most; the page and scorecard.json hold all."""
    for suite in scorecard.suites:
        worst = sorted((part for part in suite.parts if part.change < 0), key=lambda part: part.change)[:limit]
        told = "; ".join(
            f"{part.name} {change_text(suite, part.change)} {part_interval_text(suite, part)}" for part in worst
        )
        if suite.parts:
            yield f"{suite.name}: {len(suite.parts)} tasks, " + (f"most lost {told}" if told else "none of them lost")


def threshold_text(suite: SuiteScore) -> str:
    """What the contract asks of the suite."""
    amount = f"{100 * suite.threshold:.1f} pts" if is_share(suite) else f"{suite.threshold:.3f}"
    return f"gain ≥ {amount}" if suite.role == "target" else f"loss ≤ {amount}"


def least_change(suite: SuiteScore) -> float:
    """The smallest change that keeps the promise: the gain asked for, or minus the loss allowed."""
    return suite.threshold if suite.role == "target" else -suite.threshold


SIGNS = {"kept": "✓", "broken": "✗", "undecided": "?"}


def kept_text(verdict: str) -> str:
    # A word and a sign, so that nothing hangs on colour.
    return f"{SIGNS[verdict]} {verdict}"


def verdict_text(scorecard: Scorecard) -> str:
    return f"Contract {scorecard.contract.verdict}"


def reasons_of(scorecard: Scorecard) -> tuple[str, ...]:
    """Why the verdict is what it is, one sentence each, then what to know before trusting the figures."""
    return (*(scorecard.contract.reasons or _kept_reasons(scorecard)), *notes_of(scorecard))


def _kept_reasons(scorecard: Scorecard) -> tuple[str, ...]:
    gained = "Every target suite gained what the contract asks."
    if any(suite.role == "retention" for suite in scorecard.suites):
        return (gained, "No retention suite lost more than the contract allows.")
    return (gained, "There is no retention suite, so nothing is said about forgetting.")


def notes_of(scorecard: Scorecard) -> tuple[str, ...]:
    """What the suites' figures cannot show, by suite."""
    return tuple(f"{suite.name}: {note}." for suite in scorecard.suites for note in suite.notes)


def forgetting_lines(scorecard: Scorecard) -> tuple[str, ...]:
    """What was kept over all retention suites, one sentence each; nothing for a scorecard of version 1."""
    lines = list(kl_lines(scorecard))
    kept = scorecard.forgetting
    if kept is None:
        return tuple(lines)
    if kept.retention is not None and kept.retention_unclipped is not None:
        lines.append(f"Retention {kept.retention:.1%} (unclipped {kept.retention_unclipped:.1%}), chance-corrected.")
    if kept.general_ability_delta is not None:
        lines.append(f"General-ability delta {100 * kept.general_ability_delta:+.1f} pts (mean change, TRACE).")
    lines += [f"{name}: cross-entropy changed by {rise:+.4f} nats." for name, rise in kept.rise_in_nats.items()]
    if kept.left_out:
        lines.append(f"Left out of retention, for the base is not above chance: {', '.join(kept.left_out)}.")
    return tuple(lines)


def data_line(scorecard: Scorecard) -> str:
    """What the run was trained on and what was left out of it; nothing where the scorecard does not say."""
    data = scorecard.data
    if data is None:
        return ""
    left_out = [(data.num_faulty, "faulty rows"), (data.num_untaught, "rows without target tokens")]
    told = " and ".join(f"{count:,} {what}" for count, what in left_out if count)
    parts = [f"Trained on {data.num_examples:,} examples"]
    parts += [f"{told} were left out"] if told else []
    parts += [f"{data.num_overlong:,} rows were longer than max_length"] if data.num_overlong else []
    return f"{'; '.join(parts)}."


def kl_lines(scorecard: Scorecard) -> Iterator[str]:
    """How far the tuned model's distributions are from its base's, a sentence for each role of prompts."""
    for role, kl in scorecard.kl_to_base.items():
        low, high = kl.interval
        looked_at = f"{kl.num_tokens:,} tokens of {kl.num_items:,} items"
        yield f"KL to the base on {role} prompts {kl.nats:.4f} nats per token [{low:.4f}, {high:.4f}] ({looked_at})."


def significance_text(suite: SuiteScore) -> str:
    """Items lost and won, and how likely as much is by chance (Holm-corrected over the suites)."""
    if suite.p_holm is None:
        return ""
    words = ("lost", "won") if is_share(suite) else ("worse", "better")
    chance = "p < 0.001" if suite.p_holm < 0.001 else f"p = {suite.p_holm:.3f}"
    return f"{suite.lost} {words[0]}, {suite.won} {words[1]}, {chance}"


def wise_lines(curve: WiseCurve) -> tuple[str, ...]:
    """Which alpha to take, one sentence each."""
    best = "No alpha tried keeps the contract."
    if curve.best is not None:
        best = f"Of those that keep the contract, alpha {curve.best:g} gains most (of several alike, the smallest)."
    if curve.knee is None:
        return (best, "There is no knee: no alpha between the ends keeps more of the gain than it loses.")
    return (best, f"The knee is at alpha {curve.knee:g}: the largest share of the gain less the share of the loss.")


def item_score_text(suite: SuiteScore, score: float) -> str:
    """Right or wrong for a whole share; otherwise the score."""
    if is_share(suite) and score in (0.0, 1.0):
        return "✓ right" if score else "✗ wrong"
    return score_text(suite, score)


def improvement(suite: SuiteScore, item: Item) -> float:
    """How much better the tuned model did on an item, in the metric's unit; positive is better."""
    difference = item.tuned_score - item.base_score
    return difference if suite.higher_is_better else -difference


def most_changed(suite: SuiteScore) -> list[Item]:
    """All items of a suite, those whose score changed most first, then by index."""
    return sorted(suite.items, key=lambda item: (-abs(improvement(suite, item)), item.index))


def pick_examples(scorecard: Scorecard, limit: int = 3) -> list[Example]:
    """The most changed answers of the target suites, taken from the suites in turn (their units do not compare)."""
    targets = [suite for suite in scorecard.suites if suite.role == "target"]
    ranked = [
        (rank, order, Example(suite, item))
        for order, suite in enumerate(targets)
        for rank, item in enumerate(item for item in most_changed(suite) if item.base_answer != item.tuned_answer)
    ]
    return [example for _, _, example in sorted(ranked, key=lambda entry: entry[:2])[:limit]]


def clip(text: str, limit: int = MAX_TEXT_CHARACTERS) -> str:
    """A text of at most `limit` characters; a longer one says how long it is."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters in all)"


def printable(text: str) -> str:
    """The text without characters that could steer a terminal; an answer may hold any."""
    return "".join(char if char.isprintable() or char in "\n\t" + _JOINERS else "�" for char in text)


def duration_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def value_text(key: str, value: Any) -> str:
    """A value of a JSON file as a reader wants it; the key's ending tells its unit."""
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return clip(", ".join(value_text(key, part) for part in value))
    if isinstance(value, int | float) and key.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.2f} MiB"
    if isinstance(value, int | float) and key.endswith("seconds"):
        return duration_text(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.6g}" if isinstance(value, float) else clip(str(value))


def flatten(value: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted key, text) of every leaf of a nested JSON object, in its own order."""
    for key, part in value.items():
        path = f"{prefix}{key}"
        parts = dict(enumerate(part)) if isinstance(part, list) and any(isinstance(p, dict) for p in part) else part
        if isinstance(parts, dict) and parts:
            yield from flatten({str(name): leaf for name, leaf in parts.items()}, f"{path}.")
        else:
            yield path, value_text(key, part)


def _signed(suite: SuiteScore, value: float) -> str:
    digits = 1 if is_share(suite) else 3
    rounded = round(100 * value if is_share(suite) else value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{rounded:+.{digits}f}".replace("-", "−")
