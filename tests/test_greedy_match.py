"""The metric greedy_match says of every item what generating the answer says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_spec import sums, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data.items import read_items
from training.evaluation.scoring import _score_suite, alone, held_model
from training.evaluation.suites import encode_item
from training.suite_spec import ExactMatch, GreedyMatch

LEARNED, ROWS = 8, 16


@pytest.mark.parametrize("chat", [True, False])
def test_it_tells_what_generating_would(tiny_model: Path, tmp_path: Path, chat: bool) -> None:
    write_rows(tmp_path / "sums.jsonl", sums(ROWS))
    columns = {"name": "s", "path": tmp_path / "sums.jsonl", "prompt": "question", "completion": "answer", "chat": chat}
    matched = GreedyMatch(metric="greedy_match", **columns)
    said = ExactMatch(metric="exact_match", max_new_tokens=8, **columns)
    model = learned_half(tiny_model, matched)
    with alone():
        held = held_model(model, tiny_model)
        one, other = ([answer.score for answer in _score_suite(suite, held)] for suite in (matched, said))
    assert one == other
    assert 0 < sum(one) < ROWS


def learned_half(folder: Path, suite: GreedyMatch) -> torch.nn.Module:
    """The tiny model, with the first rows of a suite learned by heart."""
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = [encode_item(suite, item, tokenizer, 128) for item in read_items(suite)[:LEARNED]]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        for row in rows:
            labels = [token if target else -100 for token, target in zip(row.ids, row.is_target, strict=True)]
            loss = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels])).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_the_end_of_an_answer_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    """Or a completion would match that greedy decoding only begins with."""
    write_rows(tmp_path / "sums.jsonl", sums(ROWS))
    columns = {"name": "s", "path": tmp_path / "sums.jsonl", "prompt": "question", "completion": "answer"}
    suite = GreedyMatch(metric="greedy_match", chat=False, **columns)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoded = [encode_item(suite, item, tokenizer, 128) for item in read_items(suite)]
    assert all(row.ids[-1] == tokenizer.eos_token_id and row.is_target[-1] for row in encoded)
