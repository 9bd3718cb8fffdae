"""The loop that every Ray Train worker runs, from the encoded data to the exported artifact."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from training import checkpoint, export, tuning
from training import engine as engines
from training.attention import attend_within
from training.data.batches import collate, micro_batches, share, to_device
from training.data.encoding import Encoded, load_tokenizer
from training.data.mixture import tasks_of
from training.data.packing import packed_batches
from training.data.prepare import Prepared, load_prepared
from training.data.schedule import Schedule, schedule_of
from training.data.seen import ExampleLog
from training.data.store import lengths_of, targets_of
from training.data.task_figures import TaskFigures
from training.errors import fail
from training.events import read_events
from training.faults import explained_at, output_to
from training.flops import flops_per_token, peak_flops
from training.interpolate import interpolate
from training.job import Job, drop_torn_row
from training.kernels import use_kernels
from training.models import hash_folder, read_model_info
from training.objective.first_look import expect_apart, fuses_truly
from training.objective.objectives import Objective, make_objective
from training.objective.targets import Batch
from training.objective.weighing import weigh
from training.plan import Plan
from training.protection.attach import Attached, attach_all, path_importance
from training.protection.importance import IMPORTANCE_FOLDER, PATH_INTEGRAL, write_importance
from training.protection.layout import Layout
from training.saving import Keep, Saver
from training.spec import RunSpec, Training
from training.strategy import AnyTuning, Si, Wise, is_adapter
from training.telemetry import Telemetry
from training.watch import Watch, stacks_file
from training.workspace import RunFolder

LoadBase = Callable[[AnyTuning, Path, torch.dtype], torch.nn.Module]


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train: run the job, with all output in the worker's log and faults explained."""
    job = Job(**config)
    folder = RunFolder(Path(job.run))
    with output_to(folder.logs / f"worker-{dist.get_rank()}.log"), explained_at(folder.logs):
        Trainer.start(job, folder).run()


class Fed(NamedTuple):
    """A worker's share of a step's global batch `indices`: its micro-batches and their tensors, none on a device."""

    step: int
    indices: list[int]
    own: list[list[int]]
    tensors: list[Batch]


@dataclass
class Trainer:
    """One worker's share of a run. All state that a checkpoint must hold is in the engine and the protections."""

    spec: RunSpec
    plan: Plan
    folder: RunFolder
    data: Prepared
    tokenizer: Any
    engine: Any
    optimizer: torch.optim.Optimizer
    objective: Objective
    attached: Attached
    aids: dict[str, str]
    spec_hash: str
    data_hash: str
    schedule: Schedule
    tasks: TaskFigures
    initial: dict[str, torch.Tensor]
    saver: Saver
    watch: Watch
    telemetry: Telemetry
    step: int = 0
    ahead: Fed | None = None
    seen: ExampleLog | None = None
    leaves: bool = False
    validation_loss: float | None = None

    @classmethod
    def start(cls, job: Job, folder: RunFolder, load: LoadBase = tuning.load_base_for) -> Trainer:
        """Data, model, tuning, optimizer, engine, protections; then the state of the newest checkpoint.

        Args:
            load: gives the base as the tuning wants it; a process that trains several runs keeps its weights.
        """
        spec, plan = RunSpec.model_validate(job.spec), Plan(**job.plan)
        seed_everything(spec.training.seed)
        weighed = weigh(load_prepared(Path(job.prepared)), spec, job.aids)
        tokenizer = load_tokenizer(Path(spec.model))
        dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
        base = load(spec.tuning, Path(spec.model), dtype)
        if plan.row_tokens:
            attend_within(base)
        print(f"kernels: {use_kernels(base, spec.training.kernels, plan.zero_stage)}", flush=True)
        model = tuning.apply_tuning(base, spec.tuning)
        _expect_trainable(model, plan)
        if spec.training.gradient_checkpointing:
            tuning.recompute(model, plan.zero_stage)
        initial = tuning.initial_products(model, spec.tuning)
        optimizer = engines.build_optimizer(model, spec)
        engine = engines.start_engine(model, optimizer, spec, plan)
        if is_adapter(spec.tuning):
            tuning.settle_buffers(model, spec.tuning, dtype)
        layout = Layout.of_engine(engine)
        unclip = engines.unclipping(engine, spec.training.max_grad_norm)
        pad_id = tokenizer.pad_token_id
        objective = make_objective(spec, model, weighed, job.aids, pad_id, engine.device, plan.row_tokens > 0)
        trainer = cls(
            spec=spec,
            plan=plan,
            folder=folder,
            data=weighed.data,
            tokenizer=tokenizer,
            engine=engine,
            optimizer=optimizer,
            objective=objective,
            attached=attach_all(spec, engine.module, layout, optimizer, job.aids, unclip),
            aids=job.aids,
            spec_hash=job.spec_hash,
            data_hash=Path(job.prepared).stem,
            schedule=make_schedule(spec, plan, weighed.data),
            tasks=make_task_figures(spec, plan, weighed.data, objective, engine.device),
            initial=initial,
            saver=make_saver(spec.training, folder, job.spec_hash),
            watch=Watch(spec.scaling.hang_after_s, stacks_file(folder.logs, dist.get_rank())),
            telemetry=make_telemetry(spec, plan, folder),
        )
        if plan.row_tokens:
            expect_apart(engine, trainer.objective.head)
        if spec.training.fused_loss:
            trainer.objective.head.fuses = fuses_truly(engine, trainer.objective.head, plan.row_tokens > 0)
        # Adapters start alike on every worker; dropout must not, or all would drop the same units.
        seed_everything(spec.training.seed + 1 + dist.get_rank())
        trainer._resume()
        if spec.training.log_examples:
            trainer.seen = ExampleLog(folder.examples, trainer.step)
        return trainer

    def run(self) -> None:
        """Every step that is left, with validation and checkpoints on the way; then the artifact.

        A run that is asked to leave writes a checkpoint and returns without one. One that makes no progress ends its
        process, see Watch; loading and exporting are not watched.
        """
        self.watch.start()
        try:
            self._run_steps()
        finally:
            self.watch.stop()
        if self.step == self.plan.steps:
            self.finish()

    def _run_steps(self) -> None:
        if self.step == 0:
            self._validate()
        while self.step < self.plan.steps:
            self.train_step()
            if self._is_due(self.plan.validate_every_steps):
                self._validate()
            if self._is_due(self.plan.checkpoint_every_steps) or self.leaves:
                self._save()
            if self.leaves and self.step < self.plan.steps:
                self.saver.finish()
                self._log({"kind": "leave", "step": self.step})
                return

    def finish(self) -> None:
        """What is left after the last step: the last checkpoint, the count of replayed rows, and the artifact."""
        self.saver.finish()
        self._log_replay()
        self._export()

    def _export(self) -> None:
        """The artifact: what was tuned, or with WiSE-FT what lies between it and the base, and tuned beside it."""
        wise = self.spec.protection(Wise)
        tuned = self.folder.tuned if wise else self.folder.artifact
        stands = tuned.is_dir()
        dist.barrier()  # or the first worker could be done before another has looked
        if not stands:
            export.export_artifact(
                self.engine.module,
                self.tokenizer,
                Path(self.spec.model),
                tuned,
                self.spec,
                self.folder.id,
                write_beside=self._importance_beside() if self.attached.path is not None else None,
                initial=self.initial,
            )
        if wise and dist.get_rank() == 0:
            interpolate(Path(self.spec.model), tuned, wise.alpha, self.folder.artifact)
        dist.barrier()

    def _importance_beside(self) -> Callable[[Path], None]:
        write = self.importance_writer()
        return lambda model: write(model / IMPORTANCE_FOLDER, model)

    def importance_writer(self) -> Callable[[Path, Path], None]:
        """Gathers what the recorded path says of the weights; all ranks call it, and rank 0 what it returns.

        That writes the importance into the folder that is its first argument, as that of the model in the second.
        """
        settings = self.spec.protection(Si)
        assert settings is not None
        earlier = Path(self.aids["si"]) if "si" in self.aids else None
        tensors, tasks = path_importance(self.attached, settings.xi, earlier)
        about = {"estimator": PATH_INTEGRAL, "reduction": "mean", "examples": len(self.data.train), "tasks": tasks}

        def write(target: Path, model: Path) -> None:
            hashes = {"base_hash": hash_folder(model), "data_hash": self.data_hash}
            write_importance(target, tensors, {**about, **hashes, "gamma": 1.0})

        return write

    def _resume(self) -> None:
        if dist.get_rank() == 0:
            drop_torn_row(self.folder.metrics)
        newest = checkpoint.latest_checkpoint(self.folder.checkpoints)
        if newest is not None:
            self.step = checkpoint.load_checkpoint(newest, self._state, self.spec_hash)
            self._log({"kind": "resume", "step": self.step})

    @property
    def _state(self) -> checkpoint.State:
        return checkpoint.State(self.engine, self.optimizer, self.attached.layout, self.attached.sheets)

    def _is_due(self, every: int) -> bool:
        return self.step == self.plan.steps or (every > 0 and self.step % every == 0)

    def train_step(self) -> None:
        """One optimizer step over one global batch; the loss is a mean over all of it, whatever the workers."""
        started = time.monotonic()
        self.watch.progress()
        self.validation_loss = None  # of weights that are about to change
        fed = self.ahead if self.ahead and self.ahead.step == self.step else self._feed(self.step)
        count = self.plan.workers * self.plan.accumulation_steps
        totals = self.objective.totals(fed.indices)
        rate = engines.learning_rate(self.spec.training, self.plan, self.step)
        engines.set_learning_rate(self.engine.optimizer, rate)
        self.engine.train()
        figures = torch.zeros(3 + len(self.objective.names) + len(self.tasks), device=self.engine.device)
        figures[-2], figures[-1] = self._is_asked_to_leave(), self.saver.is_written
        gathered = time.monotonic() - started
        for batch, tensors in zip(fed.own, fed.tensors, strict=True):
            loss = self.objective.loss(self.engine, batch, totals, tensors)
            parts = [loss.value.detach(), *(loss.parts[name] for name in self.objective.names)]
            figures[:-2] += torch.cat([torch.stack(parts), self.tasks.sums(batch, loss.losses)])
            # DeepSpeed divides by accumulation steps and averages over workers; this undoes both.
            self.engine.backward(loss.value * count)
            if batch is fed.own[-1]:
                self._feed_ahead()
            self.engine.step()
        dist.all_reduce(figures)
        *told, asked, written = figures.tolist()
        self.leaves = asked > 0  # by all workers at once, since they have to save together
        if written == dist.get_world_size():
            self.saver.publish()
        self.step += 1
        self.saver.prepare(self._state)
        if self.seen:
            self.seen.add(self.step, [index for batch in fed.own for index in batch])
        row = self._step_row(told, rate, fed.indices, totals.num_targets, time.monotonic() - started)
        self._log(row)
        self.telemetry.tell_step(row, gathered)

    def _feed_ahead(self) -> None:
        """The next step's share, while a device computes: the engine's step waits for the gradients."""
        self.ahead = self._feed(self.step + 1) if self.step + 1 < self.plan.steps else None

    def _feed(self, step: int) -> Fed:
        indices = self.schedule.batch(step)
        batches = self._cut(indices, self.plan.workers * self.plan.accumulation_steps)
        own = share(batches, dist.get_rank(), self.plan.workers)
        return Fed(step, indices, own, [self.objective.gather(batch) for batch in own])

    def _is_asked_to_leave(self) -> bool:
        return dist.get_rank() == 0 and self.folder.notice.exists()

    def _cut(self, indices: list[int], count: int) -> list[list[int]]:
        """A global batch as `count` micro-batches."""
        if self.plan.row_tokens:
            return packed_batches(indices, self.data.lengths, self.plan.row_tokens, count)
        return micro_batches(indices, self.data.lengths, self.plan.micro_batch_size, count)

    def _loss_sum(self, examples: Sequence[Encoded]) -> torch.Tensor:
        batch = collate(examples, self.tokenizer.pad_token_id, self.plan.row_tokens > 0)
        return self.objective.head.sum(self.engine, to_device(batch, self.engine.device))

    def _step_row(
        self, figures: list[float], rate: float, indices: list[int], num_targets: int, seconds: float
    ) -> dict[str, Any]:
        loss, *others = figures
        parts, task_sums = others[: len(self.objective.names)], others[len(self.objective.names) :]
        if not math.isfinite(loss):
            instead = "lower training.learning_rate, or set training.precision: fp32"
            raise fail(f"the loss is not a finite number at step {self.step}", "training", instead)
        return {
            "kind": "step",
            "step": self.step,
            "loss": loss,
            **dict(zip(self.objective.names, parts, strict=True)),
            "learning_rate": rate,
            "grad_norm": engines.grad_norm(self.engine),
            "num_target_tokens": num_targets,
            "num_tokens": int(self.data.lengths[indices].sum()),
            "num_rows": len(indices),
            **self._count_replayed(indices),
            **self.tasks.row(indices, task_sums),
            "seconds": seconds,
            "epoch": self.step / self.schedule.steps_per_epoch,
        }

    def _log_replay(self) -> None:
        """What was replayed over all steps, those before a resume included."""
        if self.plan.replay_per_batch:
            indices = [index for step in range(self.step) for index in self.schedule.batch(step)]
            counts = {"num_rows": len(indices), "num_target_tokens": self._count_targets(indices)}
            self._log({"kind": "replay", "step": self.step, **counts, **self._count_replayed(indices)})

    def _count_targets(self, indices: Iterable[int]) -> int:
        return sum(self.data.num_targets(index) for index in indices)

    def _count_replayed(self, indices: list[int]) -> dict[str, int]:
        """How many of a batch's rows and target tokens are replayed; nothing for a run without replay."""
        if not self.plan.replay_per_batch:
            return {}
        replayed = [index for index in indices if index >= len(self.data.train)]
        return {"num_replay": len(replayed), "num_replay_target_tokens": self._count_targets(replayed)}

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean cross-entropy in nats per target token of every suite's right answers."""
        self.engine.eval()
        losses = {}
        for name, items in self.data.validation.items():
            size, workers = self.plan.micro_batch_size, self.plan.workers
            rounds = -(-len(items) // (size * workers))
            batches = micro_batches(range(len(items)), lengths_of(items), size, rounds * workers)
            total = torch.zeros((), device=self.engine.device)
            for batch in share(batches, dist.get_rank(), workers):
                self.watch.progress()
                total += self._loss_sum([items[index] for index in batch])
            dist.all_reduce(total)
            losses[name] = total.item() / int(targets_of(items).sum())
            self._log({"kind": "validation", "step": self.step, "suite": name, "loss": losses[name]})
        targets = [losses[suite.name] for suite in self.spec.suites.target if suite.name in losses]
        self.validation_loss = sum(targets) / len(targets) if targets else None

    def _save(self) -> None:
        started = time.monotonic()
        self.watch.progress()
        self.saver.begin(self.step, self._state, self.validation_loss)
        waited = time.monotonic() - started
        self._log({"kind": "checkpoint", "step": self.step, "seconds": waited})
        self.telemetry.set({"checkpoint_seconds": waited})

    def save_to(self, folder: Path) -> None:
        """Write one checkpoint into a folder of its own."""
        Saver(folder, self.spec_hash, Keep(1)).begin(self.step, self._state)

    def _log(self, row: dict[str, Any]) -> None:
        """Append one row to the run's metrics; only the first worker writes."""
        if dist.get_rank() == 0:
            with self.folder.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


def make_telemetry(spec: RunSpec, plan: Plan, folder: RunFolder) -> Telemetry:
    """What a worker tells of its steps; of GPUs whose peak is known, what they do of it too."""
    info, rank = read_model_info(Path(spec.model)), dist.get_rank()
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    longest = plan.row_tokens or spec.training.max_length
    folder.logs.mkdir(parents=True, exist_ok=True)
    telemetry = Telemetry(
        run=folder.id,
        rank=rank,
        log=folder.logs / f"worker-{rank}.jsonl",
        token_flops=flops_per_token(spec, info, longest),
        peak_flops=peak and peak * dist.get_world_size(),
    )
    attempts = sum(event["event"] == "attempt" for event in read_events(folder))
    telemetry.set({"restarts": max(0, attempts - 1)})
    return telemetry


def make_saver(training: Training, folder: RunFolder, spec_hash: str) -> Saver:
    """What writes a run's checkpoints: beside GPUs in the background, where `auto` lets it."""
    asked = training.checkpoint_in_background
    in_background = torch.cuda.is_available() if asked == "auto" else asked
    keep = Keep(training.keep_checkpoints, training.keep_best_checkpoints)
    return Saver(folder.checkpoints, spec_hash, keep, in_background)


def seed_everything(seed: int) -> None:
    """The same initial adapters on every worker and at every worker count."""
    random.seed(seed)
    torch.manual_seed(seed)


def make_schedule(spec: RunSpec, plan: Plan, data: Prepared) -> Schedule:
    """Which examples every step of a run sees.

    Raises:
        TenureError: rows are to be replayed and there are none.
    """
    if plan.replay_per_batch and not data.replay:
        raise fail("there are no rows to replay", "protections", "set replay.data, or have the base write them again")
    return schedule_of(spec, data.sizes, len(data.replay), plan.replay_per_batch)


def make_task_figures(
    spec: RunSpec, plan: Plan, data: Prepared, objective: Objective, device: torch.device
) -> TaskFigures:
    """What adds up a step's losses by task; nothing for a run without tasks."""
    tasks = tasks_of(spec.data, data.sizes, plan.global_batch_size - plan.replay_per_batch)
    return TaskFigures(tasks, objective.num_terms, data.num_targets, device)


def _expect_trainable(model: torch.nn.Module, plan: Plan) -> None:
    """The plan's count of moving parameters is what the user was shown; it must be the truth."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if count != plan.trainable_parameters:
        what = f"{count:,} parameters move, but the plan counted {plan.trainable_parameters:,}"
        print(f"warning: {what}: this architecture names its linear modules in an unknown way", flush=True)
