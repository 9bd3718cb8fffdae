"""Watches over a search: budgets, trials that wait for resources that never come, what stopped or killed a trial."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from ray.tune import Callback, Stopper
from rich.console import Console

from sweeps.folder import Record, SweepFolder
from sweeps.price import missing
from sweeps.pricing import needs
from sweeps.result import Amount, Trial
from sweeps.spec import SweepSpec
from sweeps.tracking import log_trial
from training.errors import TenureError, fail
from training.tracking import tracking_id_of
from training.workspace import Workspace, read_json


def _whole_cluster() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())


def amount_spent(folder: SweepFolder, under_way: Iterable[str] = ()) -> Amount:
    """What the trials that have ended took; those of the search alone are counted, finalists come on top.

    Args:
        under_way: names of trials that have not ended, to be added up to their last rung.
    """
    trials = [record.trial for record in folder.records()]
    known = {trial.name for trial in trials}
    trials += [noted[0] for name in under_way if name not in known and (noted := folder.noted(name))]
    return Amount(
        trials=sum(trial.rerun_of is None for trial in trials),
        gpu_hours=sum(trial.gpu_hours for trial in trials),
        hours=_hours(folder),
        tokens=sum(trial.tokens for trial in trials),
    )


def _hours(folder: SweepFolder) -> float:
    """Hours that the sweep has run, over all its sessions: the trials' own hours where they ran side by side overlap,
    so the clock is kept in a file."""
    clock = folder.path / "clock.json"
    return float(read_json(clock)["seconds"]) / 3600 if clock.is_file() else 0.0


def spent(sweep: SweepSpec, folder: SweepFolder) -> str | None:
    """Which bound of the budget is reached; None while there is some left."""
    return over(sweep, amount_spent(folder))


def over(sweep: SweepSpec, used: Amount) -> str | None:
    """Which bound of the budget (but that of trials) an amount reaches."""
    for name in ("gpu_hours", "hours", "tokens"):
        bound, value = getattr(sweep.budget, name), getattr(used, name)
        if bound is not None and value is not None and value >= bound:
            return f"the budget of {bound:g} {name.replace('_', ' ')} is spent"
    return None


class Budgeted(Stopper):  # type: ignore[misc]
    """Ends the search when a bound of the budget is reached, trials under way included."""

    def __init__(self, sweep: SweepSpec, folder: SweepFolder) -> None:
        before = amount_spent(folder)
        self._sweep, self._started = sweep, time.monotonic()
        self._tokens, self._gpu_hours, self._hours = before.tokens or 0, before.gpu_hours or 0.0, before.hours or 0.0
        self._live = {trial.name: (trial.tokens, trial.gpu_hours) for trial in folder.under_way()}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._live[result["trial"]] = (result["tokens"], result["gpu_hours"])
        return False

    def stop_all(self) -> bool:
        used = Amount(
            tokens=self._tokens + sum(tokens for tokens, _ in self._live.values()),
            gpu_hours=self._gpu_hours + sum(hours for _, hours in self._live.values()),
            hours=self._hours + (time.monotonic() - self._started) / 3600,
        )
        return over(self._sweep, used) is not None


class Watch(Callback):  # type: ignore[misc]
    """What happens to the trials of a search, told on the screen and kept in their records."""

    def __init__(self, sweep: SweepSpec, folder: SweepFolder, workspace: Workspace, console: Console) -> None:
        self._sweep, self._folder, self._workspace, self._console = sweep, folder, workspace, console
        self._last_running = time.monotonic()
        self._ticked = time.monotonic()
        self._problem: TenureError | None = None
        self._first_rung: dict[str, bool] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes down how to restore a tuner. A sweep restores itself, from its records.
        return {}

    def notes(self) -> tuple[str, ...]:
        """What a reader of the result should know."""
        if self._first_rung and not any(self._first_rung.values()):
            count = len(self._first_rung)
            return (f"none of {count} trials kept the retention that the contract asks for at the first rung",)
        return ()

    def raise_what_stopped_it(self) -> None:
        """Raise the fault for which the search was ended."""
        if self._problem is not None:
            raise self._problem

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        self._keep_time(now)
        if not self._waits(trials):
            self._last_running = now
        elif now - self._last_running > self._sweep.wait_s:
            raise self._never_came(now - self._last_running)

    def _waits(self, trials: list[Any]) -> bool:
        """Whether no trial can start; one of several workers runs, and waits for them itself."""
        if self._sweep.run.scaling.workers > 1:
            return bool(missing(_whole_cluster(), needs(self._sweep)))
        states = {trial.status for trial in trials}
        return "PENDING" in states and "RUNNING" not in states

    def _keep_time(self, now: float) -> None:
        from training.workspace import write_json

        if now - self._ticked >= 1.0:
            clock = self._folder.path / "clock.json"
            before = float(read_json(clock)["seconds"]) if clock.is_file() else 0.0
            write_json(clock, {"seconds": before + now - self._ticked})
            self._ticked = now

    def _never_came(self, seconds: float) -> TenureError:
        import ray

        wants = needs(self._sweep)
        several = self._sweep.run.scaling.workers > 1
        free, word = (_whole_cluster(), "in all") if several else (ray.available_resources(), "free")
        short = {name: free.get(name, 0.0) for name, amount in wants.items() if free.get(name, 0.0) < amount}
        told = ", ".join(f"{wants[name]:g} {name} ({value:g} {word})" for name, value in short.items()) or "a free node"
        what = f"no trial could start for {seconds:.0f} s: each waits for {told}"
        return fail(what, "scaling", "free it, join nodes, lower what a trial claims, or raise wait_s")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        name = result["trial"]
        figures = f"gain {result['gain']:+.4f}  retention {result['retention']:.4f}"
        record = self._folder.read(name)
        ended = record.trial.state if record else f"rung {result['rung']}"
        cause = f"  ({record.trial.cause})" if record and record.trial.cause else ""
        told = cause.strip() if record and record.trial.state == "failed" else figures + cause
        self._console.print(f"{name}  {self._strategy(trial):<16} {ended:<9} {told}")
        if result["rung"] == 0 and "kept" in result and name not in self._first_rung:
            self._first_rung[name] = bool(result["kept"])
            if len(self._first_rung) == self._rounds(trials) and not any(self._first_rung.values()):
                self._console.print("[yellow]no trial kept the contract's retention at the first rung[/]")

    def _rounds(self, trials: list[Any]) -> int:
        from sweeps.presets import strategies

        return min(len(trials), len(strategies(self._sweep)))

    def _strategy(self, trial: Any) -> str:
        return str(trial.config["job"]["strategy"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = str(trial.config["job"]["name"])
        if self._folder.read(name) is None and not self._goes_on(trial):
            bound = spent(self._sweep, self._folder)
            self.close(name, "stopped", bound or "halved: others of its rung were better")

    def _goes_on(self, trial: Any) -> bool:
        """Whether it has come to the end of its generation, and waits for the next."""
        job = trial.config["job"]
        return job["generation"] is not None and job["generation"] in self._folder.noted_curve(job["name"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = str(trial.config["job"]["name"])
        if self._folder.read(name) is None:
            self.close(name, "failed", "killed: its process died each time that it was begun")
            self._console.print(f"{name}  {self._strategy(trial):<16} failed    its process died")

    def close(self, name: str, state: Any, cause: str) -> None:
        """Write the record of a trial that did not write its own, from what it noted at its last rung."""
        noted = self._folder.noted(name)
        if noted:
            trial, timings = noted[0].model_copy(update={"state": state, "cause": cause}), noted[1]
        else:
            started = self._folder.started(name)
            if started is None:
                return  # it never began: a resumed sweep begins it
            kept = {key: started[key] for key in ("name", "strategy", "seed", "attempts", "rerun_of")}
            nothing = {"rung": 0, "tokens": 0, "seconds": 0.0, "gpu_hours": 0.0}
            trial = Trial.model_validate(
                {**kept, **nothing, "config": started["values"], "state": state, "cause": cause}
            )
            timings = {}
        self._folder.write(Record(trial=trial, timings=timings))
        run = self._folder.run_of(self._workspace, name)
        if (run.path / "tracking.json").is_file():
            log_trial(self._workspace, tracking_id_of(run), trial)
