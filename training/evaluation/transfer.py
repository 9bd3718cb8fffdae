"""The arithmetic of gaining and forgetting: pure functions of scores, each with its source.

Scores are "higher is better" unless said otherwise: pass a cross-entropy with its sign turned. The accuracy matrix R
has the shape (T, T): R[t, i] is the score on task i after learning tasks 0 to t, one after the other; `untrained`, of
shape (T,), holds the scores before the first. An entry that was never measured is nan; a figure that needs it fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from training.errors import fail

Array = np.ndarray


def average_accuracy(matrix: ArrayLike) -> float:
    """ACC = mean over tasks i of R[T, i]: what the last model knows of every task.

    Source: Lopez-Paz and Ranzato, Gradient Episodic Memory, arXiv 1706.08840, equation 2.
    """
    scores = _square(matrix)
    return _mean(scores[-1], "average accuracy")


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT = mean over i < T of (R[T, i] - R[i, i]): what later tasks did to earlier ones; negative is forgetting.

    Source: arXiv 1706.08840, equation 3.
    """
    scores = _square(matrix, tasks=2)
    return _mean((scores[-1] - scores.diagonal())[:-1], "backward transfer")


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike) -> float:
    """FWT = mean over i >= 2 of (R[i - 1, i] - b_i): what earlier tasks did to a task before it was learned.

    Source: arXiv 1706.08840, equation 4, with b_i the untrained model's score on task i.
    """
    scores, before = _square(matrix, tasks=2), np.asarray(untrained, dtype=float)
    if before.shape != (len(scores),):
        raise fail(f"{len(scores)} tasks have {before.size} untrained scores", "", "score every task before the first")
    return _mean(scores.diagonal(offset=1) - before[1:], "forward transfer")


def forgetting(matrix: ArrayLike) -> float:
    """F = mean over i < T of (max over l < T of R[l, i] - R[T, i]): the way down from each task's best earlier score.

    Entries above the diagonal (a task not yet learned) count where they were measured. Negative where tasks improved.
    Source: Chaudhry et al., Riemannian Walk, arXiv 1801.10112, section 2.
    """
    return _mean(forgetting_per_task(matrix), "forgetting")


def forgetting_per_task(matrix: ArrayLike) -> Array:
    """max over l < T of R[l, i] - R[T, i] for every task i < T, of shape (T - 1,); see `forgetting`."""
    scores = _square(matrix, tasks=2)
    earlier = scores[:-1, :-1]
    learned = np.tril(np.ones(earlier.shape, dtype=bool))
    best = np.where(learned | ~np.isnan(earlier), earlier, -np.inf).max(axis=0)
    return np.asarray(best - scores[-1, :-1])


def general_ability_delta(before: ArrayLike, after: ArrayLike) -> float:
    """Mean over general suites of (R after - R before); negative is forgetting.

    Source: TRACE, arXiv 2310.06762, section 3.3.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape != second.shape:
        raise fail(f"{first.size} suites before and {second.size} after are no pairs", "", "score the same suites")
    return _mean(second - first, "general-ability delta")


@dataclass(frozen=True)
class Summary:
    """A task sequence in five figures; those that need two tasks, or scores that are not there, are None."""

    average_accuracy: float
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    num_tasks: int


def summarise(matrix: ArrayLike, untrained: ArrayLike | None = None) -> Summary:
    """All figures of a sequence. Forward transfer is None where tasks were not scored before they were learned."""
    scores = _square(matrix)
    several = len(scores) > 1
    looked_ahead = several and untrained is not None and not np.isnan(scores.diagonal(offset=1)).any()
    return Summary(
        average_accuracy=average_accuracy(scores),
        backward_transfer=backward_transfer(scores) if several else None,
        forward_transfer=forward_transfer(scores, untrained) if looked_ahead and untrained is not None else None,
        forgetting=forgetting(scores) if several else None,
        num_tasks=len(scores),
    )


def gain(score: float, base: float, full: float) -> float:
    """G = (s - s_0) / (s_full - s_0): the share of the best full tuning's gain that a run reached.

    `full` is the score of the best full tuning with a tuned learning rate, chosen on validation. Lower-is-better scores
    may be given as they are, for the signs cancel. Source: this project.
    """
    if full == base:
        raise fail("full tuning gained nothing over the base, so no share of its gain can be told")
    return (score - base) / (full - base)


def loss(base: float, tuned: float, *, higher_is_better: bool = True) -> float:
    """What a suite lost, in its own unit; negative where it improved. For a cross-entropy: its rise, in its unit."""
    return base - tuned if higher_is_better else tuned - base


def chance_corrected(score: float, chance: float) -> float:
    """(s - c) / (1 - c): 0 at chance level c, 1 when all is right. Source: Cohen's kappa, 1960, with fixed chance."""
    if not 0 <= chance < 1:
        raise fail(f"a chance level of {chance:g} is not in [0, 1)")
    return (score - chance) / (1 - chance)


@dataclass(frozen=True)
class Kept:
    """One retention suite's scores before and after, as shares, and its chance level."""

    name: str
    base: float
    tuned: float
    chance: float = 0.0

    @property
    def ratio(self) -> float:
        """r / r_0, both chance-corrected; not clipped.

        Raises:
            TenureError: the base is not above chance, so there is nothing to retain.
        """
        before = chance_corrected(self.base, self.chance)
        if before <= 0:
            what = f"the base scores {self.base:.4f} where chance gives {self.chance:.4f}: there is nothing to retain"
            raise fail(what, self.name, "take a suite on which the base is above chance")
        return chance_corrected(self.tuned, self.chance) / before


def retention(suites: Sequence[Kept], *, clipped: bool = True) -> float:
    """rho = mean over suites of min(1, r / r_0), r and r_0 chance-corrected; without min when not clipped.

    For suites scored as shares; a cross-entropy's change is told in nats instead. Source: this project.
    """
    return _mean(np.array([min(1.0, suite.ratio) if clipped else suite.ratio for suite in suites]), "retention")


def nats_per_token(nats_per_byte: float, num_bytes: float, num_tokens: int) -> float:
    """A cross-entropy in nats per token from the one per UTF-8 byte of the same text."""
    return nats_per_byte * num_bytes / num_tokens


def kl_divergence(base: ArrayLike, tuned: ArrayLike) -> Array:
    """KL(base || tuned) in nats, over the last axis of log-probabilities of the same shape.

    Over the base's k likeliest tokens and one bucket for the rest it is a lower bound of the whole (data-processing
    inequality). Source: Kullback and Leibler, 1951; the direction is that of LwF, arXiv 1606.09282.
    """
    before, after = np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)
    probabilities = np.exp(before)
    said = probabilities > 0
    log_ratios = np.subtract(before, after, out=np.zeros_like(before), where=said)
    return np.asarray((probabilities * log_ratios).sum(axis=-1))


def _square(matrix: ArrayLike, tasks: int = 1) -> Array:
    scores = np.asarray(matrix, dtype=float)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise fail(f"an accuracy matrix has as many rows as columns, not the shape {scores.shape}")
    if len(scores) < tasks:
        raise fail(f"{len(scores)} tasks are too few: this figure needs {tasks}")
    return scores


def _mean(values: Array, figure: str) -> float:
    """The mean, refused over nothing and over scores that were never measured."""
    if not values.size:
        raise fail(f"{figure} needs at least one score")
    if np.isnan(values).any():
        raise fail(f"{figure} needs scores that were never measured", "", "score every task after every step")
    return float(values.mean())
