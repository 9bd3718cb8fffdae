"""One model's suites scored by several processes at once, where there is room: split by what they cost, joined again.

A process loads the model, so a part is worth one only where its suites take longer than that. Suites over one file
stay together, for a prompt that two of them ask is answered once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.data.items import read_items
from training.evaluation.scoring import ScoreJob
from training.spec import RunSpec
from training.suite_spec import Accuracy, AnySuite, CrossEntropy, Harness, Perplexity
from training.workspace import read_json, write_json

# Costs in tokens that are written one after the other; what is only read goes through the model at once.
READ = 4
CHOICES = 4
HARNESS_ITEMS = 1000  # of a task whose items are not counted for this
WORTH_A_PROCESS = 4000


def split_job(job: ScoreJob, spec: RunSpec, places: int) -> list[ScoreJob]:
    """The job itself, or parts of it that leave their answers beside its target; the first one is the dearest.

    Args:
        places: how many processes there is room for.
    """
    groups = _together(spec.suites.every)
    total = sum(cost for _, cost in groups)
    count = min(places, len(groups), total // WORTH_A_PROCESS)
    if count < 2:
        return [job]
    parts: list[tuple[list[str], int]] = [([], 0)] * count
    for names, cost in sorted(groups, key=lambda group: -group[1]):
        least = min(range(count), key=lambda index: parts[index][1])
        parts[least] = ([*parts[least][0], *names], parts[least][1] + cost)
    return [_part(job, tuple(names), is_first=index == 0) for index, (names, _) in enumerate(parts)]


def _together(suites: Sequence[AnySuite]) -> list[tuple[list[str], int]]:
    """The names of suites that are scored in one process, those over one file, and what they cost."""
    found: dict[str, tuple[list[str], int]] = {}
    for suite in suites:
        key = suite.harness if isinstance(suite, Harness) else str(suite.path)
        names, cost = found.get(key, ([], 0))
        found[key] = ([*names, suite.name], cost + cost_of(suite))
    return list(found.values())


def cost_of(suite: AnySuite) -> int:
    """Roughly what a suite costs, in written tokens."""
    if isinstance(suite, Harness):
        return (suite.limit or HARNESS_ITEMS) * CHOICES * READ
    items = len(read_items(suite))
    if isinstance(suite, Accuracy):
        return items * CHOICES * READ
    return items * (READ if isinstance(suite, CrossEntropy | Perplexity) else suite.max_new_tokens)


def _part(job: ScoreJob, names: tuple[str, ...], *, is_first: bool) -> ScoreJob:
    """A part with a file and a log of its own, named by its suites, so that it is found again."""
    target, log = Path(job.target), Path(job.log)
    digest = hashlib.sha256("\n".join((*names, str(is_first))).encode()).hexdigest()[:8]
    beside = target.with_name(f".{target.stem}.{digest}.part.json")
    own_log = log.with_name(f"{log.stem}-{digest}{log.suffix}")
    return replace(job, suites=names, is_first=is_first, target=str(beside), log=str(own_log))


def join_parts(job: ScoreJob, spec: RunSpec, parts: Sequence[ScoreJob]) -> float:
    """Write the answers of all parts to the job's target, as one process would have; the seconds that they took in all.

    A job that was not split has written them itself.
    """
    found = [read_json(Path(part.target)) for part in parts]
    seconds = sum(float(part["seconds"]) for part in found)
    if list(parts) != [job]:
        answers = {name: given for part in found for name, given in part["suites"].items()}
        ordered = {suite.name: answers[suite.name] for suite in spec.suites.every}
        first = next(part for part in found if part["probes"])
        write_json(Path(job.target), {**first, "suites": ordered, "seconds": seconds})
        for part in parts:
            Path(part.target).unlink()
    return seconds
