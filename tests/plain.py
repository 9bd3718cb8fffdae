"""The same training in plain torch: one process, one example at a time, no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jobs import JobValues, plan_of, spec_of

from training.data.batches import Schedule
from training.data.encoding import Encoded
from training.data.prepare import Prepared, load_prepared
from training.tuning import apply_tuning, load_base
from training.worker import seed_everything

Weights = dict[str, torch.Tensor]
# The loss of a global batch, of these examples, by a model.
BatchLoss = Callable[[torch.nn.Module, Prepared, list[int]], torch.Tensor]


@dataclass(frozen=True)
class Plain:
    """What plain training gave: the loss and gradient norm of every step, and the final weights."""

    losses: list[float]
    norms: list[float]
    weights: Weights


def train_plainly(job: JobValues, batch_loss: BatchLoss) -> Plain:
    """Train a job of the schedule STEPS."""
    spec, plan = spec_of(job), plan_of(job)
    data, settings = load_prepared(Path(job["prepared"])), spec.training
    seed_everything(settings.seed)
    model = apply_tuning(load_base(Path(spec.model), torch.float32), spec.tuning)
    moving = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(moving.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = Schedule(len(data.train), settings.global_batch_size, settings.epochs, settings.seed, settings.max_steps)
    losses, norms = [], []
    for step in range(plan.steps):
        loss = batch_loss(model, data, schedule.batch(step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(moving.values(), settings.max_grad_norm or math.inf)))
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_factor(step, plan.steps)
        optimizer.step()
    return Plain(losses, norms, {name.replace(".default.", "."): moving[name].detach() for name in moving})


def rate_factor(step: int, steps: int) -> float:
    """A fifth of the steps for warm-up, then half a cosine."""
    up = round(0.2 * steps)
    return (step + 1) / up if step < up else 0.5 * (1 + math.cos(math.pi * (step - up) / (steps - up)))


def target_logits(model: torch.nn.Module, row: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (targets, vocabulary) that predict a row's targets, and their ids (targets,)."""
    ids, wanted = torch.tensor(row.ids), torch.tensor(row.is_target)[1:]
    return model(ids[None]).logits[0, :-1][wanted], ids[1:][wanted]


def farthest(given: Weights, wanted: Weights) -> float:
    """The largest difference of any weight."""
    assert given.keys() == wanted.keys()
    return max((given[name] - wanted[name]).abs().max().item() for name in wanted)
