"""KL to the base: against a computation by hand, none of a model to itself, and the base asked once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import END, make_tiny_adapter
from tiny_spec import write_rows, write_tiny_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data.encoding import Encoded
from training.evaluation.judge import summarise_kl
from training.evaluation.kl import MAX_TOKENS, MAX_TOKENS_PER_ITEM, _bounded, _drawn
from training.evaluation.scoring import ScoreJob, base_log_probs, is_scored, read_kl, score_model
from training.evaluation.transfer import kl_divergence
from training.spec import RunSpec
from training.specfile import load_spec

TARGET = {"name": "sums", "metric": "exact_match", "prompt": "question", "completion": "answer", "chat": False}


@pytest.fixture
def spec(tiny_model: Path, tmp_path: Path) -> RunSpec:
    """Three questions as a target suite, and three texts to retain, one of them long."""
    suites = {
        "target": [TARGET | {"path": "asked.jsonl"}],
        "retention": [{"name": "text", "path": "texts.jsonl", "metric": "cross_entropy", "text": "text"}],
    }
    write_tiny_spec(tmp_path, tiny_model)
    write_rows(tmp_path / "asked.jsonl", [{"question": f"what is {n}+{n}", "answer": str(2 * n)} for n in (3, 4, 9)])
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in ("The sea.", "A hill.", "long " * 40)])
    return load_spec(write_tiny_spec(tmp_path, tiny_model, suites=suites))


def score(
    spec: RunSpec, folder: Path, artifact: Path | None, *, is_adapter: bool
) -> dict[str, list[tuple[float, int]]]:
    """A model's KL to the base, whose scores lie in the folder."""
    name = artifact.name if artifact else "base"
    target, base = folder / f"{name}.json", str(folder / "base.json")
    path = str(artifact) if artifact else None
    values = spec.model_dump(mode="json")
    score_model(ScoreJob(values, spec.model, path, is_adapter, str(target), str(folder / "log"), base))
    return read_kl(target)


def by_hand(spec: RunSpec, tuned: torch.nn.Module, prompt: str, answer: str, is_text: bool) -> tuple[float, int]:
    """Nats summed over the answer's tokens and the end, or over a text's tokens after its start token."""
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    start = [tokenizer.bos_token_id] if is_text else tokenizer(prompt, add_special_tokens=False)["input_ids"]
    end = [] if is_text else [tokenizer.convert_tokens_to_ids(END)]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *end][:MAX_TOKENS_PER_ITEM]
    base = AutoModelForCausalLM.from_pretrained(spec.model)
    with torch.no_grad():
        both = [model(torch.tensor([[*start, *answer_ids]])).logits[0].log_softmax(-1) for model in (base, tuned)]
    told = slice(len(start) - 1, len(start) - 1 + len(answer_ids))
    return float(kl_divergence(both[0][told], both[1][told]).sum()), len(answer_ids)


def test_an_adapter_is_as_far_from_its_base_as_by_hand(spec: RunSpec, tmp_path: Path) -> None:
    score(spec, tmp_path, None, is_adapter=False)
    adapter = make_tiny_adapter(Path(spec.model), tmp_path / "adapter")
    found = score(spec, tmp_path, adapter, is_adapter=True)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.model), str(adapter))
    asked = [by_hand(spec, tuned, f"what is {n}+{n}", f" {2 * n}", is_text=False) for n in (3, 4, 9)]
    texts = [by_hand(spec, tuned, "", text, is_text=True) for text in ("The sea.", "A hill.", "long " * 40)]
    for role, wanted in (("target", asked), ("retention", texts)):
        assert sorted(count for _, count in found[role]) == sorted(count for _, count in wanted)
        assert sorted(nats for nats, _ in found[role]) == pytest.approx(sorted(nats for nats, _ in wanted), rel=1e-3)
        assert min(nats for nats, _ in found[role]) > 1e-3


def test_a_model_is_at_no_distance_from_itself(spec: RunSpec, tmp_path: Path) -> None:
    of_base = score(spec, tmp_path, None, is_adapter=False)
    base = AutoModelForCausalLM.from_pretrained(spec.model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "untrained"))
    shutil.copytree(spec.model, tmp_path / "copy")
    for name, is_adapter in (("untrained", True), ("copy", False)):
        found = score(spec, tmp_path, tmp_path / name, is_adapter=is_adapter)
        assert {role: [count for _, count in items] for role, items in found.items()} == {
            role: [count for _, count in items] for role, items in of_base.items()
        }
        for role, kl in summarise_kl(found).items():
            assert kl.nats == pytest.approx(0, abs=1e-6), role
            assert kl.interval == pytest.approx((0, 0), abs=1e-6)


def test_the_base_is_asked_once(spec: RunSpec, tmp_path: Path) -> None:
    score(spec, tmp_path, None, is_adapter=False)
    scores = tmp_path / "base.json"
    kept = base_log_probs(scores).read_bytes()
    shutil.copytree(spec.model, tmp_path / "copy")
    score(spec, tmp_path, tmp_path / "copy", is_adapter=False)
    assert base_log_probs(scores).read_bytes() == kept
    assert is_scored(scores, is_base=True)
    base_log_probs(scores).unlink()
    assert not is_scored(scores, is_base=True)
    assert is_scored(scores, is_base=False)


def test_items_are_bounded_and_drawn_from_all_suites_in_turn(spec: RunSpec, tmp_path: Path) -> None:
    write_rows(tmp_path / "texts.jsonl", [{"text": f"{n:03d} " + "long " * 40} for n in range(40)])
    write_rows(tmp_path / "asked.jsonl", [{"question": f"what is {n}+{n}", "answer": str(2 * n)} for n in range(90)])
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rows = list(_drawn(spec, "retention", tokenizer, 1024))
    assert sum(row.num_targets for row in rows) == MAX_TOKENS
    assert max(row.num_targets for row in rows) == MAX_TOKENS_PER_ITEM
    numbers = [int(tokenizer.decode(row.ids[1:4])) for row in rows]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) < 10 < 30 < max(numbers)
    both = spec.suites.model_copy(update={"retention": (*spec.suites.retention, *spec.suites.target)})
    mixed = list(_drawn(spec.model_copy(update={"suites": both}), "retention", tokenizer, 1024))
    assert [row.num_targets > 10 for row in mixed[:6]] == [True, False] * 3


def test_a_row_is_cut_after_its_last_target_that_counts() -> None:
    row = Encoded((1, 2, 3, 4, 5), (False, True, False, True, True))
    assert _bounded(row, 2) == Encoded((1, 2, 3, 4), (False, True, False, True))
    assert _bounded(row, 3) == row


def test_the_mean_is_over_tokens_and_the_interval_over_items() -> None:
    found = summarise_kl({"target": [(2.0, 4), (0.1, 1)], "retention": []})
    assert list(found) == ["target"]
    assert found["target"].nats == pytest.approx(2.1 / 5)
    assert (found["target"].num_items, found["target"].num_tokens) == (2, 5)
    low, high = found["target"].interval
    assert 0.1 <= low < 2.1 / 5 < high <= 0.5
