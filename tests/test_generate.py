"""Replay rows that the base writes: seeded, bounded, cached, readable, and encoded as what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_replay import faults
from tiny_spec import write_rows, write_tiny_spec
from transformers import AutoModelForCausalLM

from cluster.pipeline import read_spec
from training import aids
from training.data.encoding import load_tokenizer
from training.data.prepare import load_prepared
from training.errors import TenureError
from training.objective import generate
from training.objective.generate import GenerateJob, Writer, longest_row, read_written, replay_job, write_replay
from training.spec import RunSpec
from training.stages import plan_run
from training.strategy import Generate
from training.workspace import Workspace

Rows = list[dict[str, Any]]


def job_of(folder: Path, model: Path, max_length: int = 96, seed: int = 0, **settings: Any) -> GenerateJob:
    values = Generate.model_validate({"examples": 6, "max_new_tokens": 12, **settings}).model_dump(mode="json")
    target = folder / "rows.jsonl"
    return GenerateJob(str(model), values, max_length, "refuse", seed, "float32", str(target), str(folder / "log"))


def written(job: GenerateJob) -> Rows:
    write_replay(job)
    return [json.loads(line) for line in Path(job.target).read_text(encoding="utf-8").splitlines()]


def counts(job: GenerateJob) -> dict[str, int]:
    found: dict[str, int] = json.loads(Path(job.target).with_suffix(".json").read_text())["counts"]
    return found


@pytest.fixture
def plain_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without its chat template."""
    copy = tmp_path / "plain"
    shutil.copytree(tiny_model, copy)
    (copy / "chat_template.jinja").unlink()
    return copy


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, str]:
    rows = [{"q": "one?"}, {"q": "and two?"}]
    return {"path": str(write_rows(tmp_path / "prompts.jsonl", rows)), "prompt": "q"}


def test_a_chat_model_writes_its_own_prompts_and_answers(tiny_model: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, tiny_model)
    rows = written(job)
    assert len(rows) == 6
    assert counts(job)["kept"] == 6
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert all(turn["content"].strip() for turn in row["messages"])
    assert len({row["messages"][0]["content"] for row in rows}) == 6


def test_the_same_settings_give_the_same_rows_and_another_seed_others(tiny_model: Path, tmp_path: Path) -> None:
    first = written(job_of(tmp_path, tiny_model))
    assert written(job_of(tmp_path, tiny_model)) == first
    assert written(job_of(tmp_path, tiny_model, seed=1)) != first


def test_given_prompts_are_answered_in_turn(tiny_model: Path, tmp_path: Path, prompts: dict[str, str]) -> None:
    rows = written(job_of(tmp_path, tiny_model, prompts=prompts | {"system": "be short"}, examples=3))
    asked = [[turn["content"] for turn in row["messages"][:-1]] for row in rows]
    assert asked == [["be short", "one?"], ["be short", "and two?"], ["be short", "one?"]]
    assert rows[0]["messages"][-1] != rows[2]["messages"][-1], "the same prompt is answered anew"


def test_a_model_without_a_template_writes_text_or_completes(
    plain_model: Path, tmp_path: Path, prompts: dict[str, str]
) -> None:
    assert all(set(row) == {"text", "finished"} for row in written(job_of(tmp_path, plain_model)))
    rows = written(job_of(tmp_path, plain_model, prompts=prompts, examples=2))
    assert [row["prompt"] for row in rows] == ["one?", "and two?"]
    assert all(row["completion"].strip() for row in rows)


def test_samples_follow_the_models_whole_distribution(plain_model: Path, tmp_path: Path) -> None:
    """First tokens of many rows against the exact softmax: no top-k, top-p or penalty of the model's own settings."""
    settings = json.loads((plain_model / "generation_config.json").read_text())
    settings |= {"top_k": 2, "repetition_penalty": 9.0, "top_p": 0.1, "do_sample": True}
    (plain_model / "generation_config.json").write_text(json.dumps(settings))
    job = job_of(tmp_path, plain_model, examples=3000, max_new_tokens=1, temperature=2.0)
    writer = Writer(job, Generate.model_validate(job.generate), *generate._load(job))
    start = tuple(generate.start_ids(writer.tokenizer))
    stops = sorted(writer._stops())
    torch.manual_seed(0)
    drawn = [ids[0] for ids in generate._continue(writer.model, [start] * 4000, 1, 2.0, stops, writer.tokenizer)]
    with torch.no_grad():
        exact = (writer.model(torch.tensor([start])).logits[0, -1] / 2.0).softmax(-1)
    found = torch.bincount(torch.tensor(drawn), minlength=len(exact)) / len(drawn)
    assert (found - exact).abs().sum() / 2 < 0.12, "total variation; about 0.1 by chance for 260 tokens"
    assert exact.max() < 0.5


def test_a_batch_answers_each_prompt_as_alone(tiny_model: Path) -> None:
    """Left padding changes nothing: at a temperature near 0 every row is the greedy answer to its own prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), load_tokenizer(tiny_model)
    rows = [tuple(tokenizer(text)["input_ids"]) for text in ("a", "a longer prompt", "mid one")]
    together = generate._continue(model, rows, 5, 1e-4, [tokenizer.eos_token_id], tokenizer)
    for row, given in zip(rows, together, strict=True):
        ids = list(row)
        for token in given:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break


def test_what_the_base_ended_has_an_end_token_and_what_was_cut_has_none(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"messages": turns, "finished": True},
        {"messages": turns, "finished": False},
        {"prompt": "hi", "completion": "yes", "finished": True},
        {"prompt": "hi", "completion": "yes", "finished": False},
        {"text": "yes", "finished": True},
        {"text": "yes", "finished": False},
    ]
    encoded = read_written(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, 96)
    targets = [
        tokenizer.decode([token for token, wanted in zip(row.ids, row.is_target, strict=True) if wanted])
        for row in encoded
    ]
    assert targets == ["yes<|im_end|>", "yes", " yes<|im_end|>", " yes", "yes<|im_end|>", "yes"]
    whole = [tokenizer.decode(row.ids) for row in encoded]
    assert whole[1] == whole[0].removesuffix("<|im_end|>")
    assert whole[3] == "hi yes"
    assert whole[5] == "<|im_start|>yes"
    assert not any(row.is_target[0] for row in encoded)


def test_rows_stay_within_their_bound(tiny_model: Path, plain_model: Path, tmp_path: Path) -> None:
    for model, length in ((tiny_model, 60), (tiny_model, 400), (plain_model, 10), (plain_model, 400)):
        job = job_of(tmp_path, model, max_length=length)
        tokenizer = load_tokenizer(model)
        bound = longest_row(Generate.model_validate(job.generate), tokenizer, length, "refuse")
        assert bound <= length
        written(job)
        assert 0 < max(len(row.ids) for row in read_written(Path(job.target), tokenizer, bound)) <= bound


def test_a_model_that_says_nothing_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(model: Any, rows: Any, most: int, temperature: float, stops: list[int], tokenizer: Any) -> Any:
        return [[stops[0]] * most for _ in rows]

    monkeypatch.setattr(generate, "_continue", silent)
    job = job_of(tmp_path, tiny_model)
    with pytest.raises(TenureError, match="only 0 of 6 rows that the base wrote hold text"):
        write_replay(job)
    assert not Path(job.target).exists()


# ------------------------------------------------------------------------------------------------ in a run


def spec_of(folder: Path, model: Path, workspace: Workspace, share: float = 0.25, **settings: Any) -> RunSpec:
    protection = {"type": "replay", "share": share, "generate": {"examples": 6, "max_new_tokens": 12, **settings}}
    return read_spec(write_tiny_spec(folder, model, protections=[protection]), workspace)


def test_a_run_plans_without_the_rows_and_trains_with_them(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    spec = spec_of(tmp_path, tiny_model, workspace)
    plan, prepared = plan_run(spec, workspace)
    assert (plan.num_replay, plan.replay_per_batch, plan.replay_token_share) == (6, 2, None)
    assert len(load_prepared(prepared).replay) == 0
    assert not (workspace.cache / "replay").exists(), "a check writes no rows"
    made: list[GenerateJob] = []

    def here(function: Any, jobs: list[GenerateJob], *_: Any) -> float:
        made.extend(jobs)
        return float(sum(function(job) for job in jobs))

    monkeypatch.setattr(aids, "run_tasks", here)
    data = load_prepared(aids.ready_data(spec, workspace, Console(quiet=True)))
    assert len(data.replay) == 6
    assert max(len(row.ids) for row in data.replay) <= load_prepared(prepared).counts().longest
    assert aids.ready_data(spec_of(tmp_path, tiny_model, workspace, 0.5), workspace, Console(quiet=True)).is_dir()
    assert len(made) == 1, "the second run takes the rows that are there, and loads no model"


def test_all_that_decides_the_rows_makes_other_rows(
    tiny_model: Path, plain_model: Path, tmp_path: Path, prompts: dict[str, str]
) -> None:
    workspace = Workspace.at(tmp_path / "workspace")

    def target(model: Path = tiny_model, **settings: Any) -> str:
        return replay_job(spec_of(tmp_path, model, workspace, **settings), workspace).target

    others = [{"examples": 7}, {"max_new_tokens": 13}, {"temperature": 0.5}, {"prompts": prompts}]
    assert target(share=0.5) == target()
    targets = [target(), target(plain_model), *(target(**other) for other in others)]
    write_rows(Path(prompts["path"]), [{"q": "three?"}])
    targets.append(target(prompts=prompts))
    assert len(set(targets)) == 7


def test_bad_settings_are_refused_before_anything_is_loaded(
    tiny_model: Path, tmp_path: Path, prompts: dict[str, str]
) -> None:
    def told(**settings: Any) -> str:
        return faults(tmp_path, tiny_model, [{"type": "replay", "generate": settings}])

    assert "there is no file" in told(prompts=prompts | {"path": "nowhere.jsonl"})
    assert "no column 'x'" in told(prompts=prompts | {"prompt": "x"})
    assert "temperature" in told(temperature=0.0)
    assert "max_new_tokens" in told(max_new_tokens=0)
    write_rows(Path(prompts["path"]), [{"q": "one?"}, {"q": "x" * 99}, {"q": "y" * 80}])
    message = told(prompts=prompts)
    assert "2 prompts leave no room for an answer within max_length 64" in message
    assert "data.overlong: drop" in message
    write_rows(Path(prompts["path"]), [{"q": " "}])
    assert "'q' is empty: there is nothing to answer" in told(prompts=prompts)
    short = {"training": {"max_length": 20, "validation_items": 0}}
    told_short = faults(tmp_path, tiny_model, [{"type": "replay", "generate": {}}], **short)
    assert "leave no room for a generated row of 20" in told_short
