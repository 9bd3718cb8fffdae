"""The diagonal Fisher information of a language model's weights, computed by DeepSpeed's workers at any ZeRO stage."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from training import engine as engines
from training.data.encoding import Encoded
from training.data.prepare import load_prepared
from training.faults import explained_at, output_to
from training.protection.importance import importance_sheet, read_info, write_importance
from training.protection.layout import Layout, Sheet, gather_to_first
from training.protection.squares import SquaredGradients
from training.tuning import load_base


class Collector(torch.optim.Optimizer):
    """A client optimizer that keeps what is in the gradients at its step and changes nothing."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.found: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self.found[master] = master.grad.detach().float().clone()

    def sheet(self, layout: Layout) -> Sheet:
        """What was found, in the order of the layout's shards; zero where there was no gradient."""
        return [
            found if (found := self.found.get(master)) is not None else torch.zeros_like(master, requires_grad=False)
            for master in layout.masters
        ]


def example_loss(model: Any, example: Encoded, estimator: str, seed: int, device: torch.device) -> torch.Tensor:
    """-log p summed over the target tokens of one example.

    `empirical` takes the example's own tokens, `exact` draws each from the model's distribution at its place, from a
    generator that the seed alone decides, so that the draw is the same whatever worker makes it.
    """
    ids = torch.tensor([example.ids], device=device)
    wanted = torch.tensor(example.is_target[1:], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1][wanted].float()
    labels = ids[0, 1:][wanted]
    if estimator == "exact":
        generator = torch.Generator().manual_seed(seed)
        probabilities = logits.detach().softmax(-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)
    return functional.cross_entropy(logits, labels, reduction="sum")


def fisher_worker(config: dict[str, Any]) -> None:
    """Entry point of Ray Train: the importance of a base model's weights, written by the first worker."""
    job = FisherJob(**config)
    logs = Path(job.logs)
    with output_to(logs / f"importance-{dist.get_rank()}.log"), explained_at(logs):
        _compute(job)


@dataclass(frozen=True)
class FisherJob:
    """What a worker is sent, as plain values. `about` goes into the artifact as it is."""

    base: str
    prepared: str
    target: str
    logs: str
    precision: str
    zero_stage: int
    estimator: str
    examples: int
    seed: int
    previous: str | None
    gamma: float
    about: dict[str, Any]


def _compute(job: FisherJob) -> None:
    """Every worker squares the gradients of its share of the examples in one accumulated step of DeepSpeed."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    model = load_base(Path(job.base), torch.bfloat16 if job.precision == "bf16" else torch.float32)
    model.requires_grad_(True)
    model.eval()
    examples = load_prepared(Path(job.prepared)).train
    drawn = pick_examples(len(examples), job.examples, job.seed)
    rounds = -(-len(drawn) // workers)
    optimizer = Collector(model.parameters())
    engine = engines.start_counting_engine(model, optimizer, job.precision, job.zero_stage, rounds)
    layout = Layout.of_engine(engine)
    with SquaredGradients(parameter for parameter in engine.module.parameters() if parameter.requires_grad).open():
        for turn in range(rounds):
            place = turn * workers + rank
            # A worker without an example left repeats the first, times zero: all take part in every reduction.
            index, scale = (drawn[place], 1.0) if place < len(drawn) else (drawn[0], 0.0)
            loss = example_loss(engine, examples[index], job.estimator, job.seed + index, engine.device)
            engine.backward(loss * (rounds * scale))  # DeepSpeed divides by the rounds
            engine.step()
    # DeepSpeed averages over the workers.
    sheet = [found * (workers / len(drawn)) for found in optimizer.sheet(layout)]
    tasks = 1
    if job.previous is not None:
        past = importance_sheet(Path(job.previous), layout)
        sheet = [found.add_(old, alpha=job.gamma) for found, old in zip(sheet, past, strict=True)]
        tasks += read_info(Path(job.previous)).tasks
    gathered = gather_to_first(layout, sheet)
    if rank == 0:
        counted = {"examples": len(drawn), "estimator": job.estimator, "reduction": "sum", "gamma": job.gamma}
        write_importance(Path(job.target), gathered, {**job.about, **counted, "tasks": tasks})
    dist.barrier()
    engine.destroy()


def pick_examples(available: int, wanted: int, seed: int) -> list[int]:
    """Indices of the examples that are looked at: a seeded draw without replacement, at most all."""
    order = list(range(available))
    random.Random(seed).shuffle(order)
    return sorted(order[:wanted])
