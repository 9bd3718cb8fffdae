"""Batched log-likelihoods: against one forward pass a pair, and when a GPU's memory would not do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.evaluation.likelihood import BatchSize, Likelihoods, Pair


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model)
    return loaded.eval()


def some_pairs(count: int = 60) -> list[Pair]:
    """Contexts of 1 to 40 tokens; every third asks for a second last token after the same ones, every fifth again."""
    draw = random.Random(3)
    pairs: list[Pair] = []
    for index in range(count):
        context = [draw.randrange(250) for _ in range(draw.randrange(1, 40))]
        continuation = [draw.randrange(250) for _ in range(draw.randrange(1, 8))]
        pairs.append((context, continuation))
        if index % 3 == 0:
            pairs.append((context, [*continuation[:-1], draw.randrange(250)]))
        if index % 5 == 0:
            pairs.append((context, continuation))
    return pairs


def alone(model: Any, pair: Pair) -> tuple[float, bool]:
    """One pair by one forward pass, without padding."""
    context, continuation = pair
    with torch.no_grad():
        log_probs = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
    told = log_probs[len(context) - 1 : -1]
    nats = sum(float(told[place, token]) for place, token in enumerate(continuation))
    return nats, told.argmax(-1).tolist() == list(continuation)


def assert_alike(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-4)


def test_batches_of_like_length_score_each_pair_as_alone(model: PreTrainedModel) -> None:
    pairs = some_pairs()
    with torch.no_grad():
        greedy = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    pairs.append(([5, 6, 7], [greedy]))
    found = Likelihoods(model, 1024).of(pairs)
    assert_alike(found, [alone(model, pair) for pair in pairs])
    assert found[-1][1] is True


def test_what_is_asked_twice_is_read_once(model: PreTrainedModel) -> None:
    read: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, __, named: read.append(len(named["input_ids"])), with_kwargs=True)
    pairs = some_pairs()
    Likelihoods(model, 1024).of(pairs)
    hook.remove()
    assert sum(read) == len({(*context, *continuation[:-1]) for context, continuation in pairs}) < len(pairs)


def test_the_head_sees_the_targets_alone_and_is_left_as_it_was(model: PreTrainedModel) -> None:
    seen: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[0]))
    Likelihoods(model, 1024).of([([1, 2, 3, 4, 5, 6], [7, 8]), ([9], [1])])
    hook.remove()
    assert seen == [3]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def test_what_is_longer_than_the_model_reads_is_cut_on_the_left(model: PreTrainedModel) -> None:
    ids = [token % 200 for token in range(60)]
    (found,) = Likelihoods(model, 32).of([(ids[:50], ids[50:])])
    assert_alike([found], [alone(model, (ids[-33:50], ids[50:]))])


class Small:
    """A model on a GPU that has room for so many padded tokens."""

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most, self.sizes = model, most, list[int]()
        self.device = model.device
        self.get_output_embeddings = model.get_output_embeddings

    def __call__(self, *, input_ids: torch.Tensor, **named: Any) -> Any:
        self.sizes.append(input_ids.numel())
        if input_ids.numel() > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.model(input_ids=input_ids, **named)


def test_batches_are_halved_until_they_fit_and_stay_so(model: PreTrainedModel) -> None:
    small, pairs = Small(model, 200), some_pairs()
    scorer = Likelihoods(small, 1024)
    assert_alike(scorer.of(pairs), [alone(model, pair) for pair in pairs])
    small.sizes.clear()
    scorer.of(pairs)
    assert max(small.sizes) <= 256


def test_one_row_that_does_not_fit_is_no_reason_to_go_on(model: PreTrainedModel) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Likelihoods(Small(model, 20), 1024).of([([1] * 30, [2])])


def test_batches_grow_while_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    size = BatchSize(64, 512, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 12 * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 * gib)
    for _ in range(5):
        size.grow()
    assert size.value == 512
    size.halve()
    size.grow()
    assert size.value == 256
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 40 * gib)
    full = BatchSize(64, 512, torch.device("cuda"))
    full.grow()
    assert full.value == 64
