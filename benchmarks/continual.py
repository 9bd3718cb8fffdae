"""Learns tasks one after the other and measures what is left of each, with the protections that language models get.

Only torch and the modules of `training` that need nothing else are used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from training.protection.layout import Layout, Sheet
from training.protection.protections import PathIntegral, QuadraticPull
from training.protection.squares import diagonal_fisher


@dataclass(frozen=True, eq=False)
class Task:
    """One classification task.

    Attributes:
        inputs, test_inputs: (examples, features), float.
        labels, test_labels: (examples,), counted from the first output of the task.
        outputs: the model's outputs that belong to the task.
        columns: the order in which the features are seen, (features,); None: as they are.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    test_inputs: torch.Tensor
    test_labels: torch.Tensor
    outputs: slice
    columns: torch.Tensor | None = None

    @property
    def classes(self) -> int:
        return int(self.outputs.stop - self.outputs.start)

    def log_probs(self, model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """(examples, classes) over the task's own outputs."""
        seen = inputs if self.columns is None else inputs[:, self.columns]
        return functional.log_softmax(model(seen)[:, self.outputs], dim=-1)

    def loss(self, model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, the mean over these examples."""
        return functional.nll_loss(self.log_probs(model, self.inputs[rows]), self.labels[rows])

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module) -> float:
        """The share of the test examples whose label is the likeliest of the task's outputs."""
        right = self.log_probs(model, self.test_inputs).argmax(-1) == self.test_labels
        return right.float().mean().item()


@dataclass(frozen=True)
class Method:
    """How old tasks are kept.

    Attributes:
        protection: `none`, `ewc` (arXiv 1612.00796) or `si` (arXiv 1703.04200).
        strength: EWC's lambda, of lambda/2 sum F (theta - anchor)^2; SI's c, of c sum Omega (theta - anchor)^2.
        estimator: of EWC's F, see `squares`.
        anchors: `last`, one pull with the tasks' importances added up, towards the weights after the last task (online
            EWC with gamma 1, arXiv 1805.06370); `each`, one pull a task towards the weights after that task.
        examples: how many of a task's training examples F is estimated on.
        update: see QuadraticPull.
        xi: SI's damping.
    """

    protection: str = "none"
    strength: float = 0.0
    estimator: str = "exact"
    anchors: str = "last"
    examples: int = 500
    update: str = "coupled"
    xi: float = 0.1


@dataclass(frozen=True)
class Setup:
    """The network, a ReLU perceptron, and Adam's settings.

    Attributes:
        hidden: the width of its two hidden layers.
        steps: optimizer steps a task.
        resets: whether Adam forgets its moments between tasks.
    """

    hidden: int
    outputs: int
    steps: int
    batch_size: int
    resets: bool
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Outcome:
    """R[t][i], the accuracy on task i after training on task t, and what a step took."""

    accuracies: list[list[float]]
    step_ms: float
    seconds: float

    @property
    def average(self) -> float:
        """ACC, the mean over all tasks at the end (arXiv 1706.08840)."""
        return sum(self.accuracies[-1]) / len(self.accuracies)


def learn(tasks: Sequence[Task], method: Method, setup: Setup, seed: int) -> Outcome:
    """Train one network on the tasks in turn."""
    started, training_s = time.perf_counter(), 0.0
    device = tasks[0].inputs.device
    torch.manual_seed(seed)
    model = perceptron(tasks[0].inputs.shape[1], setup).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=setup.learning_rate, fused=device.type == "cuda" or None)
    generator = torch.Generator(device).manual_seed(seed)
    keeper = start_keeper(method, model, optimizer, generator)
    accuracies = []
    for task in tasks:
        if setup.resets:
            optimizer.state.clear()
        keeper.begin()
        begun = time.perf_counter()
        for rows in batches(len(task.labels), setup.batch_size, setup.steps, generator):
            optimizer.zero_grad()
            task.loss(model, rows).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        accuracies.append([known.accuracy(model) for known in tasks])
        training_s += time.perf_counter() - begun
        if task is not tasks[-1]:
            keeper.end(task)
    return Outcome(accuracies, training_s / (len(tasks) * setup.steps) * 1e3, time.perf_counter() - started)


def perceptron(features: int, setup: Setup) -> torch.nn.Sequential:
    """features - hidden - hidden - outputs, with torch's own initial weights."""
    return torch.nn.Sequential(
        torch.nn.Linear(features, setup.hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(setup.hidden, setup.hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(setup.hidden, setup.outputs),
    )


def batches(examples: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Rows of `steps` batches, in a new order every epoch."""
    left = steps
    while left:
        order = torch.randperm(examples, generator=generator, device=generator.device)
        epoch = torch.split(order, size)[:left]
        yield from epoch
        left -= len(epoch)


class Keeper:
    """Keeps nothing."""

    def begin(self) -> None:
        """Called before a task."""

    def end(self, task: Task) -> None:
        """Called after a task, its weights still there."""


def start_keeper(
    method: Method, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> Keeper:
    """What attaches a method's protections to the optimizer, task by task."""
    if method.protection == "ewc":
        return EwcKeeper(method, model, optimizer, generator)
    return SiKeeper(method, model, optimizer) if method.protection == "si" else Keeper()


class EwcKeeper(Keeper):
    """Estimates the Fisher information after every task and pulls from then on."""

    def __init__(
        self, method: Method, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> None:
        self._method, self._model, self._optimizer, self._generator = method, model, optimizer, generator
        self._layout = Layout.of_parameters(dict(model.named_parameters()))
        self._summed = self._layout.zeros()
        self._pull: QuadraticPull | None = None

    def end(self, task: Task) -> None:
        method = self._method
        rows = torch.randperm(len(task.labels), generator=self._generator, device=self._generator.device)
        found = squares(method.estimator, self._model, task, rows[: method.examples])
        weights = [found[name] for name in self._layout.shapes]
        if method.anchors == "last":
            self._summed = weights = [old + new for old, new in zip(self._summed, weights, strict=True)]
            if self._pull:
                self._pull.detach()
        self._pull = QuadraticPull(
            self._layout, self._optimizer, strength=method.strength, weights=weights, update=method.update
        )


class SiKeeper(Keeper):
    """Records the path of every task and pulls by what the tasks before left."""

    def __init__(self, method: Method, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._method, self._optimizer = method, optimizer
        self._layout = Layout.of_parameters(dict(model.named_parameters()))
        self._importance: Sheet | None = None
        self._pull: QuadraticPull | None = None

    def begin(self) -> None:
        self._path = PathIntegral(self._layout, self._optimizer)
        if self._importance:
            weights = [value.clamp(min=0) for value in self._importance]
            strength = 2 * self._method.strength
            self._pull = QuadraticPull(
                self._layout, self._optimizer, strength=strength, weights=weights, update=self._method.update
            )

    def end(self, task: Task) -> None:
        self._path.detach()
        if self._pull:
            self._pull.detach()
        self._importance = self._path.importance(self._method.xi, self._importance)


def squares(estimator: str, model: torch.nn.Module, task: Task, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean over the rows of squared gradients.

    `exact`: of -log p of every class of the task, weighted with its probability. `empirical`: of the label's.
    `batch`: of the *mean* loss of a batch of 128, which is not the Fisher information: a contrast.
    """
    named = dict(model.named_parameters())
    if estimator == "batch":
        parts = torch.split(rows, 128)
        return diagonal_fisher(named, ((1.0, task.loss(model, part)) for part in parts), len(parts))
    if estimator == "empirical":
        return diagonal_fisher(named, ((1.0, task.loss(model, row)) for row in torch.split(rows, 1)), len(rows))
    return diagonal_fisher(named, _losses_of_classes(model, task, rows), len(rows))


def _losses_of_classes(model: torch.nn.Module, task: Task, rows: torch.Tensor) -> Iterator[tuple[float, torch.Tensor]]:
    with torch.no_grad():
        probabilities = task.log_probs(model, task.inputs[rows]).exp().tolist()
    for row, weights in zip(torch.split(rows, 1), probabilities, strict=True):
        for label, weight in enumerate(weights):
            yield weight, -task.log_probs(model, task.inputs[row])[0, label]


def held_out(task: Task, examples: int) -> Task:
    """The task with its last training examples in place of its test examples: what a strength is chosen on."""
    return replace(
        task,
        inputs=task.inputs[:-examples],
        labels=task.labels[:-examples],
        test_inputs=task.inputs[-examples:],
        test_labels=task.labels[-examples:],
    )
