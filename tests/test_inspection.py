"""What `tenure data` says: planted duplicates, secrets, odd rows and labels are found, and clean data raise none."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_command import run_tenure
from tiny import CHAT_TEMPLATE, END
from tiny_spec import write_rows, write_tiny_spec

from training.data.encoding import load_tokenizer
from training.data.rows import Conversation
from training.errors import TenureError
from training.inspection.duplicates import SIMILARITY, DuplicateSearch
from training.inspection.figures import DataReport, Finding
from training.inspection.labels import LabelCounts, is_unbalanced
from training.inspection.languages import SAMPLED, LanguageSample, load_identifier
from training.inspection.oddities import TEXTS, find_oddities
from training.inspection.page import render_page
from training.inspection.private import find_private, is_iban, mask_private, passes_luhn
from training.inspection.samples import Sample, sample_of
from training.inspection.survey import survey
from training.specfile import load_spec
from training.workspace import Workspace

WORDS = [f"word{number}" for number in range(3000)]


def prose(seed: int, words: int) -> str:
    """Words in an order of their own."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def question(seed: int) -> dict[str, str]:
    return {"question": prose(seed, 14), "answer": prose(seed + 10_000, 3)}


CLEAN = [question(seed) for seed in range(60)]


def report_of(folder: Path, model: Path, rows: list[dict[str, Any]], **changes: Any) -> DataReport:
    """The report of the tiny spec over these training rows; `changes` are laid over its `data` section."""
    path = write_tiny_spec(folder, model, training={"max_length": 512})
    write_rows(folder / "train.jsonl", rows)
    spec = yaml.safe_load(path.read_text())
    spec["data"] |= changes
    path.write_text(yaml.safe_dump(spec))
    return survey(load_spec(path), path, Workspace.at(folder / "workspace"))


def kinds(report: DataReport, level: str = "") -> dict[str, int]:
    """How many rows every kind of finding about what is learned from has."""
    found = {finding.kind: finding for name, finding in report.all_findings if name in ("", "train")}
    return {kind: finding.count for kind, finding in found.items() if not level or finding.level == level}


def finding(report: DataReport, kind: str) -> Finding:
    return next(finding for _, finding in report.all_findings if finding.kind == kind)


def test_clean_data_raise_nothing(tiny_model: Path, tmp_path: Path) -> None:
    report = report_of(tmp_path, tiny_model, CLEAN)
    assert kinds(report) == {}
    (train, sums, sentences) = report.parts
    assert (train.role, sums.role, sentences.role) == ("train", "target", "retention")
    assert (train.num_rows, train.num_repeated, train.num_near, train.num_overlong) == (60, 0, 0, 0)
    targets = sum(len(row["answer"]) + 1 for row in CLEAN)  # a token a byte, and the end token
    assert train.num_target_tokens == targets
    rendered = [f"{row['question']}{row['answer']}" for row in CLEAN]
    around = len("<|user\n|>\n<|assistant\n|>") + 4 - len("<||><||>")  # three special tokens a turn, two headers
    assert train.lengths is not None
    assert train.lengths.most - train.lengths.least == max(map(len, rendered)) - min(map(len, rendered))
    assert train.num_tokens == sum(map(len, rendered)) + 60 * around
    assert sum(train.lengths.counts) == 60


def test_planted_rows_are_found_and_named(tiny_model: Path, tmp_path: Path) -> None:
    words = CLEAN[3]["question"].split()
    near = {"question": " ".join([*words[:-1], "otherwise"]), "answer": CLEAN[3]["answer"]}
    planted = [CLEAN[5], CLEAN[5], near, {"question": CLEAN[9]["question"], "answer": "something else entirely"}]
    report = report_of(tmp_path, tiny_model, [*CLEAN, *planted])
    assert kinds(report) == {"repeated": 2, "near duplicate": 1, "disagreeing": 1}
    train = tmp_path / "train.jsonl"
    pairs = {(hit.where, hit.other) for kind in ("repeated", "near duplicate") for hit in finding(report, kind).hits}
    assert pairs == {
        (f"{train} row 61", f"{train} row 6"),
        (f"{train} row 62", f"{train} row 6"),
        (f"{train} row 63", f"{train} row 4"),
    }
    (other,) = finding(report, "disagreeing").hits
    assert (other.where, other.other) == (f"{train} row 64", f"{train} row 10")


def duplicates_of(texts: list[str]) -> list[tuple[str, str, float]]:
    search = DuplicateSearch(most_shown=100)
    for number, text in enumerate(texts):
        search.add("train", Sample(str(number), "", text))
    return [(pair.row, pair.earlier, pair.similarity) for pair in search.found().near]


def test_the_similarity_is_the_exact_one() -> None:
    words = [f"w{number}" for number in range(20)]
    changed = [*words[:-1], "new"]
    ((row, earlier, similarity),) = duplicates_of([" ".join(words), " ".join(changed)])
    assert (row, earlier) == ("1", "0")
    assert similarity == pytest.approx((19 + 18) / (21 + 20), abs=1e-4)  # words and pairs, shared and in all
    four = [*words[:2], "a", *words[3:9], "b", *words[10:15], "c", *words[16:]]
    assert SIMILARITY > (17 + 13) / (23 + 25)
    assert duplicates_of([" ".join(words), " ".join(four)]) == []


def test_rows_that_share_a_template_are_no_duplicates() -> None:
    template = prose(1, 60)
    assert duplicates_of([f"{template} {prose(seed, 12)}" for seed in range(2, 50)]) == []
    twice = [f"{template} {prose(seed, 12)}" for seed in [*range(2, 50), 7]]
    assert [pair[:2] for pair in duplicates_of([*twice[:-1], f"{twice[-1]} indeed"])] == [("48", "5")]


SECRETS = {
    "API key": "AKIAIOSFODNN7EXAMPLE",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
    "password in a URL": "postgres://admin:hunter2@db.internal:5432",
    "e-mail address": "jane.doe@acme-corp.com",
    "card number": "4111 1111 1111 1111",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "phone number": "+49 171 1234567",
    "token (JWT)": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
    "password or token": "passwd = s3cr3t-Pa55word",
}


@pytest.mark.parametrize(("kind", "secret"), SECRETS.items())
def test_a_secret_is_found_and_masked(kind: str, secret: str) -> None:
    text = f"before {secret} after"
    assert find_private(text) == [(kind, secret)]
    masked = mask_private(text)
    assert masked.startswith("before ")
    assert masked.endswith(f"…[{kind}, {len(secret)} characters] after")
    assert not any(secret[start : start + 8] in masked for start in range(len(secret) - 8))


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # fails Luhn
        "DE89 3704 0044 0532 0130 01",  # fails modulo 97
        "write to someone@example.com",
        "the ratio is 1234567890123456 to 3.14159265358979",
        "on 2024-11-22 at 12:30:45, call it 3-4-5",
        "see https://example.com/a:b and git@host",
        "task-based sk-learn, AKIAshort, the password: please choose one",
        "0000 0000 0000 0000",
    ],
)
def test_what_looks_alike_is_not_taken_for_private(text: str) -> None:
    assert find_private(text) == []


def test_check_digits() -> None:
    assert passes_luhn("5555 5555 5555 4444")
    assert not passes_luhn("5555 5555 5555 4445")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB82 WEST 1234 5698 7654 33")


ODD = {
    "empty prompt": ("  ", "an answer"),
    "answer repeats prompt": ("Say it again", "say  it again"),
    "placeholder": ("how many are there", "NaN"),
    "mojibake": ("schÃ¶ne GrÃ¼ÃŸe aus KÃ¶ln", "thanks"),
    "control characters": ("a line", "with \x1b[31m colour"),
    "repetition": ("laugh", "ha" * 30),
    "special token": ("what does <|im_end|> mean", "the end"),
    "very short": ("1", "2"),
}


def test_every_kind_of_odd_row_is_planted() -> None:
    assert ODD.keys() == TEXTS.keys()


@pytest.mark.parametrize(("kind", "row"), ODD.items())
def test_an_odd_row_is_found(kind: str, row: tuple[str, str]) -> None:
    assert list(find_oddities(Sample("", *row), True, [END])) == [kind]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Schöne Grüße aus Köln – “ja”", "très bien, señor, 漢字 🙂"),
        ("is it so", "none"),
        ("table", "| --- | --- |\n| 1 | 2 |\n" + "=" * 40),
        ("hm", "no no no"),
    ],
)
def test_an_ordinary_row_is_not_odd(prompt: str, answer: str) -> None:
    assert list(find_oddities(Sample("", prompt, answer), True, [END])) == []


def labels_of(*answers: str) -> LabelCounts:
    labels = LabelCounts()
    for answer in answers:
        labels.add(answer)
    return labels


def test_labels_are_few_short_answers() -> None:
    found = labels_of(*["yes"] * 60, *[" no\n"] * 40).found()
    assert [(label.name, label.count) for label in found] == [("yes", 60), ("no", 40)]
    assert not is_unbalanced(found)
    assert is_unbalanced(labels_of(*["yes"] * 95, *["no"] * 5).found())
    assert is_unbalanced(labels_of(*["a"] * 50, *["b"] * 50, *["c"] * 4).found())
    assert labels_of(*map(str, range(30)), *["1"] * 100).found() == ()
    assert labels_of(*["yes"] * 10).found() == ()
    assert labels_of(*["a long answer that is no label at all, since it runs on and on and on"] * 50).found() == ()


def test_an_imbalance_and_an_untaught_label_are_told(tiny_model: Path, tmp_path: Path) -> None:
    rows = [row | {"answer": "yes" if number % 20 else "no"} for number, row in enumerate(CLEAN)]
    path = write_tiny_spec(tmp_path, tiny_model, training={"max_length": 512})
    write_rows(tmp_path / "train.jsonl", rows)
    items = [question(seed) | {"answer": "maybe" if seed % 3 else "no"} for seed in range(200, 260)]
    write_rows(tmp_path / "sums.jsonl", items)
    report = survey(load_spec(path), path, Workspace.at(tmp_path / "workspace"))
    assert kinds(report, "look") == {"label balance": 60, "labels not taught": 40}
    assert "'yes' stands for 95% of 60" in finding(report, "label balance").text
    assert finding(report, "labels not taught").text.endswith(": 'maybe'")


def test_languages_are_told_of_a_bounded_sample() -> None:
    sample = LanguageSample()
    for _ in range(SAMPLED):
        sample.add("Das Wetter ist heute sehr schön, und wir gehen in den Garten.")
        sample.add("The weather is very nice today, and we are going to the garden.")
        sample.add("7")
    found = sample.found(load_identifier())
    assert found.sampled == SAMPLED
    assert {language.name for language in found.found} == {"de", "en"}
    assert all(abs(count - SAMPLED / 3) < 60 for count in (found.unclear, *(one.count for one in found.found)))


@pytest.mark.parametrize(("overlong", "level"), [("refuse", "stop"), ("drop", "note"), ("truncate", "note")])
def test_overlong_rows_are_told_whatever_becomes_of_them(
    tiny_model: Path, tmp_path: Path, overlong: str, level: str
) -> None:
    report = report_of(tmp_path, tiny_model, [*CLEAN, {"question": "x", "answer": prose(1, 90)}], overlong=overlong)
    assert finding(report, "overlong").level == level
    assert [hit.where for hit in finding(report, "overlong").hits] == [f"{tmp_path / 'train.jsonl'} row 61"]
    assert report.parts[0].num_overlong == 1


def test_a_preview_shows_what_carries_loss(tiny_model: Path, tmp_path: Path) -> None:
    row = report_of(tmp_path, tiny_model, [{"question": "1+1", "answer": "2"}]).parts[0].preview[0]
    assert [(piece.text, piece.is_target) for piece in row.pieces] == [
        ("<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n", False),
        ("2<|im_end|>", True),
    ]


def test_nothing_private_and_nothing_hostile_reaches_page_or_json(tiny_model: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = [{"question": f"{hostile} {secret}", "answer": hostile} for secret in SECRETS.values()]
    report = report_of(tmp_path, tiny_model, [*CLEAN, *rows, *rows, {"question": hostile, "answer": hostile}])
    page, figures = render_page(report), report.model_dump_json()
    assert set(SECRETS) <= set(kinds(report))
    assert "&lt;script&gt;alert(1)" in page
    for text in ("<script", "<img", "http://", "https://", 'src="', "@import", "url(http"):
        assert text not in page
    for secret in SECRETS.values():
        assert secret not in page
        assert json.dumps(secret)[1:-1] not in figures


def test_the_command_writes_the_same_figures_on_screen_page_and_json(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_spec(tmp_path, tiny_model)
    rows = [*CLEAN[:20], CLEAN[0], {"question": "[bold]red[/bold] \x1b[2J who", "answer": "me"}]
    write_rows(tmp_path / "train.jsonl", rows)
    done = run_tenure(tmp_path, "data", "spec.yaml", "--json", "figures.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "rows that repeat an earlier one word for word (1 row)" in done.stdout
    assert "[bold]red[/bold] \ufffd[2J who → me" in done.stdout
    assert "\x1b" not in done.stdout
    figures = DataReport.model_validate_json((tmp_path / "figures.json").read_text())
    assert kinds(figures)["repeated"] == 1
    page = (tmp_path / "workspace" / "data" / "tiny.html").read_text()
    assert "rows that repeat an earlier one word for word" in page
    assert not (tmp_path / "workspace" / "ray.log").exists()


def test_a_row_that_cannot_be_read_ends_the_command_as_it_ends_a_run(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_spec(tmp_path, tiny_model)
    write_rows(tmp_path / "train.jsonl", [{"question": "1+1"}])
    done = run_tenure(tmp_path, "data", "spec.yaml")
    assert done.returncode == 2
    assert f"{tmp_path / 'train.jsonl'} row 1: there is no column 'answer'" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_that_are_dropped_are_told(tiny_model: Path, tmp_path: Path) -> None:
    rows = [question(0), {"question": "1+1"}, question(1), {"question": "1+1", "answer": None}]
    train = [{"path": "train.jsonl", "prompt": "question", "completion": "answer", "faulty": "drop"}]
    found = finding(report_of(tmp_path, tiny_model, rows, train=train), "dropped")
    assert (found.level, found.count) == ("look", 2)
    path = tmp_path / "train.jsonl"
    assert [hit.where for hit in found.hits] == [f"{path} row 2", f"{path} row 4"]
    assert found.hits[0].excerpt == "there is no column 'answer'"


def test_the_tiny_template_is_the_one_that_lengths_were_counted_for(tiny_model: Path) -> None:
    assert load_tokenizer(tiny_model).chat_template == CHAT_TEMPLATE


def test_only_learned_turns_are_answers() -> None:
    def say(role: str, content: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **more}

    call = [{"type": "function", "function": {"name": "look", "arguments": "{}"}}]
    turns = (
        say("system", "s"),
        say("user", "u1"),
        say("assistant", "a1", weight=0),
        say("user", "u2"),
        say("assistant", "", tool_calls=call),
        say("tool", "t"),
        say("assistant", "a2"),
    )
    sample = sample_of(Conversation(turns, "here"))
    assert (sample.system, sample.prompt) == ("s", "u1\na1\nu2\nt")
    assert sample.answer == f"{json.dumps(call)}\na2"
    assert sample_of(Conversation(turns, "here", learn="last")).answer == "a2"


def test_every_row_that_cannot_be_encoded_is_told(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    refusal = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no bad words') }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + CHAT_TEMPLATE)
    with pytest.raises(TenureError) as caught:
        report_of(tmp_path, model, [{"question": text, "answer": "2"} for text in ("a bad one", "a good one", "bad")])
    assert [problem.where for problem in caught.value.problems] == [
        f"{tmp_path / 'train.jsonl'} row 1",
        f"{tmp_path / 'train.jsonl'} row 3",
    ]
