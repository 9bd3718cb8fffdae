"""How a sweep's figures read, and what it recommends in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from sweeps.importance import Importance
from sweeps.pareto import (
    ORDER,
    Scored,
    best_full,
    find_knee,
    name_of,
    on_validation,
    pareto_front,
    rank,
    told_apart,
)
from sweeps.result import Amount, Finalist, Measured, Point, Scalar, SweepResult, Trial, Winner
from training.reporting.formatting import duration_text


def gain_text(result: SweepResult, value: float) -> str:
    """A gain in percentage points, or in nats."""
    return f"{signed(100 * value, 1)} pts" if result.gain_unit == "share" else signed(value, 3)


def gain_interval(result: SweepResult, gain: Measured) -> str:
    scale, digits = (100, 1) if result.gain_unit == "share" else (1, 3)
    return f"[{signed(scale * gain.low, digits)}, {signed(scale * gain.high, digits)}]"


def retention_text(value: float) -> str:
    return f"{100 * value:.1f} %"


def retention_interval(kept: Measured) -> str:
    return f"[{100 * kept.low:.1f}, {100 * kept.high:.1f}]"


def signed(value: float, digits: int) -> str:
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"


def value_text(value: Scalar) -> str:
    """A value of a setting as one would write it."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def config_text(trial: Trial) -> str:
    """The setting in one line, by the last parts of its paths where they tell them apart."""
    short = [short_path(path) for path in trial.config]
    named = zip(trial.config.items(), short, strict=True)
    return ", ".join(f"{last if short.count(last) == 1 else path} {value_text(v)}" for (path, v), last in named)


def short_path(path: str) -> str:
    """The last part of a dotted path."""
    return path.rpartition(".")[2]


def hours_text(hours: float) -> str:
    """GPU hours, small ones in minutes."""
    if hours == 0:
        return "0"
    return f"{60 * hours:.1f} min" if hours < 0.5 else f"{hours:,.2f} h"


def tokens_text(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1_000_000 else f"{tokens:,}"


def money_text(gpu_hours: float, price: float | None) -> str:
    """What GPU hours cost at a price an hour."""
    return "" if price is None else f"{gpu_hours * price:,.2f}"


def headline(result: SweepResult) -> tuple[str, str]:
    """The contract's state that the page is coloured by, and the verdict in one line."""
    winner = winning(result)
    if winner and result.winner:
        open_ = "" if winner.contract == "kept" else " (contract undecided)"
        return winner.contract, f"Winner: {described(result.winner)}{open_}"
    if result.finished is None:
        return "undecided", f"Under way: {len(result.searched)} trials so far, no winner yet"
    if not result.finalists and any(point.contract == "kept" for point in on_validation(result.points)):
        return "undecided", "No winner: no finalist was run under further seeds"
    return "broken", "No winner: nothing that was tried keeps the contract"


def described(scored: Point | Finalist | Winner) -> str:
    return scored.strategy if scored.alpha in (None, 1.0) else f"{scored.strategy} at alpha {scored.alpha:g}"


def winning(result: SweepResult) -> Finalist | None:
    """The winner's figures on validation, pooled over its seeds."""
    if result.winner is None:
        return None
    key = (result.winner.trial, result.winner.alpha)
    return next((f for f in on_validation(result.finalists) if (f.trial, f.alpha) == key), None)


def recommendation(result: SweepResult, found: Sequence[Importance] = ()) -> list[str]:
    """What to do, and how sure that is, a sentence or two each."""
    winner = winning(result)
    if winner is None or result.winner is None:
        return [*_without_winner(result), *result.notes]
    lines = [_use(result, winner), _compared_with_full(result, winner), _on_test(result, result.winner)]
    lines += [_rivals(result, winner), _knee(result, winner), *_mattered(found)]
    return [*(line for line in lines if line), *result.notes]


def _use(result: SweepResult, winner: Finalist) -> str:
    trial = result.trial(winner.trial)
    seeds = (
        f"over {len(winner.seeds)} seeds" if len(winner.seeds) > 1 else "under one seed, which says little of others"
    )
    wise = "" if winner.alpha in (None, 1.0) else f", interpolated with the base at alpha {winner.alpha:g}"
    return (
        f"Use {winner.strategy} with {config_text(trial)}{wise}. On validation, {seeds}, it gains "
        f"{gain_text(result, winner.gain.value)} {gain_interval(result, winner.gain)} and keeps "
        f"{retention_text(winner.retention.value)} {retention_interval(winner.retention)} of what the base knew on the "
        f"retention suite that lost most. It was chosen because {result.winner.reason if result.winner else ''}."
    )


def _compared_with_full(result: SweepResult, winner: Finalist) -> str:
    full = best_full(result)
    if full is None or full.gain.value <= 0 or (full.strategy == winner.strategy and full.trial == winner.trial):
        return ""
    return (
        f"That is {100 * winner.gain.value / full.gain.value:.0f} % of what plain full tuning gains at its best rate "
        f"({gain_text(result, full.gain.value)}), which keeps {retention_text(full.retention.value)}."
    )


def _on_test(result: SweepResult, winner: Winner) -> str:
    if winner.test is None:
        return "It has not been scored on test: what it was chosen on flatters it."
    told = {"kept": "keeps the contract", "broken": "breaks the contract", "undecided": "leaves the contract undecided"}
    return (
        f"On test, scored once, it gains {gain_text(result, winner.test.gain.value)} "
        f"{gain_interval(result, winner.test.gain)}, keeps {retention_text(winner.test.retention.value)} "
        f"{retention_interval(winner.test.retention)}, and {told[winner.test.contract]}."
    )


def _rivals(result: SweepResult, winner: Finalist) -> str:
    """A finalist that cannot be told apart in gain, keeps the contract and retains more."""
    others = [f for f in rank(on_validation(result.finalists)) if f != winner and f.contract == "kept"]
    rivals = [f for f in others if not told_apart(winner, f) and f.retention.value > winner.retention.value]
    if not rivals:
        return ""
    rival = max(rivals, key=lambda f: f.retention.value)
    return (
        f"Where keeping matters more than gaining, {described(rival)} is not told apart in gain "
        f"({gain_text(result, rival.gain.value)}) and keeps {retention_text(rival.retention.value)}."
    )


def _knee(result: SweepResult, winner: Finalist) -> str:
    knee = find_knee(pareto_front(on_validation(result.points)))
    if knee is None or (knee.trial, knee.alpha) == (winner.trial, winner.alpha):
        return ""
    return (
        f"Without the contract the best trade would be {described(knee)} ({name_of(knee)}), the knee of the front: "
        f"{gain_text(result, knee.gain.value)} for {retention_text(knee.retention.value)} kept."
    )


def _mattered(found: Sequence[Importance]) -> Iterator[str]:
    for one in found:
        if one.strategy is None and not one.refused:
            told = [f"{short_path(s.path)} ({100 * s.share:.0f} %)" for s in one.shares if s.matters]
            if told:
                yield f"What mattered for {one.measure}: {', '.join(told)} of the variance over settings."
            else:
                yield f"No dimension's effect on {one.measure} is told from chance over {one.num_trials} settings."


def _without_winner(result: SweepResult) -> Iterator[str]:
    nearest = _nearest(result.finalists) or _nearest(result.points)
    if result.finished is None:
        return
    if nearest is None:
        yield "No trial finished, so there is nothing to recommend; the causes are below."
        return
    if isinstance(nearest, Point) and nearest.contract == "kept":
        best = rank(on_validation(result.points))[0]
        yield (
            f"The best single trial that keeps the contract is {described(best)} ({name_of(best)}), under one seed and "
            f"not tested: it gains {gain_text(result, best.gain.value)} {gain_interval(result, best.gain)} and keeps "
            f"{retention_text(best.retention.value)} {retention_interval(best.retention)}."
        )
        return
    yield (
        f"Nothing that was tried keeps the contract. The nearest is {described(nearest)} ({name_of(nearest)}): it "
        f"gains {gain_text(result, nearest.gain.value)} and keeps {retention_text(nearest.retention.value)}."
    )
    reasons = nearest.reasons if isinstance(nearest, Finalist) else ()
    yield from (f"It fails because {reason}." for reason in reasons)
    yield "Loosen the contract, add protections or lower learning rates to the space, or give the sweep more tokens."


def _nearest(scored: Iterable[Scored]) -> Scored | None:
    """What is nearest to keeping the contract: by verdict, then by what it retains."""
    return max(on_validation(scored), key=lambda one: (-ORDER[one.contract], one.retention.value), default=None)


def curve_of(result: SweepResult, trial: str) -> list[Point]:
    """A trial's points from the base's side to its own, alphas ascending."""
    own = [point for point in on_validation(result.points) if point.trial == trial]
    return sorted(own, key=lambda point: 1.0 if point.alpha is None else point.alpha)


def budget_rows(result: SweepResult, price: float | None) -> list[tuple[str, str]]:
    """What was spent, and of how much."""
    spent, asked = result.spent, result.budget
    rows = [
        ("trials", _of(str(len(result.searched)), None if asked.trials is None else str(asked.trials))),
        ("tokens", _of(tokens_text(spent.tokens or 0), None if asked.tokens is None else tokens_text(asked.tokens))),
    ]
    reruns = len(result.trials) - len(result.searched)
    if reruns:
        rows.insert(1, ("finalists again", f"{reruns} under other seeds"))
    if _gpu(spent) or asked.gpu_hours:
        most = None if asked.gpu_hours is None else hours_text(asked.gpu_hours)
        rows.append(("GPU time", _of(hours_text(_gpu(spent)), most)))
    if price is not None:
        rows.append((f"price, at {price:g} a GPU hour", money_text(_gpu(spent), price)))
    if spent.hours is not None:
        wall = _of(duration_text(3600 * spent.hours), asked.hours and duration_text(3600 * asked.hours))
        rows.append(("wall time", wall))
    return rows


def _gpu(amount: Amount) -> float:
    return amount.gpu_hours or 0.0


def _of(spent: str, asked: str | float | None) -> str:
    return f"{spent} of {asked}" if asked else spent


def causes(result: SweepResult, state: str) -> list[tuple[str, list[str]]]:
    """(cause, names of the trials) of those that failed, or were stopped; the commonest first."""
    found: dict[str, list[str]] = {}
    for trial in result.trials:
        if trial.state == state:
            found.setdefault(trial.cause or "", []).append(trial.name)
    return sorted(found.items(), key=lambda entry: -len(entry[1]))


def log_share(value: float, low: float, high: float, log: bool) -> float:
    """Where a value lies between two, from 0 to 1."""
    if high <= low:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)
