"""One trial in a warm process: trained rung by rung, scored on live weights, exported and scored along its curve."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from sweeps.bench import Bench, hash_at
from sweeps.folder import Record
from sweeps.measures import Measures, measure
from sweeps.result import Point, RungMeasure, Trial
from sweeps.space import Setting, run_spec
from sweeps.steering import score_of, steps_of
from training.aids import ready_data
from training.attempts import Hands, train_to_the_end
from training.data.prepare import Prepared, load_prepared
from training.errors import TenureError, fail
from training.evaluation import scoring
from training.evaluation.scorecard import Scorecard
from training.faults import explained_at, is_out_of_memory, output_to
from training.fit import fit
from training.interpolate import check_interpolable, interpolate
from training.job import Job, make_job
from training.objective.signals import compute_signals, signal_jobs
from training.plan import Plan
from training.protection.passes import importance_of_run
from training.retries import with_micro_batch
from training.spec import RunSpec, Scaling
from training.stages import begin_run, hash_training, plan_run, score_artifacts, spec_of
from training.strategy import Ewc, Si, Wise
from training.worker import Trainer, make_schedule
from training.workspace import RunFolder, Workspace, read_json, write_json, write_text

MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class TrialJob:
    """A trial as plain values; `rerun_of` as in sweeps.result.Trial.

    Of finalists under another seed: `alphas`, the places on the trial's curve that they stand at. No others are scored.
    Of population-based training: the generation to train, and the trial whose weights it starts from.
    """

    name: str
    strategy: str
    values: dict[str, Any]
    seed: int
    rerun_of: str | None = None
    alphas: list[float] = field(default_factory=list)
    generation: int | None = None
    parent: str | None = None


@dataclass
class TrialRun:
    """A trial that is being worked on."""

    bench: Bench
    job: TrialJob
    spec: RunSpec
    plan: Plan
    run: RunFolder
    attempts: int
    started: float
    worker_job: dict[str, Any] = field(default_factory=dict)
    trainer: Trainer | None = None
    tokens: int = 0
    curve: list[RungMeasure] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, bench: Bench, job: TrialJob, micro: int | None = None) -> TrialRun:
        """A fresh run folder with its plan; what an interrupted attempt left is thrown away.

        Args:
            micro: the micro-batch to take instead of the spec's, or of the generation's before.
        """
        started = time.monotonic()
        attempts = bench.folder.start(job.name, asdict(job))
        run = bench.folder.run_of(bench.workspace, job.name)
        if not job.parent:
            forget(bench, run)
            run.path.mkdir(parents=True)
        with output_to(run.logs / "trial.log"):
            spec, plan, prepared = settled(bench, job, micro or micro_before(bench, job))
            given = spec.model_dump(mode="json", exclude_none=True)
            write_text(run.spec_yaml, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
            if job.parent:
                take_over(bench, job, spec, plan)
            else:
                about = {"sweep": {"id": bench.folder.id, "trial": job.name, "strategy": job.strategy}}
                begin_run(run, spec, plan, bench.workspace, about, bench.shared.mlflow_run)
        made = cls(bench, job, spec, plan, run, attempts, started)
        if job.parent:
            made._remember()
        made.timings["plan"] = made.timings.get("plan", 0.0) + time.monotonic() - started
        with made._timed("setup"), made._told():
            aids = ready_here(spec, prepared, bench, run.logs)
            decides = hash_training(spec) if job.generation is None else f"{bench.folder.id}/{job.strategy}"
            made.worker_job = make_job(spec, plan, prepared, run, decides, aids)
            if not made.is_nested:
                made.trainer = Trainer.start(Job(**made.worker_job), run, bench.load)
                made._expect_weights(made.trainer)
        return made

    def _remember(self) -> None:
        """What it cost and came to in the generations before."""
        noted = self.bench.folder.noted(self.job.name)
        assert noted is not None
        before, timings = noted
        self.tokens, self.curve, self.timings = before.tokens, list(before.curve), dict(timings)
        self.started -= before.seconds

    def _expect_weights(self, trainer: Trainer) -> None:
        """Refuse to go on from weights that are not there: training would begin anew, and nobody would know."""
        generation, parent = self.job.generation, self.job.parent
        if parent and generation and trainer.step != steps_of(self.bench.sweep, generation - 1, self.plan.steps):
            what = f"there are no whole weights of '{parent}' from generation {generation - 1}"
            raise fail(what, str(self.run.checkpoints), "start the sweep again under another name")

    @property
    def is_nested(self) -> bool:
        """Whether Ray Train runs it on several workers, instead of this process."""
        return self.spec.scaling.workers > 1

    def advance(self, rung: int) -> Measures:
        """Train to the end of a rung, and score the live weights on validation; the last rung leaves the artifact."""
        if self.is_nested:
            return self._advance_nested(rung)
        assert self.trainer is not None
        last = steps_of(self.bench.sweep, rung, self.plan.steps)
        with self._timed("steps"), self._told():
            while self.trainer.step < last:
                self.tokens += int(self.trainer.data.lengths[self.trainer.schedule.batch(self.trainer.step)].sum())
                self.trainer.train_step()
        if last == self.plan.steps:
            with self._timed("export"), self._told():
                self.trainer.finish()
            self.close()
            return self._finished(rung)
        with self._timed("scoring"), self._told():
            card = self._live_card()
            measures = measure(card)
        if self.job.generation is not None:
            self._leave_weights(rung)  # before the note: what is noted has weights, whenever the process is killed
        self._note(rung, measures, card)
        return measures

    def _advance_nested(self, rung: int) -> Measures:
        """As advance(), for the one rung that a trial of several workers has."""
        with self._timed("steps"), self._told():
            train_to_the_end(self.run, self.spec, self.plan, self._hands())
        self.tokens = tokens_of(self.spec, self.plan, load_prepared(Path(self.worker_job["prepared"])))
        return self._finished(rung)

    def _hands(self) -> Hands:
        """A trial takes the workers that it was given, and goes on without them where one is lost."""

        def train(plan: Plan, scaling: Scaling) -> None:
            fit({**self.worker_job, "plan": asdict(plan)}, scaling, self.run)

        def replan(_: int, micro: int | None) -> Plan:
            return with_micro_batch(self.plan, micro or self.plan.micro_batch_size)

        return Hands(replan, train, lambda scaling: scaling.workers, lambda line: print(line, flush=True))

    def _leave_weights(self, rung: int) -> None:
        """Leave weights and optimizer for the next generation, and forget those of the one before the last."""
        assert self.trainer is not None
        with self._timed("export"), self._told():
            self.trainer.save_to(generation_of(self.run, rung))
            shutil.rmtree(generation_of(self.run, rung - 2), ignore_errors=True)

    def _live_card(self) -> Scorecard:
        """Of the weights that are being trained, in the precision that they are trained in."""
        assert self.trainer is not None
        engine = self.trainer.engine
        engine.eval()
        with self.trainer.objective.head.whole(), torch.no_grad():
            card = self.bench.card(self.spec, self.run.id, engine.module, "live")
        engine.train()
        return card

    def _finished(self, rung: int) -> Measures:
        """Score the artifact and its curve, and write the record."""
        with self._timed("scoring"), self._told():
            cards = self._score_apart() if self.is_nested else self._score_artifact()
        measures = measure(cards[None])
        self._note(rung, measures, cards[None])
        points = tuple(self._point(alpha, rung, card) for alpha, card in cards.items())
        with self._timed("tracking"), self._told():
            self._track(cards[None])
            self.track(self.trial("finished", rung), points)
        self.bench.folder.write(Record(trial=self.trial("finished", rung), points=points, timings=self.timings))
        return measures

    def _score_artifact(self) -> dict[float | None, Scorecard]:
        """The scorecards of the artifact (None) and of what lies between it and the base, by alpha."""
        bench, spec = self.bench, self.spec
        exported = bench.exported(spec, self.run.artifact)
        whole = bench.card(spec, self.run.id, exported.model, hash_at(self.run.artifact, None))
        write_json(self.run.scorecard, whole.model_dump(mode="json"))
        cards: dict[float | None, Scorecard] = {None: whole}
        for alpha in self._alphas():
            card = bench.card(spec, self.run.id, exported.at(alpha), hash_at(self.run.artifact, alpha))
            write_json(card_file(self.run, alpha), card.model_dump(mode="json"))
            cards[alpha] = card
        return cards

    def _score_apart(self) -> dict[float | None, Scorecard]:
        """As _score_artifact(), each model in a process of its own, for which it is written."""
        models = {alpha: artifact_at(self.run, alpha) for alpha in (None, *self._alphas())}
        named = {f"alpha-{alpha!r}": model for alpha, model in models.items()}
        scored = score_artifacts(self.run, self.spec, self.bench.workspace, named)
        cards = {alpha: scored[f"alpha-{alpha!r}"] for alpha in models}
        for alpha, card in cards.items():
            write_json(card_file(self.run, alpha), card.model_dump(mode="json"))
        return cards

    def _alphas(self) -> tuple[float, ...]:
        """Where the curve is scored: nowhere for a model that is interpolated already, or that cannot be."""
        if self.spec.protection(Wise):
            return ()
        try:
            check_interpolable(self.run.artifact)
        except TenureError as error:
            print(f"no curve towards the base: {error}", flush=True)
            return ()
        if self.job.rerun_of:
            return tuple(self.job.alphas)
        return tuple(alpha for alpha in self.bench.sweep.alphas if 0 < alpha < 1)

    def _track(self, card: Scorecard) -> None:
        from training.tracking import finish_tracking, log_metrics, tracking_id_of

        log_metrics(self.bench.workspace, self.run, tracking_id_of(self.run))
        finish_tracking(self.bench.workspace, self.run, tracking_id_of(self.run), card)

    def _point(self, alpha: float | None, rung: int, card: Scorecard) -> Point:
        measures = measure(card)
        return Point(
            trial=self.job.name,
            strategy=self.job.strategy,
            alpha=alpha,
            seed=self.job.seed,
            rung=rung,
            gain=measures.gain,
            retention=measures.retention,
            retention_mean=measures.retention_mean,
            kl_to_base=kl_of(card),
            contract=measures.contract,
            split="validation",
            tokens=self.tokens,
            gpu_hours=self.gpu_hours,
            suites=measures.suites,
            artifact=str(self.run.artifact) if alpha is None else None,
        )

    def _note(self, rung: int, measures: Measures, card: Scorecard) -> None:
        seconds = time.monotonic() - self.started
        self.curve.append(
            RungMeasure(
                rung=rung,
                tokens=self.tokens,
                seconds=seconds,
                gain=measures.gain.value,
                retention=measures.retention.value,
                kl_to_base=kl_of(card),
                score=score_of(measures, self.bench.sweep),
            )
        )
        self.bench.folder.note(self.trial("stopped", rung, "it was stopped"), self.timings)

    @property
    def gpu_hours(self) -> float:
        """GPU hours so far; a GPU that trials share is shared in this too."""
        scaling = self.spec.scaling
        share = scaling.workers * scaling.gpus_per_worker / self.bench.sweep.trials_per_gpu
        return share * (time.monotonic() - self.started) / 3600

    def trial(self, state: Any, rung: int, cause: str | None = None) -> Trial:
        """What the trial has come to so far."""
        return Trial(
            name=self.job.name,
            strategy=self.job.strategy,
            config=self.job.values,
            seed=self.job.seed,
            rung=rung,
            state=state,
            cause=cause,
            tokens=self.tokens,
            seconds=time.monotonic() - self.started,
            gpu_hours=self.gpu_hours,
            curve=tuple(self.curve),
            attempts=self.attempts,
            run=self.run.id,
            rerun_of=self.job.rerun_of,
        )

    def track(self, trial: Trial, points: tuple[Point, ...] = ()) -> None:
        """Log what the trial came to to its own run of the tracking store, and close that."""
        from sweeps.tracking import log_trial
        from training.tracking import tracking_id_of

        log_trial(self.bench.workspace, tracking_id_of(self.run), trial, points)

    def close(self) -> None:
        """Give the engine's memory back."""
        if self.trainer is not None:
            self.trainer.engine.destroy()
            self.trainer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.monotonic() - begun

    @contextmanager
    def _told(self) -> Iterator[None]:
        with output_to(self.run.logs / "trial.log"), explained_at(self.run.logs):
            yield


def kl_of(card: Scorecard) -> float | None:
    """KL to the base on the target suites' prompts, in nats a target token."""
    found = card.kl_to_base.get("target")
    return found.nats if found else None


def card_file(run: RunFolder, alpha: float | None) -> Path:
    """The scorecard of a trial's artifact, or of what lies between it and the base."""
    return run.scorecard if alpha is None else run.wise / f"scorecard-{alpha!r}.json"


def artifact_at(run: RunFolder, alpha: float | None) -> Path:
    """The artifact of a trial; one between it and the base is written where it is asked for."""
    if alpha is None:
        return run.artifact
    target = run.wise / f"alpha-{alpha!r}"
    return target if target.is_dir() else interpolate(Path(spec_of(run).model), run.artifact, alpha, target)


def generation_of(run: RunFolder, generation: int) -> Path:
    """Where a trial leaves its weights and optimizer at the end of a generation."""
    return run.path / "generations" / str(generation)


def forget_generations(run: RunFolder) -> None:
    """Throw away the weights that a trial's generations left for each other."""
    shutil.rmtree(run.path / "generations", ignore_errors=True)
    if run.checkpoints.is_symlink():
        run.checkpoints.unlink()


def micro_before(bench: Bench, job: TrialJob) -> int | None:
    """The micro-batch of the generation before, smaller than the spec's where memory ran out; None for what begins."""
    if not job.parent:
        return None
    return Plan(**read_json(bench.folder.run_of(bench.workspace, job.parent).plan)).micro_batch_size


def take_over(bench: Bench, job: TrialJob, spec: RunSpec, plan: Plan) -> None:
    """Give a trial another setting, and the checkpoint of the trial that it goes on from as its own."""
    assert job.generation is not None
    assert job.parent is not None
    run, parent = (bench.folder.run_of(bench.workspace, name) for name in (job.name, job.parent))
    write_json(run.spec, spec.model_dump(mode="json"))
    write_json(run.plan, asdict(plan))
    run.checkpoints.unlink(missing_ok=True)
    run.checkpoints.symlink_to(generation_of(parent, job.generation - 1).absolute())


def forget(bench: Bench, run: RunFolder) -> None:
    """Throw away what an interrupted attempt left, and close it in the tracking store."""
    if run.path.is_dir():
        if (run.path / "tracking.json").is_file():
            from training.tracking import fail_tracking, tracking_id_of

            fail_tracking(bench.workspace, tracking_id_of(run), "interrupted, and begun again")
        shutil.rmtree(run.path)


# --------------------------------------------------------------------------------------------- equal tokens


def settled(bench: Bench, job: TrialJob, micro: int | None = None) -> tuple[RunSpec, Plan, Path]:
    """A trial's spec with as many steps as its share of tokens takes, its plan and its data."""
    spec = trial_spec(bench, job)
    if micro is not None:
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"micro_batch_size": micro})})
    return settle(spec, bench.shared.tokens_per_trial, bench.workspace)


def trial_spec(bench: Bench, job: TrialJob) -> RunSpec:
    """The run spec of a trial over its own epochs, on the validation half of the suites."""
    setting = Setting(job.strategy, job.values)
    return run_spec(bench.sweep, setting, name=bench.folder.id, seed=job.seed, suites=bench.shared.validation)


def settle(spec: RunSpec, tokens: int, workspace: Workspace) -> tuple[RunSpec, Plan, Path]:
    """The spec with the steps that train on so many tokens; it is planned twice, since steps decide the plan."""
    prepared = ready_data(spec, workspace, Console(quiet=True))
    plan, _ = plan_run(spec, workspace)
    data = load_prepared(prepared)
    steps = steps_for(spec, plan, data, tokens)
    epochs = -(-steps // plan.steps_per_epoch)
    training = spec.training.model_copy(update={"max_steps": steps, "epochs": epochs})
    spec = spec.model_copy(update={"training": training})
    return spec, plan_run(spec, workspace)[0], prepared


def steps_for(spec: RunSpec, plan: Plan, data: Prepared, tokens: int) -> int:
    """Steps until so many tokens, padding not counted, were trained on: the nearest number, at least one."""
    schedule, seen, steps = make_schedule(spec, plan, data), 0, 0
    while seen < tokens:
        batch = int(data.lengths[schedule.batch(steps)].sum())
        if steps and tokens - seen < batch / 2:
            break
        seen, steps = seen + batch, steps + 1
    return steps


def tokens_of(spec: RunSpec, plan: Plan, data: Prepared) -> int:
    """Tokens that a planned run trains on."""
    schedule = make_schedule(spec, plan, data)
    return sum(int(data.lengths[schedule.batch(step)].sum()) for step in range(plan.steps))


def ready_here(spec: RunSpec, prepared: Path, bench: Bench, logs: Path) -> dict[str, str]:
    """The aids of a run: those that trials share lie in the cache; what frozen models say is else computed here.

    An importance is the one computed before the trials, under the sweep's own seed, whatever the run's seed is.

    Raises:
        TenureError: an importance is not there.
    """
    precision = scoring.scoring_precision(spec.scaling.gpus_per_worker)
    jobs = signal_jobs(spec, prepared, bench.workspace, precision, logs)
    for job in jobs.values():
        if not Path(job.target).is_file():
            compute_signals(job)
    aids = {name: job.target for name, job in jobs.items()}
    first = spec.training.model_copy(update={"seed": bench.sweep.run.training.seed})
    shared = spec.model_copy(update={"training": first})
    for protection in spec.protections:
        if isinstance(protection, Ewc | Si):
            found = importance_of_run(protection, shared, bench.workspace)
            if found is not None and not found.is_dir():
                what = f"the importance of {protection.type} is not one of those computed before the trials"
                raise fail(what, "space", "vary its strength alone, or search: random, which knows all trials ahead")
            aids |= {protection.type: str(found)} if found else {}
    return aids


def cause_of(error: BaseException) -> str:
    """What kind of failure it was, and its own words."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if is_out_of_memory(error):
        return f"out of memory: {text}"
    if "not a finite number" in text or "not finite" in text:
        return f"not a finite number: {text}"
    return f"refused: {text}" if isinstance(error, TenureError) else f"failed: {type(error).__name__}: {text}"
