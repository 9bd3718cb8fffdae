"""Protections that act on weights: known answers, and sharded runs against plain torch at every ZeRO stage."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import STEPS, TUNINGS, JobValues, losses, plan_of, rows_of, run_of, spec_of, start_job, train_here, weights
from safetensors.torch import load_file
from torch.nn import functional

from training.checkpoint import _open_shards, latest_checkpoint
from training.data.batches import Schedule
from training.data.prepare import load_prepared
from training.faults import output_to
from training.job import Job
from training.models import hash_folder
from training.protection.fisher import FisherJob, _compute, pick_examples
from training.protection.importance import TENSORS_FILE, read_info, write_importance
from training.protection.layout import Layout
from training.protection.product import ProductPull
from training.protection.protections import PathIntegral, QuadraticPull
from training.protection.squares import diagonal_fisher
from training.spec import RunSpec
from training.stages import plan_run
from training.strategy import Ewc, L2sp, Lora, Si
from training.tuning import apply_tuning, load_base
from training.worker import Trainer, seed_everything
from training.workspace import RunFolder, Workspace

Weights = dict[str, torch.Tensor]
XI = 1e-3
PULLS: dict[str, tuple[str, dict[str, Any]]] = {
    "l2sp coupled": ("full", {"type": "l2sp", "strength": 0.3, "update": "coupled"}),
    "l2sp proximal": ("full", {"type": "l2sp", "strength": 30.0}),
    "ewc coupled": ("full", {"type": "ewc", "strength": 0.3, "update": "coupled"}),
    "ewc proximal": ("full", {"type": "ewc", "strength": 30.0}),
    "si coupled": ("full", {"type": "si", "strength": 0.1, "update": "coupled", "normalise": "none", "xi": XI}),
    "si proximal": ("full", {"type": "si", "strength": 50.0, "normalise": "max", "xi": XI}),
    "l2sp lora": ("lora", {"type": "l2sp", "strength": 0.3}),
    "ewc lora": ("lora", {"type": "ewc", "strength": 0.3}),
}


@pytest.fixture(scope="module")
def importances(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random importance of the tiny model for EWC, and one with negative elements for SI."""
    folder = tmp_path_factory.mktemp("importances")
    generator = torch.Generator().manual_seed(3)
    made = {}
    for kind, estimator in (("ewc", "exact"), ("si", "path_integral")):
        named = load_base(tiny_model, torch.float32).named_parameters()
        tensors = {name: torch.randn(value.shape, generator=generator) for name, value in named}
        tensors = tensors if kind == "si" else {name: value.square() for name, value in tensors.items()}
        made[kind] = folder / kind
        about = {"base_hash": hash_folder(tiny_model), "estimator": estimator, "examples": 5, "reduction": "sum"}
        write_importance(made[kind], tensors, {**about, "data_hash": "d", "tasks": 2, "gamma": 1.0})
    return made


def pull_job(
    folder: Path,
    model: Path,
    name: str,
    importances: dict[str, Path],
    often: dict[str, Any] | None = None,
    **scale: int,
) -> JobValues:
    tuning, protection = PULLS[name]
    kind = str(protection["type"])
    given = protection if kind == "l2sp" else protection | {"importance": str(importances[kind])}
    job = start_job(folder, model, tuning=TUNINGS[tuning], protections=[given], training=often or STEPS, **scale)
    return {**job, "aids": {} if kind == "l2sp" else {kind: str(importances[kind])}}


@pytest.fixture(scope="module")
def sharded(
    ray_cluster: None, tiny_model: Path, importances: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, JobValues]:
    """Every pull on two workers at every ZeRO stage, and the Fisher information of the same base and data."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = tmp_path_factory.mktemp("sharded")
    jobs = {
        f"{name} {stage}": pull_job(
            folder / f"{name.replace(' ', '-')}-{stage}", tiny_model, name, importances, workers=2, zero=stage
        )
        for name in PULLS
        for stage in range(4)
    }
    often = STEPS | {"checkpoint_every_steps": 10}
    jobs["moved 3"] = pull_job(folder / "moved", tiny_model, "si coupled", importances, workers=2, zero=3, often=often)
    prepared = jobs["l2sp coupled 0"]["prepared"]
    for estimator in ("exact", "empirical"):
        for stage in range(4):
            target = folder / "fisher" / f"{estimator}-{stage}"
            jobs[f"fisher {estimator} {stage}"] = fisher_job(tiny_model, prepared, target, estimator, stage)
    TorchTrainer(
        _run_all,
        train_loop_config={"jobs": list(jobs.values())},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1.0}),
        run_config=RunConfig(name="group", storage_path=str(folder / "ray")),
    ).fit()
    return jobs


def fisher_job(model: Path, prepared: str, target: Path, estimator: str, stage: int, **other: Any) -> JobValues:
    job = FisherJob(
        base=str(model),
        prepared=prepared,
        target=str(target),
        logs=str(target.parent),
        precision="fp32",
        zero_stage=stage,
        estimator=estimator,
        examples=7,
        seed=5,
        previous=None,
        gamma=1.0,
        about={"base_hash": hash_folder(model), "data_hash": Path(prepared).stem},
    )
    return {**vars(job), **other}


def _run_all(config: dict[str, Any]) -> None:
    for job in config["jobs"]:
        if "run" in job:
            folder = RunFolder(Path(job["run"]))
            with output_to(folder.logs / f"worker-{dist.get_rank()}.log"):
                trainer = Trainer.start(Job(**job), folder)
                trainer.run()
                trainer.engine.destroy()
        else:
            with output_to(Path(job["logs"]) / f"fisher-{dist.get_rank()}.log"):
                _compute(FisherJob(**job))
        gc.collect()


class Reference:
    """A protected run in plain torch, one example at a time, written down from the formulas."""

    def __init__(self, job: JobValues) -> None:
        self.spec, self.plan = spec_of(job), plan_of(job)
        (self.protection,) = self.spec.protections
        assert isinstance(self.protection, L2sp | Ewc | Si)
        self.data = load_prepared(Path(job["prepared"])).train
        seed_everything(self.spec.training.seed)
        self.model = apply_tuning(load_base(Path(self.spec.model), torch.float32), self.spec.tuning)
        self.moving = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.start = {name: value.detach().clone() for name, value in self.moving.items()}
        self.omega = {name: torch.zeros_like(value) for name, value in self.start.items()}
        self.importance = self._importance(job["aids"].get(self.protection.type))
        self.strength = self.protection.strength * (2 if isinstance(self.protection, Si) else 1)

    def _importance(self, folder: str | None) -> Weights | None:
        if folder is None or isinstance(self.protection, L2sp):
            return None
        raw = {name: value.clamp(min=0) for name, value in load_file(Path(folder) / TENSORS_FILE).items()}
        everything = torch.cat([value.flatten() for value in raw.values()]).double()
        scale = {"mean": everything.mean(), "max": everything.max(), "none": torch.tensor(1.0)}
        return {name: value / float(scale[self.protection.normalise]) for name, value in raw.items()}

    def run(self) -> Weights:
        training = self.spec.training
        optimizer = torch.optim.AdamW(
            self.moving.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        schedule = Schedule(
            len(self.data), training.global_batch_size, training.epochs, training.seed, training.max_steps
        )
        coupled = self.protection.update == "coupled" or isinstance(self.spec.tuning, Lora)
        for step in range(self.plan.steps):
            batch = [self.data[index] for index in schedule.batch(step)]
            loss = sum(nats(self.model, example) for example in batch) / sum(e.num_targets for e in batch)
            optimizer.zero_grad()
            loss.backward()
            own = {name: value.grad.clone() for name, value in self.moving.items()}
            before = {name: value.detach().clone() for name, value in self.moving.items()}
            torch.nn.utils.clip_grad_norm_(self.moving.values(), training.max_grad_norm or math.inf)
            rate = training.learning_rate * (
                (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / (self.plan.steps - 4)))
            )
            if coupled:
                penalty = self.penalty()
                for value, grad in zip(
                    self.moving.values(),
                    torch.autograd.grad(penalty, self.moving.values(), allow_unused=True),
                    strict=True,
                ):
                    value.grad += grad
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            if not coupled:
                with torch.no_grad():
                    for name, value in self.moving.items():
                        force = rate * self.strength * (self.importance[name] if self.importance else 1.0)
                        value.copy_((value + force * self.start[name]) / (1 + force))
            for name, value in self.moving.items():
                self.omega[name] -= own[name] * (value.detach() - before[name])
        return {name.replace(".default.", "."): value.detach() for name, value in self.moving.items()}

    def penalty(self) -> torch.Tensor:
        """strength/2 sum w (theta - theta_0)^2, of the product s BA where the tuning is LoRA."""
        total = torch.zeros(())
        if isinstance(self.spec.tuning, Lora):
            scaling = self.spec.tuning.alpha / self.spec.tuning.rank
            for name, a in self.moving.items():
                if "lora_A" in name:
                    product = scaling * self.moving[name.replace("lora_A", "lora_B")] @ a
                    base = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                    weight = self.importance[base] if self.importance else 1.0
                    total = total + self.strength / 2 * (weight * product**2).sum()
            return total
        for name, value in self.moving.items():
            weight = self.importance[name] if self.importance else 1.0
            total = total + self.strength / 2 * (weight * (value - self.start[name]) ** 2).sum()
        return total


def nats(model: Any, example: Any) -> torch.Tensor:
    ids, wanted = torch.tensor([example.ids]), torch.tensor(example.is_target)[1:]
    log_probs = functional.log_softmax(model(ids).logits[0, :-1], dim=-1)
    return -log_probs.gather(1, ids[0, 1:, None])[:, 0][wanted].sum()


def farthest(given: Weights, wanted: Weights) -> float:
    assert given.keys() == wanted.keys()
    return max((given[name] - wanted[name]).abs().max().item() for name in wanted)


@pytest.fixture(scope="module")
def references(sharded: dict[str, JobValues]) -> dict[str, tuple[Weights, Reference]]:
    made = {}
    for name in PULLS:
        reference = Reference(sharded[f"{name} 0"])
        made[name] = (reference.run(), reference)
    return made


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", PULLS)
def test_two_workers_at_every_zero_stage_equal_plain_torch(
    sharded: dict[str, JobValues], references: dict[str, tuple[Weights, Reference]], name: str, stage: int
) -> None:
    assert farthest(weights(sharded[f"{name} {stage}"]), references[name][0]) < 1e-5


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", PULLS)
def test_one_worker_at_every_zero_stage_equals_plain_torch(
    references: dict[str, tuple[Weights, Reference]],
    importances: dict[str, Path],
    one_process: None,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    stage: int,
) -> None:
    job = pull_job(tmp_path, tiny_model, name, importances, zero=stage)
    train_here(job).engine.destroy()
    assert farthest(weights(job), references[name][0]) < 1e-5


def test_every_pull_moves_the_weights_that_the_parity_is_about(
    two_workers: dict[str, JobValues], sharded: dict[str, JobValues]
) -> None:
    for name, (tuning, _) in PULLS.items():
        assert farthest(weights(sharded[f"{name} 0"]), weights(two_workers[f"{tuning} fp32 0"])) > 1e-3, name


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["si coupled", "si proximal"])
def test_a_recorded_path_leaves_the_importance_of_the_artifact(
    sharded: dict[str, JobValues],
    references: dict[str, tuple[Weights, Reference]],
    importances: dict[str, Path],
    name: str,
    stage: int,
) -> None:
    job, reference = sharded[f"{name} {stage}"], references[name][1]
    artifact = run_of(job).artifact
    info, earlier = read_info(artifact / "importance"), load_file(importances["si"] / TENSORS_FILE)
    assert (info.base_hash, info.estimator, info.tasks) == (hash_folder(artifact), "path_integral", 3)
    given = load_file(artifact / "importance" / TENSORS_FILE)
    for parameter, omega in reference.omega.items():
        moved = (reference.moving[parameter].detach() - reference.start[parameter]) ** 2
        wanted = earlier[parameter] + omega / (moved + XI)
        assert torch.allclose(given[parameter], wanted, atol=2e-3, rtol=1e-3), parameter
    assert max(omega.abs().max().item() for omega in reference.omega.values()) > 2 * XI, "a path must be seen"


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_sharded_fisher_information_equals_squares_of_single_examples(
    sharded: dict[str, JobValues], tiny_model: Path, estimator: str, stage: int
) -> None:
    job = sharded[f"fisher {estimator} {stage}"]
    model = load_base(tiny_model, torch.float32)
    data = load_prepared(Path(job["prepared"])).train
    wanted = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    drawn = pick_examples(len(data), 7, 5)
    assert len(drawn) == 7
    for index in drawn:
        loss = nats(model, data[index]) if estimator == "empirical" else sampled(model, data[index], 5 + index)
        for (name, _), grad in zip(
            model.named_parameters(), torch.autograd.grad(loss, model.parameters()), strict=True
        ):
            wanted[name] += grad**2 / 7
    given = load_file(Path(job["target"]) / TENSORS_FILE)
    assert given.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(given[name], wanted[name], rtol=1e-4, atol=1e-8), name
    info = read_info(Path(job["target"]))
    assert info.trace == pytest.approx(sum(value.sum().item() for value in wanted.values()), rel=1e-4)
    assert info.maximum == pytest.approx(max(value.max().item() for value in wanted.values()), rel=1e-4)
    assert (info.examples, info.estimator, info.reduction) == (7, estimator, "sum")


def sampled(model: Any, example: Any, seed: int) -> torch.Tensor:
    """-log p of tokens drawn at the targets' places."""
    ids, wanted = torch.tensor([example.ids]), torch.tensor(example.is_target)[1:]
    log_probs = functional.log_softmax(model(ids).logits[0, :-1][wanted], dim=-1)
    drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    return -log_probs.gather(1, drawn).sum()


# --------------------------------------------------------------------------------------------- known answers


def test_fisher_of_a_softmax_regression_is_its_closed_form() -> None:
    """For logits Wx the Fisher information of W_kd is E[p_k (1 - p_k) x_d^2]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 5, generator=generator)
    weight = torch.randn(3, 5, generator=generator, requires_grad=True)

    def losses_of_classes() -> Iterator[tuple[float, torch.Tensor]]:
        for row in inputs:
            log_probs = functional.log_softmax(weight @ row, dim=-1)
            for label in range(3):
                log_probs = functional.log_softmax(weight @ row, dim=-1)
                yield log_probs[label].exp().item(), -log_probs[label]

    found = diagonal_fisher({"weight": weight}, losses_of_classes(), len(inputs))["weight"]
    p = (inputs @ weight.detach().T).softmax(-1)
    assert torch.allclose(found, (p * (1 - p)).T @ inputs**2 / len(inputs), atol=1e-6)


@pytest.mark.parametrize("update", ["coupled", "proximal"])
def test_ewc_on_a_quadratic_ends_at_its_optimum(update: str) -> None:
    """The minimum of h/2 (theta - target)^2 + s w/2 (theta - anchor)^2 is (h target + s w anchor) / (h + s w)."""
    anchor, target = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([-1.0, 1.0, 0.0, 3.5])
    curvature, weight = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 4.0, 0.2])
    theta = anchor.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr=0.02)
    QuadraticPull(Layout.of_parameters({"theta": theta}), optimizer, strength=3.0, weights=[weight], update=update)
    for _ in range(3000):
        optimizer.zero_grad()
        (curvature / 2 * (theta - target) ** 2).sum().backward()
        optimizer.step()
    wanted = (curvature * target + 3 * weight * anchor) / (curvature + 3 * weight)
    assert torch.allclose(theta.detach(), wanted, atol=1e-4)


def test_a_proximal_pull_is_stable_where_the_explicit_one_diverges() -> None:
    for update, is_stable in (("coupled", False), ("proximal", True)):
        theta = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([theta], lr=0.1)
        QuadraticPull(Layout.of_parameters({"theta": theta}), optimizer, strength=1000.0, weights=None, update=update)
        for _ in range(30):
            optimizer.zero_grad()
            (theta - 1).square().sum().backward()
            optimizer.step()
        assert bool((theta.detach().abs() < 1).all()) == is_stable


def test_the_path_integral_adds_up_to_the_fall_of_the_loss() -> None:
    """Sum of omega = -sum g dtheta, which is the loss's fall where steps are small."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    path = PathIntegral(Layout.of_parameters(dict(model.named_parameters())), optimizer)
    curve = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    with torch.no_grad():
        fall = curve[0] - functional.cross_entropy(model(inputs), labels).item()
    assert fall > 0.02
    assert sum(omega.sum().item() for omega in path.omega) == pytest.approx(fall, rel=1e-2)


def test_si_follows_the_published_formula_over_two_tasks() -> None:
    """Omega = max(0, sum over tasks of omega / (dtheta^2 + xi)): the clip is of the sum."""
    theta = torch.tensor([0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.5)
    path = PathIntegral(Layout.of_parameters({"theta": theta}), optimizer)
    theta.grad = torch.tensor([-2.0, 1.0])
    optimizer.step()
    assert theta.tolist() == [1.0, -0.5]
    assert path.omega[0].tolist() == [2.0, 0.5]
    (given,) = path.importance(xi=1.0, earlier=[torch.tensor([-3.0, 0.1])])
    assert given.tolist() == pytest.approx([2.0 / 2 - 3.0, 0.5 / 1.25 + 0.1])


def test_the_products_gradient_is_autograds() -> None:
    """A start that is not zero, as PiSSA's, and a base weight stored (in, out), as GPT-2's."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], init_lora_weights=False))
    moving = {name: value for name, value in model.named_parameters() if value.requires_grad}
    weight = torch.rand(8, 24)
    optimizer = torch.optim.SGD(moving.values(), lr=1.0)
    layout = Layout.of_parameters(moving)
    start = {name: value.detach().clone() for name, value in moving.items()}
    ProductPull(model, layout, optimizer, strength=0.7, read=lambda name: weight)
    (a_name,) = (name for name in moving if "lora_A" in name)
    b_name = a_name.replace("lora_A", "lora_B")
    with torch.no_grad():
        for value in moving.values():
            value += torch.randn_like(value)
    a, b = moving[a_name], moving[b_name]
    change = 3 * (b @ a - start[b_name] @ start[a_name])
    wanted = torch.autograd.grad(0.35 * (weight.T * change**2).sum(), (a, b))
    before = {name: value.detach().clone() for name, value in moving.items()}
    for value in moving.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, grad in zip((a_name, b_name), wanted, strict=True):
        assert torch.allclose(before[name] - moving[name].detach(), grad, rtol=1e-4, atol=1e-5)


def test_importance_can_be_held_in_bf16() -> None:
    theta = torch.zeros(100, requires_grad=True)
    weight = torch.rand(100, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    QuadraticPull(
        Layout.of_parameters({"theta": theta}),
        optimizer,
        strength=1.0,
        weights=[weight.to(torch.bfloat16)],
        update="coupled",
    )
    with torch.no_grad():
        theta += 1
    theta.grad = torch.zeros(100)
    optimizer.step()
    assert torch.allclose(theta.detach(), 1 - 0.1 * weight, atol=1e-3)


def test_losses_of_protected_runs_differ_from_unprotected_ones(
    two_workers: dict[str, JobValues], sharded: dict[str, JobValues]
) -> None:
    assert losses(sharded["ewc proximal 0"]) != losses(two_workers["full fp32 0"])


# ----------------------------------------------------------------------------------------------- other scales


def test_a_protected_run_moves_from_two_workers_at_zero_3_to_one_at_zero_1(
    sharded: dict[str, JobValues], one_process: None, tmp_path: Path
) -> None:
    job = sharded["moved 3"]
    workspace = Workspace.at(tmp_path / "workspace")
    raw = {**job["spec"], "scaling": {**job["spec"]["scaling"], "workers": 1, "zero_stage": 1}}
    plan, _ = plan_run(RunSpec.model_validate(raw), workspace)
    moved = {**job, "spec": raw, "plan": vars(plan), "run": str(workspace.new_run("moved").path)}
    checkpoints = run_of(moved).checkpoints
    shutil.copytree(run_of(job).checkpoints / "step-0000010", checkpoints / "step-0000010")
    trainer = train_here(moved)
    assert [row["step"] for row in rows_of(run_of(moved)) if row["kind"] == "resume"] == [10]
    assert losses(moved) == pytest.approx(losses(job)[10:], abs=1e-4)
    assert farthest(weights(moved), weights(job)) < 1e-5
    given = load_file(run_of(moved).artifact / "importance" / TENSORS_FILE)
    wanted = load_file(run_of(job).artifact / "importance" / TENSORS_FILE)
    assert all(torch.allclose(given[name], wanted[name], rtol=1e-3, atol=2e-3) for name in wanted)
    trainer.engine.destroy()


@pytest.mark.parametrize("stage", range(4))
def test_what_a_checkpoint_restores_elsewhere_is_what_was_saved_bit_for_bit(
    sharded: dict[str, JobValues], one_process: None, tmp_path: Path, stage: int
) -> None:
    job = sharded["moved 3"]
    workspace = Workspace.at(tmp_path / "workspace")
    raw = {**job["spec"], "scaling": {**job["spec"]["scaling"], "workers": 1, "zero_stage": stage}}
    plan, _ = plan_run(RunSpec.model_validate(raw), workspace)
    moved = {**job, "spec": raw, "plan": vars(plan), "run": str(workspace.new_run("moved").path)}
    shutil.copytree(run_of(job).checkpoints, run_of(moved).checkpoints)
    trainer = Trainer.start(Job(**moved), run_of(moved))
    assert trainer.step == 20
    layout, names = trainer.attached.layout, list(trainer.attached.layout.shapes)
    restored = layout.gather(list(layout.masters), names)
    assert all(torch.equal(restored[name], value) for name, value in weights(job).items())
    counts = {float(trainer.optimizer.state[master]["step"]) for master in layout.masters}
    assert counts == {20.0}
    again = trainer.attached.path
    assert again is not None
    omega = layout.gather(again.omega, names)
    trainer._save()
    saved = latest_checkpoint(run_of(moved).checkpoints)
    assert saved is not None
    with ExitStack() as stack:
        read = _open_shards(run_of(job).checkpoints / "step-0000020", stack)
        for name, value in omega.items():
            assert torch.equal(value.flatten(), read("si.omega", name, 0, value.numel()))
    trainer.engine.destroy()


@pytest.mark.parametrize("update", ["coupled", "proximal"])
def test_what_is_detached_acts_no_more_and_the_optimizer_keeps_its_state(update: str) -> None:
    theta = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1)
    layout = Layout.of_parameters({"theta": theta})
    path = PathIntegral(layout, optimizer)
    pull = QuadraticPull(layout, optimizer, strength=1.0, weights=None, update=update)
    theta.grad = torch.ones(3)
    optimizer.step()
    recorded = path.omega[0].clone()
    pull.detach()
    path.detach()
    with torch.no_grad():
        theta.fill_(5.0)
    theta.grad = torch.zeros(3)
    moment = optimizer.state[theta]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(path.omega[0], recorded)
    assert recorded.min() > 0
    assert torch.allclose(optimizer.state[theta]["exp_avg"], 0.9 * moment), "no pull was in the gradient"
    assert theta.min() > 4.8, "no pull moved the weights"
