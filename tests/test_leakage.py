"""Overlap of training rows with suites: planted leaks are found and named, look-alikes are not, and a run stops."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
import yaml
from one_command import run_tenure
from tiny_spec import SENTENCES, sums, write_rows, write_tiny_spec

from training.errors import TenureError
from training.inspection.leakage import check_leakage, find_leaks
from training.inspection.overlap import find_overlap
from training.inspection.samples import Sample
from training.inspection.words import hash_grams, split_words
from training.spec import RunSpec
from training.specfile import load_spec
from training.workspace import Workspace

TEMPLATE = (
    "Below is an instruction that describes a task together with an input that gives further context. "
    "Write a response that completes the request as well as you can and keep it short. Input: "
)
WORDS = [f"word{number}" for number in range(2000)]


def prose(seed: int, words: int) -> str:
    """Words in an order of their own."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def overlap(items: Sequence[tuple[str, str]], rows: Sequence[tuple[str, str]]) -> list[tuple[str, str, bool]]:
    """(item, row, with its answer) of what is found; items are called i0, i1, ... and rows r0, r1, ..."""
    suite = [Sample(f"i{number}", *item) for number, item in enumerate(items)]
    found = find_overlap({"suite": suite}, [Sample(f"r{number}", *row) for number, row in enumerate(rows)])
    return [(one.item.where, one.row, one.with_answer) for one in found["suite"]]


def test_words_are_the_same_whatever_their_case_punctuation_and_width() -> None:
    assert split_words("Hello,  WORLD! Ｆｕｌｌ width") == split_words("hello world full width")
    assert split_words("3+4") != split_words("3*4") != split_words("3-4")
    assert split_words("漢字かな") == ["漢", "字", "か", "な"]


def test_grams_are_the_same_numbers_in_every_process() -> None:
    a, b, c = (int.from_bytes(blake2b(letter, digest_size=8).digest()) for letter in (b"a", b"b", b"c"))
    expected = [(first * 0x9E3779B97F4A7C15 + second) % 2**64 for first, second in ((a, b), (b, c))]
    assert hash_grams(["a", "b", "c"], 2).tolist() == expected
    assert len(hash_grams(["a"], 2)) == 0


def test_an_item_is_found_with_its_row_whatever_stands_around_it() -> None:
    item = (prose(1, 30), "forty two")
    rows = [
        (prose(2, 30), "forty two"),
        (f"Please answer. {item[0].upper()}!", "It is forty two."),
        (prose(3, 9), "no"),
    ]
    assert overlap([item], rows) == [("i0", "r1", True)]


def test_a_known_question_with_another_answer_gives_nothing_away() -> None:
    long = prose(5, 40)
    items = [(prose(1, 30), "yes"), (prose(4, 30), long)]
    assert overlap(items, [(items[0][0], "no"), (items[1][0], prose(6, 40))]) == [("i0", "r0", False)]
    assert overlap(items, [(items[1][0], long)]) == [("i1", "r0", True)]


def test_a_template_that_prompts_share_is_no_overlap() -> None:
    items = [(TEMPLATE + prose(seed, 6), "yes") for seed in range(40)]
    rows = [(TEMPLATE + prose(seed, 6), "yes") for seed in range(100, 200)]
    assert overlap(items, rows) == []
    assert overlap(items, rows[:4]) == []
    assert overlap(items, [*rows, (TEMPLATE + prose(7, 6), "yes")]) == [("i7", "r100", True)]


def test_a_template_of_a_few_items_and_rows_is_none_either() -> None:
    items = [(TEMPLATE + prose(seed, 6), "yes") for seed in range(3)]
    assert overlap(items, [(TEMPLATE + prose(seed, 6), "yes") for seed in range(50, 53)]) == []


def test_a_question_in_another_template_is_found() -> None:
    questions = [prose(seed, 25) for seed in range(40)]
    items = [(f"{TEMPLATE}{question} Think before you answer and then say one word.", "yes") for question in questions]
    assert overlap(items, [(questions[3], "Yes"), (prose(90, 40), "yes")]) == [("i3", "r0", True)]


def test_a_leak_that_is_repeated_many_times_is_no_template() -> None:
    item = (prose(1, 30), "yes")
    rows = [(item[0], f"{prose(seed, 12)} so yes") for seed in range(30)]
    assert overlap([item], rows) == [("i0", "r0", True)]


def test_numbers_that_change_make_another_question() -> None:
    def ask(a: int, b: int) -> tuple[str, str]:
        return f"is the number {a} larger than the number {b}", "yes" if a > b else "no"

    pairs = [(a, b) for a in range(10) for b in range(10)]
    rows = [ask(a, b) for a, b in pairs if (a + b) % 2]
    assert overlap([ask(a, b) for a, b in pairs if not (a + b) % 2], rows) == []
    assert overlap([ask(3, 4)], rows) == [("i0", f"r{rows.index(ask(3, 4))}", True)]


def test_short_items_are_compared_whole() -> None:
    items = [("who are you", "a model"), ("what is 3+4", "7"), ("name a colour", "red")]
    rows = [
        ("who are you", "a person"),
        ("tell me who are you and where you come from", "a model of language that was trained"),
        ("what is 3*4", "7"),
        ("Name  a colour", "Red"),
    ]
    assert overlap(items, rows) == [("i2", "r3", True)]


def test_plain_text_is_found_in_pieces() -> None:
    text = prose(1, 120)
    words = text.split()
    pieces = [("", " ".join(words[start : start + 40])) for start in range(0, 120, 40)]
    assert overlap([("", text)], [("", prose(2, 50)), *pieces]) == [("i0", "r1", True)]
    assert overlap([("", text)], pieces[:2]) == []


def write_leaky(folder: Path, model: Path, leaks: int, **data: object) -> Path:
    """The tiny spec whose target suite has fifty items, so many of which are training rows too."""
    path = write_tiny_spec(folder, model)
    write_rows(folder / "train.jsonl", [{"question": prose(seed, 12), "answer": "yes"} for seed in range(50)])
    start = 50 - leaks
    items = [{"question": prose(seed, 12), "answer": "yes"} for seed in range(start, start + 50)]
    write_rows(folder / "sums.jsonl", items)
    spec = yaml.safe_load(path.read_text())
    spec["training"]["max_length"] = 256
    spec["data"] = {"train": spec["data"]["train"], **data}
    path.write_text(yaml.safe_dump(spec))
    return path


def test_a_leak_stops_check_and_train_before_anything_starts(tiny_model: Path, tmp_path: Path) -> None:
    write_leaky(tmp_path, tiny_model, leaks=3)
    for command in ("check", "train"):
        done = run_tenure(tmp_path, command, "spec.yaml")
        assert done.returncode == 2
        told = done.stderr
        assert "suite 'sums': 3 of 50 items (6.0%) stand in the training rows with their answers" in told
        assert f"{tmp_path / 'sums.jsonl'} row 1 is in {tmp_path / 'train.jsonl'} row 48 (100%)" in told
        assert "data.allow_overlap: [sums]" in told
        assert not (tmp_path / "workspace" / "runs").exists()
        assert not (tmp_path / "workspace" / "ray.log").exists()


def test_an_overlap_that_is_allowed_or_small_is_told(tiny_model: Path, tmp_path: Path) -> None:
    write_leaky(tmp_path, tiny_model, leaks=3, allow_overlap=["sums"])
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "overlap  3 of 50 items (6.0%) of the suite 'sums' stand in the training rows" in done.stdout
    workspace = Workspace.at(tmp_path / "workspace")
    assert len(check_leakage(load_spec(write_leaky(tmp_path, tiny_model, leaks=1)), workspace)) == 1
    assert check_leakage(load_spec(write_leaky(tmp_path, tiny_model, leaks=0)), workspace) == []
    with pytest.raises(TenureError, match="10 of 50"):
        check_leakage(load_spec(write_leaky(tmp_path, tiny_model, leaks=10, max_overlap=0.19)), workspace)


def test_an_unknown_suite_cannot_be_allowed(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TenureError, match=r"allow_overlap names 'summs', which is no suite\n.*sums, sentences"):
        load_spec(write_leaky(tmp_path, tiny_model, leaks=3, allow_overlap=["summs"]))


def replaying(folder: Path, model: Path, source: dict[str, str]) -> RunSpec:
    replay = {"type": "replay", "share": 0.25, "data": [source]}
    path = write_tiny_spec(folder, model, protections=[replay])
    spec = yaml.safe_load(path.read_text())
    write_rows(folder / "train.jsonl", [{"question": prose(seed, 12), "answer": "yes"} for seed in range(50)])
    spec["data"].pop("max_overlap")
    path.write_text(yaml.safe_dump(spec))
    return load_spec(path)


def test_replaying_a_retention_suite_is_told_and_a_target_suite_refused(tiny_model: Path, tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    retained = replaying(tmp_path, tiny_model, {"path": "sentences.jsonl", "text": "text"})
    told = check_leakage(retained, workspace)
    assert told == [
        f"{len(SENTENCES)} of {len(SENTENCES)} items (100.0%) of the suite 'sentences' stand in the rows to replay: "
        "its score says less about what was not replayed"
    ]
    target = replaying(tmp_path, tiny_model, {"path": "sums.jsonl", "prompt": "question", "completion": "answer"})
    with pytest.raises(TenureError, match=r"8 of 8 items .* stand in the rows to replay"):
        check_leakage(target, workspace)


def test_an_answer_is_computed_once_for_the_same_data(tiny_model: Path, tmp_path: Path) -> None:
    spec, workspace = load_spec(write_tiny_spec(tmp_path, tiny_model)), Workspace.at(tmp_path / "workspace")
    found = find_leaks(spec, workspace)
    assert [(leaks.suite, leaks.role, len(leaks.leaked)) for leaks in found] == [
        ("sums", "target", 8),
        ("sentences", "retention", 0),
    ]
    (kept,) = (workspace.cache / "leakage").iterdir()
    kept.write_text("[]")
    assert find_leaks(spec, workspace) == []
    write_rows(tmp_path / "train.jsonl", sums(3))
    assert len(find_leaks(spec, workspace)[0].leaked) == 3


def test_the_files_behind_a_glob_are_compared(tiny_model: Path, tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tiny_model)
    raw = yaml.safe_load(path.read_text())
    raw["data"]["train"][0]["path"] = "part-*.jsonl"
    for part in range(2):
        write_rows(tmp_path / f"part-{part}.jsonl", sums(8)[4 * part : 4 * part + 4])
    path.write_text(yaml.safe_dump(raw))
    workspace = Workspace.at(tmp_path / "workspace")
    assert len(find_leaks(load_spec(path), workspace)[0].leaked) == 8
    write_rows(tmp_path / "part-1.jsonl", [{"question": "what is nothing", "answer": "none"}])
    assert len(find_leaks(load_spec(path), workspace)[0].leaked) == 4
