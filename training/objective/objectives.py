"""What is learned: the loss of a micro-batch as its share of the global batch's mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional

from training.attention import attend_within
from training.data.batches import collate, to_device
from training.data.store import targets_of
from training.models import read_model_info
from training.objective.divergence import Compare, Outcomes, divergence, forward_kl
from training.objective.signals import Signals
from training.objective.targets import Batch, TargetLogits, Targets
from training.objective.weighing import Weighed
from training.spec import RunSpec
from training.strategy import Distill, Dpo, Kl, moves_base
from training.tuning import load_base


@dataclass(frozen=True)
class Totals:
    """What a global batch's sums are divided by, known before its step: targets, their weights, pairs."""

    num_targets: int
    weight: float


@dataclass(frozen=True)
class Loss:
    """A micro-batch's shares of the global batch's loss (with gradients) and of the figures that are logged.

    `losses` (examples,) are the examples' own, without weights, divergences or a share: the cross-entropy summed over
    an example's target tokens, or a pair's loss.
    """

    value: torch.Tensor
    parts: dict[str, torch.Tensor]
    losses: torch.Tensor


class Objective(Protocol):
    """What a step minimises. Shares of all micro-batches of all workers sum up to means over the global batch."""

    head: TargetLogits
    names: tuple[str, ...]  # the parts of every loss, in order

    def totals(self, indices: Sequence[int]) -> Totals: ...

    def num_terms(self, index: int) -> int:
        """How many terms an example's own loss is a sum of."""

    def gather(self, indices: Sequence[int]) -> Batch:
        """A micro-batch of examples in the processor's memory; can be asked for ahead of its step."""

    def loss(self, engine: Any, indices: Sequence[int], totals: Totals, gathered: Batch | None = None) -> Loss:
        """The share of the examples `indices`; what gather() gave for them may be handed over."""


# ------------------------------------------------------------------------------------------- frozen models


class Frozen(Protocol):
    """A frozen model's outcomes at the targets of a batch, asked for before the graph of a step is built."""

    def outcomes(self, engine: Any, batch: Batch, indices: Sequence[int]) -> Outcomes | None:
        """None when the batch has no targets; every worker asks all the same, since asking may be collective."""


class SwitchedOff:
    """The base model: the tuned one with its adapter switched off."""

    def __init__(self, head: TargetLogits, temperature: float = 1.0) -> None:
        self._head, self._temperature = head, temperature

    @torch.no_grad()
    def targets(self, engine: Any, batch: Batch) -> Targets:
        """The base's predictions. The engine runs it: only its hooks gather what ZeRO 3 has sharded."""
        with switched_off(engine):
            return self._head.targets(engine, batch)

    def outcomes(self, engine: Any, batch: Batch, indices: Sequence[int]) -> Outcomes | None:
        targets = self.targets(engine, batch)
        return None if targets.is_empty else _vocabulary(targets.logits, self._temperature)


@contextmanager
def switched_off(engine: Any) -> Iterator[None]:
    """The engine's model without its adapter and without dropout; PEFT forgets which parameters move, so they are
    told again."""
    moving = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    was_training = engine.module.training
    engine.eval()
    try:
        with engine.module.disable_adapter():
            yield
    finally:
        engine.train(was_training)
        for parameter in engine.module.parameters():
            parameter.requires_grad_(False)
        for parameter in moving:
            parameter.requires_grad_(True)


class Teacher:
    """Another model that runs beside the tuned one, whole in every worker."""

    def __init__(self, model: torch.nn.Module, vocabulary: int, temperature: float) -> None:
        self._model = model.eval().requires_grad_(False)
        self._head = TargetLogits(model)
        self._vocabulary, self._temperature = vocabulary, temperature

    @torch.no_grad()
    def outcomes(self, engine: Any, batch: Batch, indices: Sequence[int]) -> Outcomes | None:
        targets = self._head.targets(self._model, batch)
        return None if targets.is_empty else _vocabulary(targets.logits[:, : self._vocabulary], self._temperature)


class Cached:
    """A model's outcomes as they were computed before the run."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals

    def outcomes(self, engine: Any, batch: Batch, indices: Sequence[int]) -> Outcomes | None:
        if not batch["target_ids"].numel():
            return None
        found = self._signals.outcomes(indices)
        assert found.ids is not None
        return Outcomes(found.log_probs.to(engine.device), found.ids.to(engine.device))


def _vocabulary(logits: torch.Tensor, temperature: float) -> Outcomes:
    return Outcomes((logits.float() / temperature).log_softmax(dim=-1))


# ------------------------------------------------------------------------------------------ token objectives


@dataclass(frozen=True)
class Divergence:
    """A term of the loss: how far the tuned model is from a frozen one, at a temperature, times its square.

    Attributes:
        factor: what it is multiplied with, the square of the temperature aside.
        weighted: whether the rows' weights count, or every target token alike.
        vocabulary: how many of the tuned model's logits are compared.
    """

    name: str
    factor: float
    weighted: bool
    compare: Compare
    frozen: Frozen
    temperature: float
    vocabulary: int

    def per_target(self, targets: Targets, outcomes: Outcomes) -> torch.Tensor:
        """Nats (targets,), without the factor."""
        tuned = outcomes.of(targets.logits[:, : self.vocabulary], self.temperature)
        return self.compare(outcomes.log_probs, tuned)


class TokenObjective:
    """A mean over the target tokens of the global batch: cross-entropy and divergences from frozen models.

    With weights w of the rows it is sum(w * loss) / sum(w), over target tokens. Examples have a row each, or are
    laid `end_to_end`.
    """

    def __init__(
        self,
        head: TargetLogits,
        weighed: Weighed,
        pad_id: int,
        cross_entropy: float,
        terms: Sequence[Divergence],
        end_to_end: bool = False,
    ) -> None:
        self.head = head
        self._rows, self._weights = weighed.data.sequences, weighed.weights
        self._num_targets = targets_of(self._rows)
        self._pad_id, self._end_to_end = pad_id, end_to_end
        self._cross_entropy = cross_entropy
        self._terms = tuple(terms)
        self.names = ("cross_entropy", *(term.name for term in terms)) if terms else ()

    def totals(self, indices: Sequence[int]) -> Totals:
        """Target tokens, and the sum of their weights."""
        counts = [int(self._num_targets[index]) for index in indices]
        weights = [count * self._weight(index) for count, index in zip(counts, indices, strict=True)]
        return Totals(sum(counts), sum(weights))

    def _weight(self, index: int) -> float:
        return self._weights[index] if self._weights else 1.0

    def num_terms(self, index: int) -> int:
        """Its target tokens."""
        return int(self._num_targets[index])

    def gather(self, indices: Sequence[int]) -> Batch:
        """Rows beside each other, or end to end."""
        return collate([self._rows[index] for index in indices], self._pad_id, self._end_to_end)

    def loss(self, engine: Any, indices: Sequence[int], totals: Totals, gathered: Batch | None = None) -> Loss:
        """The share of the examples `indices` in the loss and in the mean of each term."""
        batch = to_device(gathered or self.gather(indices), engine.device)
        given = [self._weight(index) / totals.weight if totals.weight else 0.0 for index in indices]
        shares = torch.tensor(given or [0.0], device=engine.device)
        if not self._terms:
            learned = self.head.learned(engine, batch, shares)
            return Loss(learned.value, {}, _by_example(learned.losses, learned.rows, len(indices)))
        outcomes = [term.frozen.outcomes(engine, batch, indices) for term in self._terms]
        targets = self.head.targets(engine, batch)
        if targets.is_empty:
            return _nothing(targets, self.names, len(indices))
        weights, per_target = shares[targets.rows], targets.cross_entropy()
        cross_entropy = (weights * per_target).sum()
        value = self._cross_entropy * cross_entropy
        parts = {"cross_entropy": cross_entropy.detach()}
        for term, found in zip(self._terms, outcomes, strict=True):
            assert found is not None
            nats = term.per_target(targets, found)
            mean = (weights * nats).sum() if term.weighted else nats.sum() / totals.num_targets
            value = value + term.factor * term.temperature**2 * mean
            parts[term.name] = mean.detach()
        return Loss(value, parts, _by_example(per_target.detach(), targets.rows, len(indices)))


def _by_example(losses: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Losses (targets,) summed by example (count,)."""
    return torch.zeros(count, device=losses.device).index_add(0, rows, losses)


def _nothing(targets: Targets, names: Sequence[str], num_examples: int) -> Loss:
    """The loss of a micro-batch without targets."""
    nothing = targets.nothing()
    zeros = torch.zeros(num_examples, device=nothing.device)
    return Loss(nothing, dict.fromkeys(names, nothing.detach()), zeros)


# ------------------------------------------------------------------------------------------------------ pairs

# The reference's summed log-probabilities (rows,) of a batch's answers.
Reference = Callable[[Any, Batch, Sequence[int]], torch.Tensor]


class DpoObjective:
    """-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)), a mean over pairs, arXiv 2305.18290.

    Log-ratios are of the tuned model to the reference, of whole answers. Logged: the share of pairs whose chosen answer
    has the higher log-ratio, and the mean of beta times the difference.
    """

    names: tuple[str, ...] = ("accuracy", "margin")

    def __init__(self, head: TargetLogits, weighed: Weighed, pad_id: int, beta: float, reference: Reference) -> None:
        self.head = head
        self._data, self._pad_id = weighed.data, pad_id
        self._beta, self._reference = beta, reference

    def totals(self, indices: Sequence[int]) -> Totals:
        """Target tokens of both answers, and pairs."""
        return Totals(sum(self._data.num_targets(index) for index in indices), float(len(indices)))

    def num_terms(self, index: int) -> int:
        """A pair's loss is one."""
        return 1

    def _sequences(self, indices: Sequence[int]) -> list[int]:
        """The chosen answers of pairs, then the rejected ones."""
        return [*indices, *(len(self._data.train) + index for index in indices)]

    def gather(self, indices: Sequence[int]) -> Batch:
        """Both answers of every pair."""
        return collate([self._data.sequences[index] for index in self._sequences(indices)], self._pad_id)

    def loss(self, engine: Any, indices: Sequence[int], totals: Totals, gathered: Batch | None = None) -> Loss:
        """The share of the pairs `indices` in the loss, the accuracy and the margin."""
        sequences = self._sequences(indices)
        batch = to_device(gathered or self.gather(indices), engine.device)
        reference = self._reference(engine, batch, sequences)
        targets = self.head.targets(engine, batch)
        if targets.is_empty:
            return _nothing(targets, self.names, len(indices))
        ratios = answer_log_probs(targets, len(sequences)) - reference
        chosen, rejected = ratios.chunk(2)
        margins = self._beta * (chosen - rejected)
        accuracy, margin = (margins > 0).float().sum(), margins.detach().sum()
        losses = -functional.logsigmoid(margins)
        parts = {"accuracy": accuracy / totals.weight, "margin": margin / totals.weight}
        return Loss(losses.sum() / totals.weight, parts, losses.detach())


def answer_log_probs(targets: Targets, num_rows: int) -> torch.Tensor:
    """Log-probabilities (rows,) of the rows' answers, summed over their tokens."""
    sums = torch.zeros(num_rows, device=targets.logits.device)
    return sums.index_add(0, targets.rows, -targets.cross_entropy())


def _switched_off_reference(head: TargetLogits) -> Reference:
    base = SwitchedOff(head)

    def reference(engine: Any, batch: Batch, sequences: Sequence[int]) -> torch.Tensor:
        targets = base.targets(engine, batch)
        if targets.is_empty:
            return torch.zeros(len(sequences), device=engine.device)
        return answer_log_probs(targets, len(sequences))

    return reference


def _cached_reference(signals: Signals) -> Reference:
    def reference(engine: Any, batch: Batch, sequences: Sequence[int]) -> torch.Tensor:
        sums = [signals.row_log_probs(index).sum() for index in sequences]
        return torch.stack(sums).to(engine.device) if sums else torch.zeros(0, device=engine.device)

    return reference


# ------------------------------------------------------------------------------------------------- from a spec


def make_objective(
    spec: RunSpec,
    model: Any,
    weighed: Weighed,
    aids: dict[str, str],
    pad_id: int,
    device: torch.device,
    end_to_end: bool = False,
) -> Objective:
    """The objective of a spec, with the frozen models that it and the protections compare with.

    Args:
        model: the model inside the engine.
        aids: the paths of what was computed once before the run.
        end_to_end: whether examples are laid end to end, which the model knows of.
    """
    head = TargetLogits(model)
    if isinstance(spec.objective, Dpo):
        cached = moves_base(spec.tuning)
        reference = _cached_reference(Signals(Path(aids["signals"]))) if cached else _switched_off_reference(head)
        return DpoObjective(head, weighed, pad_id, spec.objective.beta, reference)
    terms = []
    share = 1.0
    if isinstance(spec.objective, Distill):
        share = 1 - spec.objective.weight
        terms.append(_distillation(spec, spec.objective, weighed, aids, device, end_to_end))
    for protection in spec.protections:
        if isinstance(protection, Kl):
            terms.append(_kl_to_base(spec, protection, head, weighed, aids))
    return TokenObjective(head, weighed, pad_id, share, terms, end_to_end)


def _distillation(
    spec: RunSpec,
    distill: Distill,
    weighed: Weighed,
    aids: dict[str, str],
    device: torch.device,
    end_to_end: bool,
) -> Divergence:
    size = min(_vocabulary_of(spec.model), _vocabulary_of(distill.teacher))
    frozen: Frozen
    if distill.top_k:
        frozen = Cached(Signals(Path(aids["teacher"]), weighed.kept))
    else:
        dtype = torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
        teacher = load_base(Path(distill.teacher), dtype)
        if end_to_end:
            attend_within(teacher)
        frozen = Teacher(teacher.to(device), size, distill.temperature)
    return Divergence(
        name="divergence",
        factor=distill.weight,
        weighted=True,
        compare=divergence(distill.divergence, distill.beta),
        frozen=frozen,
        temperature=distill.temperature,
        vocabulary=size,
    )


def _kl_to_base(spec: RunSpec, kl: Kl, head: TargetLogits, weighed: Weighed, aids: dict[str, str]) -> Divergence:
    frozen: Frozen
    if moves_base(spec.tuning):
        frozen = Cached(Signals(Path(aids["signals"]), weighed.kept))
    else:
        frozen = SwitchedOff(head, kl.temperature)
    return Divergence(
        name="kl",
        factor=kl.strength,
        weighted=False,
        compare=forward_kl,
        frozen=frozen,
        temperature=kl.temperature,
        vocabulary=_vocabulary_of(spec.model),
    )


def _vocabulary_of(model: str) -> int:
    return read_model_info(Path(model)).vocab_size
