"""Answers by vLLM: those of transformers, for a base and for an adapter that is not merged."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_adapter
from tiny_spec import write_rows, write_tiny_spec

from training.data.encoding import load_tokenizer
from training.errors import TenureError
from training.evaluation.scoring import ScoreJob, protocol_of, read_scores, score_model
from training.evaluation.suites import Question
from training.evaluation.vllm_answers import Weights, questions_of
from training.spec import Evaluation, RunSpec, not_for_vllm
from training.specfile import load_spec
from training.strategy import Full, Lora
from training.suite_spec import Answering
from training.workspace import MERGED_FOLDER, write_json

ASKED = {"prompt": "question", "completion": "answer"}


def spec_of(folder: Path, model: Path, **evaluation: Any) -> RunSpec:
    """Answers of two lengths, in chat and without, beside a text that is read."""
    rows = [{"question": f"what is {n} and {n + 1}, and then", "answer": str(n)} for n in range(6)]
    write_rows(folder / "asked.jsonl", rows)
    target = [{"name": "exact", "path": "asked.jsonl", "metric": "exact_match", "max_new_tokens": 12, **ASKED}]
    retention = [
        {"name": "plain", "path": "asked.jsonl", "metric": "chrf", "max_new_tokens": 20, "chat": False, **ASKED},
        {"name": "again", "path": "asked.jsonl", "metric": "token_f1", "max_new_tokens": 12, **ASKED},
        {"name": "text", "path": "sentences.jsonl", "metric": "cross_entropy", "text": "text"},
    ]
    spec = load_spec(write_tiny_spec(folder, model, suites={"target": target, "retention": retention}))
    return spec.model_copy(update={"evaluation": Evaluation(**evaluation)})


def in_one_process(jobs: list[ScoreJob]) -> None:
    for job in jobs:
        score_model(job)


def test_answers_are_those_of_transformers(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_tiny_adapter(tiny_model, tmp_path / "adapter")
    jobs = {}
    for engine in ("transformers", "vllm"):
        values = spec_of(tmp_path, tiny_model, engine=engine).model_dump(mode="json")
        for name, artifact in (("base", None), ("adapter", str(adapter))):
            target = str(tmp_path / f"{engine}-{name}.json")
            log = str(tmp_path / f"{engine}-{name}.log")
            jobs[engine, name] = ScoreJob(values, str(tiny_model), artifact, artifact is not None, target, log)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # vLLM stays out of the other tests' process
        process.submit(in_one_process, [jobs["vllm", "base"], jobs["vllm", "adapter"]]).result()
    in_one_process([jobs["transformers", "base"], jobs["transformers", "adapter"]])
    for name in ("base", "adapter"):
        ours, theirs = (read_scores(Path(jobs[engine, name].target)) for engine in ("transformers", "vllm"))
        assert ours[0].keys() == theirs[0].keys()
        for suite in ("exact", "plain", "again"):
            assert [item.answer for item in theirs[0][suite]] == [item.answer for item in ours[0][suite]], (name, suite)
            assert theirs[0][suite] == ours[0][suite]
        assert theirs[0]["text"] == ours[0]["text"]
        assert theirs[1] == ours[1]
    answers = [
        [item.answer for item in read_scores(Path(jobs["vllm", n].target))[0]["plain"]] for n in ("base", "adapter")
    ]
    assert answers[0] != answers[1]


def test_a_question_is_asked_once_and_keeps_room_for_its_answer(tiny_model: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tiny_model)
    suites = [suite for suite in spec.suites.every if isinstance(suite, Answering)]
    tokenizer = load_tokenizer(tiny_model)
    whole = questions_of(suites, tokenizer, 512)
    assert [question.max_new_tokens for question in whole] == [12] * 6 + [20] * 6
    assert all(isinstance(question, Question) for question in whole)
    short = questions_of(suites, tokenizer, 24)
    assert {len(question.ids) for question in short} <= {12, 4}
    assert short[0].ids == whole[0].ids[-12:]


def test_the_engine_is_part_of_the_protocol(tiny_model: Path, tmp_path: Path) -> None:
    told = [protocol_of(spec_of(tmp_path, tiny_model, engine=name), "float32") for name in ("transformers", "vllm")]
    assert {key for key in told[1] if told[0].get(key) != told[1][key]} == {"engine"}
    assert str(told[1]["engine"]).startswith("vllm ")


def test_what_vllm_loads_is_what_is_served(tmp_path: Path) -> None:
    base, artifact = tmp_path / "base", tmp_path / "artifact"
    artifact.mkdir()
    write_json(artifact / "adapter_config.json", {"r": 12})
    lora = Lora(rank=12, alpha=24)
    assert Weights.of(base, None, lora) == Weights(base)
    assert Weights.of(base, artifact, Full()) == Weights(artifact)
    assert Weights.of(base, artifact, lora) == Weights(base, artifact, 12)
    dora = Lora(rank=12, alpha=24, options={"use_dora": True})
    assert Weights.of(base, artifact, dora) == Weights(artifact / MERGED_FOLDER)


def test_what_vllm_cannot_answer_for_is_refused(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_tiny_spec(tmp_path, tiny_model, tuning={"type": "prompt_tuning", "options": {"num_virtual_tokens": 2}})
    path.write_text(path.read_text() + "evaluation: {engine: vllm}\n")
    with pytest.raises(TenureError, match=r"evaluation\.engine.*prompt_tuning cannot be merged\n.*transformers"):
        load_spec(path)
    path = write_tiny_spec(tmp_path, tiny_model)
    path.write_text(path.read_text() + "evaluation: {engine: vllm}\n")
    assert load_spec(path).evaluation.engine == "vllm"
    monkeypatch.setattr("training.spec.find_spec", lambda _: None)
    with pytest.raises(TenureError, match="vLLM is not installed here"):
        load_spec(path)
    assert not_for_vllm(None, look=False) is None
