"""The Trainable of Ray Tune: a warm process that tries one setting after the other, and never fails for one of them."""

from __future__ import annotations

from typing import Any

from ray.tune import Trainable

from sweeps.bench import Bench
from sweeps.folder import Record
from sweeps.measures import Measures
from sweeps.presets import amounts
from sweeps.result import Trial
from sweeps.steering import hopeless, keeps, resource, score_of
from sweeps.trial import MOST_ATTEMPTS, TrialJob, TrialRun, cause_of
from training.faults import is_out_of_memory
from training.quiet import be_quiet

WORST = -1e9


class TrialActor(Trainable):  # type: ignore[misc]
    """One rung a step. A trial's failure is its record's, and the process goes on with the next one."""

    def setup(self, config: dict[str, Any]) -> None:
        be_quiet()
        self.bench = Bench.open(config["workspace"], config["folder"])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial in the same process."""
        self._close()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing for Tune to keep: a trial's records and run folder are its own, and it begins anew when killed."""
        return {"trial": self.job.name}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """As for save_checkpoint()."""

    def _begin(self, config: dict[str, Any]) -> None:
        job = dict(config["job"])
        self.last = amounts(self.bench.sweep).rungs - 1
        whole = job.pop("whole", False)
        self.job = TrialJob(**job)
        self.rung = self._first = self.last if whole else self.job.generation or 0
        self.trial: TrialRun | None = None
        self.micro: int | None = None

    def _close(self) -> None:
        trial = self.trial
        if trial is not None:
            trial.close()
        self.trial = None

    def step(self) -> dict[str, Any]:
        """Train and score one rung; what it came to, or that the trial is over."""
        ended = self._ended()
        if ended is not None:  # its process died between its record and its last word
            return self._again(ended)
        while True:
            try:
                return self._rung()
            except Exception as error:  # whatever a setting does, the sweep goes on: the record tells the cause
                again = self._smaller(error)
                if not again:
                    return self._failed(error)

    def _ended(self) -> Trial | None:
        """The trial where it has its record, or has come to the end of its generation."""
        folder, name = self.bench.folder, self.job.name
        record, noted = folder.read(name), folder.noted(name)
        if record is None and noted is not None and self.job.generation in folder.noted_curve(name):
            return noted[0]
        return record.trial if record else None

    def _rung(self) -> dict[str, Any]:
        if self.trial is None:
            self.trial = TrialRun.start(self.bench, self.job, self.micro)
        trial, rung = self.trial, self.rung
        measures = trial.advance(rung)
        self.rung += 1
        is_member = self.job.generation is not None  # of a population, whose losers take over from winners
        done = is_member or rung == self.last
        lost = None if done else hopeless(trial.spec, self.bench.sweep, measures)
        if lost:
            told = trial.trial("stopped", rung, lost)
            self.bench.folder.write(Record(trial=told, timings=trial.timings))
            trial.track(told)
        if is_member:
            trial.close()
        return self._told(rung, measures, trial, done or bool(lost))

    def _told(self, rung: int, measures: Measures, trial: TrialRun, done: bool) -> dict[str, Any]:
        return {
            "trial": self.job.name,
            "rung": rung,
            "resource": resource(self.bench.sweep, rung),
            "gain": measures.gain.value,
            "retention": measures.retention.value,
            "kept": keeps(measures),
            "score": score_of(measures, self.bench.sweep),
            "tokens": trial.tokens,
            "gpu_hours": trial.gpu_hours,
            "done": done,
        }

    def _smaller(self, error: Exception) -> bool:
        """Whether the trial is tried again with half the micro-batch, as is worth it when memory ran out."""
        trial = self.trial
        if trial is None or not is_out_of_memory(error) or trial.attempts >= MOST_ATTEMPTS:
            return False
        size = trial.plan.micro_batch_size
        self._close()
        if size == 1:
            return False
        self.micro, self.rung = size // 2, self._first
        return True

    def _failed(self, error: Exception) -> dict[str, Any]:
        trial = self.trial
        cause = cause_of(error)
        print(f"{self.job.name}: {cause}", flush=True)
        told = trial.trial("failed", self.rung, cause) if trial else self._never_begun(cause)
        self.bench.folder.write(Record(trial=told, timings=trial.timings if trial else {}))
        if trial:
            trial.track(told)
        self._close()
        amount = {"tokens": told.tokens, "gpu_hours": told.gpu_hours}
        worst = {"gain": WORST, "retention": 0.0, "score": WORST, "kept": False}
        far = resource(self.bench.sweep, self.rung)
        return {"trial": self.job.name, "rung": self.rung, "resource": far, **worst, **amount, "done": True}

    def _again(self, trial: Trial) -> dict[str, Any]:
        """What was told, or was to be told, of a trial that has its record."""
        last = trial.curve[-1] if trial.curve else None
        gain, retention = (last.gain or 0.0, last.retention or 0.0) if last else (WORST, 0.0)
        told = {"trial": trial.name, "rung": trial.rung, "resource": resource(self.bench.sweep, trial.rung)}
        score = last.score if last and last.score is not None else WORST
        figures = {"gain": gain, "retention": retention, "score": score, "kept": False}
        return {**told, **figures, "tokens": trial.tokens, "gpu_hours": trial.gpu_hours, "done": True}

    def _never_begun(self, cause: str) -> Trial:
        attempts = (self.bench.folder.started(self.job.name) or {"attempts": 1})["attempts"]
        return Trial(
            name=self.job.name,
            strategy=self.job.strategy,
            config=self.job.values,
            seed=self.job.seed,
            rung=0,
            state="failed",
            cause=cause,
            tokens=0,
            seconds=0.0,
            gpu_hours=0.0,
            attempts=attempts,
            rerun_of=self.job.rerun_of,
        )
