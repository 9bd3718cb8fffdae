"""Trains a run to its end through failures: attempts, each with as many workers as the cluster has room for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from training.errors import Left, TenureError
from training.events import log_event
from training.plan import Plan
from training.retries import cause_of, smaller_micro_batch, wait_s, worker_counts
from training.spec import RunSpec, Scaling
from training.watch import hung_since
from training.workspace import RunFolder

_LOOK_EVERY_S = 5.0
_SETTLE_S = 15.0  # in which workers that are gone give back what they held
_GROW_AFTER_S = 60.0


@dataclass(frozen=True)
class Hands:
    """What an attempt needs from outside: how to plan anew, to train once, to see the cluster's room, and to tell."""

    replan: Callable[[int, int | None], Plan]
    """A plan for so many workers with that micro-batch; None leaves it to the plan."""
    train: Callable[[Plan, Scaling], None]
    """Train until the artifact stands, or raise."""
    room: Callable[[Scaling], int]
    """Workers that the cluster has room for now."""
    tell: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep


def train_to_the_end(run: RunFolder, spec: RunSpec, plan: Plan, hands: Hands) -> None:
    """Attempt until the artifact stands.

    After a failure that another attempt may mend there is one, from the last whole checkpoint: up to
    `scaling.max_failures` of them, and besides these as many as the micro-batch can be made smaller.

    Raises:
        TenureError: the last failure, or one that would come again.
    """
    failures, micro = 0, None
    while True:
        plan = fitted(run, spec, plan, micro, hands)
        started_s = time.time()
        scaling = spec.scaling.model_copy(update={"workers": plan.workers})
        log_event(run, "attempt", workers=plan.workers, zero_stage=plan.zero_stage, micro=plan.micro_batch_size)
        try:
            with grown(run, spec, plan, hands) as has_grown:
                hands.train(plan, scaling)
            log_event(run, "trained")
            return
        except Left:
            if not has_grown.is_set():
                log_event(run, "left")
                raise
            run.notice.unlink(missing_ok=True)
        except TenureError as error:
            smaller = smaller_micro_batch(spec, plan) if cause_of(error, False) == "memory" else None
            micro, failures = smaller or micro, failures + (smaller is None)
            _wait(run, spec, error, failures, smaller, bool(hung_since(run.logs, started_s)), hands)


def _wait(
    run: RunFolder, spec: RunSpec, error: TenureError, failures: int, smaller: int | None, hung: bool, hands: Hands
) -> None:
    """Write a failure down and wait before the next attempt; raise it where there is none."""
    cause = cause_of(error, hung)
    ends = cause is None or failures > spec.scaling.max_failures or (cause == "memory" and smaller is None)
    told = error.problems[0].what
    if ends or cause is None:
        log_event(run, "failed", cause=cause, what=told)
        raise error
    seconds = wait_s(cause, max(1, failures))
    log_event(run, "failure", cause=cause, what=told, failures=failures, again_in_s=seconds, micro=smaller)
    beside = f", with micro-batches of {smaller}" if smaller else ""
    hands.tell(f"{_WORDS[cause]}: {told}; again in {seconds:.0f} s{beside}")
    hands.sleep(seconds)


_WORDS = {
    "lost": "a worker is gone",
    "hang": "no progress; the stacks are in logs/stacks-*.txt",
    "memory": "out of memory",
    "storage": "the storage fails",
}


def fitted(run: RunFolder, spec: RunSpec, plan: Plan, micro: int | None, hands: Hands) -> Plan:
    """The plan for as many workers as there is room for; waiting is left to Ray."""
    counts = worker_counts(spec)
    chosen = counts[0] if len(counts) == 1 else _count(run, spec.scaling, counts, hands)
    if chosen == plan.workers and (micro is None or micro == plan.micro_batch_size):
        return plan
    return hands.replan(chosen, micro)


def _count(run: RunFolder, scaling: Scaling, counts: list[int], hands: Hands) -> int:
    """As many as there is room for, once those that are gone had time to give theirs back; or else the fewest.

    The fewest are asked of Ray where there is no room: clusters that grow by themselves grow for what is asked for.
    """
    waited = 0.0
    while (room := hands.room(scaling)) < counts[0] and waited < _SETTLE_S:
        hands.sleep(_LOOK_EVERY_S)
        waited += _LOOK_EVERY_S
    if room < counts[-1]:
        hands.tell(f"there is room for {room} workers; asking for {counts[-1]}")
        log_event(run, "waiting", room=room, least=counts[-1])
        return counts[-1]
    return next(count for count in counts if count <= room)


@contextmanager
def grown(run: RunFolder, spec: RunSpec, plan: Plan, hands: Hands) -> Iterator[threading.Event]:
    """While a run trains with fewer workers than it may: ask it to leave once there is room for more."""
    has_grown, ended = threading.Event(), threading.Event()
    larger = [count for count in worker_counts(spec) if count > plan.workers]

    def look() -> None:
        started = time.monotonic()
        while not ended.wait(_LOOK_EVERY_S):
            more = next((count for count in larger if count <= plan.workers + hands.room(spec.scaling)), None)
            if more and time.monotonic() - started > _GROW_AFTER_S:
                log_event(run, "resize", workers=plan.workers, room_for=more)
                has_grown.set()
                run.notice.touch()
                return

    looks = threading.Thread(target=look, daemon=True)
    if larger:
        looks.start()
    try:
        yield has_grown
    finally:
        ended.set()
        if larger:
            looks.join()
