"""How likely a model finds many continuations, in as few and as even batches as memory allows.

Inputs that are alike go through the model once, inputs of like length together, and the output head sees the positions
that are asked for alone: the largest tensor is (targets, vocabulary), not (rows, length, vocabulary).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from training.objective.targets import hidden_at

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of what follows it, neither of them empty

_CPU_TOKENS, _GPU_TOKENS, _MOST_TOKENS = 2048, 16_384, 262_144
_TARGETS_AT_ONCE = 2048


@dataclass(frozen=True)
class _Question:
    """One continuation: which input it is read from, and the ids that its last positions should predict."""

    row: int
    following: tuple[int, ...]


class BatchSize:
    """How many padded tokens, or rows, a batch may hold.

    On a GPU it is halved when memory runs out, and doubled while half of it is free; on a CPU it stays as it is.
    """

    def __init__(self, first: int, most: int, device: torch.device) -> None:
        self.value = first
        self._most = most
        self._gpu = device.type == "cuda"

    def halve(self) -> None:
        """After an out-of-memory error of a batch that can be made smaller."""
        self.value = self._most = max(1, self.value // 2)
        torch.cuda.empty_cache()

    def grow(self) -> None:
        """After a whole batch: twice as much where that would leave a tenth of the memory free."""
        if not self._gpu or self.value >= self._most:
            return
        free, _ = torch.cuda.mem_get_info()
        available = free + torch.cuda.memory_reserved()
        if torch.cuda.max_memory_allocated() * 2 < 0.9 * available:
            self.value = min(self._most, self.value * 2)


class Likelihoods:
    """Scores continuations with one model, and keeps the batch size that it found from one call to the next.

    Args:
        model: a causal language model of transformers, or an adapter around one.
        max_length: tokens that the model reads at most; what is longer is cut on the left.
        max_rows: rows of a batch at most; None for as many as its tokens allow.
    """

    def __init__(self, model: Any, max_length: int, max_rows: int | None = None) -> None:
        self._model = model
        self._max_length = max_length
        self._max_rows = max_rows
        gpu = model.device.type == "cuda"
        self._tokens = BatchSize(
            _GPU_TOKENS if gpu else _CPU_TOKENS, _MOST_TOKENS if gpu else _CPU_TOKENS, model.device
        )

    def of(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """For each pair the log-probability of its continuation in nats, and whether greedy decoding says the same."""
        rows, questions = _asked(pairs, self._max_length)
        asked: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            asked.setdefault(question.row, []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for batch in self._batches(rows):
            numbers = [number for row in batch for number in asked[row]]
            for number, answer in zip(
                numbers, self._answers(rows, batch, [questions[n] for n in numbers]), strict=True
            ):
                found[number] = answer
        return found

    def _batches(self, rows: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of the rows, the longest first: what does not fit shows at once."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        while order:
            fit = max(1, self._tokens.value // len(rows[order[0]]))
            fit = min(fit, self._max_rows or fit)
            yield order[:fit]
            order = order[fit:]

    def _answers(
        self, rows: Sequence[tuple[int, ...]], batch: list[int], questions: list[_Question]
    ) -> list[tuple[float, bool]]:
        """The answers of a batch; where memory runs out, those of its halves."""
        try:
            answers = self._read(rows, batch, questions)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            failed = True
        else:
            failed = False
            self._tokens.grow()
        if not failed:
            return answers
        self._tokens.halve()
        half = set(batch[: len(batch) // 2])
        first = [question for question in questions if question.row in half]
        second = [question for question in questions if question.row not in half]
        before, after = batch[: len(half)], batch[len(half) :]
        return self._answers(rows, before, first) + self._answers(rows, after, second)

    def _read(
        self, rows: Sequence[tuple[int, ...]], batch: list[int], questions: list[_Question]
    ) -> list[tuple[float, bool]]:
        device, longest = self._model.device, max(len(rows[row]) for row in batch)
        ids = torch.tensor([[*rows[row], *[0] * (longest - len(rows[row]))] for row in batch], device=device)
        start = {row: place * longest + len(rows[row]) for place, row in enumerate(batch)}
        places = [start[q.row] + offset for q in questions for offset in range(-len(q.following), 0)]
        index, inverse = torch.unique(torch.tensor(places, device=device), return_inverse=True)
        following = torch.tensor([token for q in questions for token in q.following], device=device)
        with torch.inference_mode(), head_at(self._model, longest, index):
            logits = self._model(input_ids=ids, use_cache=False).logits
            nats, greedy = _told(logits, inverse, following)
        return _summed(nats.tolist(), greedy.tolist(), [len(question.following) for question in questions])


def _asked(pairs: Sequence[Pair], max_length: int) -> tuple[list[tuple[int, ...]], list[_Question]]:
    """The different inputs, and for each pair which of them it is read from."""
    places: dict[tuple[int, ...], int] = {}
    questions = []
    for context, continuation in pairs:
        whole = (*context, *continuation)[-(max_length + 1) :]
        row = places.setdefault(whole[:-1], len(places))
        questions.append(_Question(row, tuple(whole[-min(len(continuation), len(whole) - 1) :])))
    return list(places), questions


@contextmanager
def head_at(model: Any, length: int, index: torch.Tensor) -> Iterator[None]:
    """The output head computes logits (positions, vocabulary) at these positions of the flattened rows alone."""

    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return hidden_at(inputs, length, index)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _told(logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (targets,) in fp32 of the ids (targets,), and whether each is the likeliest token."""
    nats, greedy = [], []
    for piece in torch.split(logits, _TARGETS_AT_ONCE):
        nats.append(piece.float().logsumexp(-1))
        greedy.append(piece.argmax(-1))
    given = logits[rows, ids].float() - torch.cat(nats)[rows]
    return given, torch.cat(greedy)[rows] == ids


def _summed(nats: list[float], greedy: list[bool], sizes: list[int]) -> list[tuple[float, bool]]:
    sums, start = [], 0
    for size in sizes:
        sums.append((sum(nats[start : start + size]), all(greedy[start : start + size])))
        start += size
    return sums
