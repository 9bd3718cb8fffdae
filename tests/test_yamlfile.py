"""YAML files: what they say, at which line, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.errors import TenureError
from training.yamlfile import read_yaml


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "spec.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def refused(folder: Path, text: str | bytes) -> str:
    """The one fault of a file."""
    with pytest.raises(TenureError) as caught:
        read_yaml(write(folder, text))
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1.5E+3", 1500.0), ("-.5e1", -5.0), ("0.1", 0.1), ("1e", "1e"), ("'2e-4'", "2e-4")],
)
def test_numbers_follow_yaml_1_2(tmp_path: Path, text: str, value: float | str) -> None:
    data, _ = read_yaml(write(tmp_path, f"rate: {text}\n"))
    assert data == {"rate": value}
    assert type(data["rate"]) is type(value)


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    text = "# a comment\nname: x\ndata:\n  train:\n    - path: a\n      prompt: b\n\n    - path: c\nlist: [1,\n  2]\n"
    _, lines = read_yaml(write(tmp_path, text))
    assert lines[("name",)] == 2
    assert lines[("data",)] == 3
    assert lines[("data", "train")] == 4
    assert lines[("data", "train", 0, "path")] == 5
    assert lines[("data", "train", 0, "prompt")] == 6
    assert lines[("data", "train", 1)] == 8
    assert lines[("data", "train", 1, "path")] == 8
    assert lines[("list", 1)] == 10


def test_every_key_given_twice_is_told_at_its_second_line(tmp_path: Path) -> None:
    with pytest.raises(TenureError) as caught:
        read_yaml(write(tmp_path, "a: 1\nb: {c: 1, c: 2}\na: 3\n"))
    path = tmp_path / "spec.yaml"
    told = [(problem.where, problem.what) for problem in caught.value.problems]
    assert told == [(f"{path}:2", "the key 'c' is given twice"), (f"{path}:3", "the key 'a' is given twice")]


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = "one: &one {a: 1, b: 2}\ntwo: *one\nthree:\n  <<: *one\n  b: 3\n"
    data, lines = read_yaml(write(tmp_path, text))
    assert data == {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 2}, "three": {"a": 1, "b": 3}}
    assert lines[("three", "b")] == 5


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not valid YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: !!python/object:os.system {}\n", 2, "not valid YAML"),
        ("a: 1\nb: *nowhere\n", 2, "not valid YAML"),
        ("a: 1\nyes: 2\n", 2, "a key that is not text"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "a key that is not text"),
        ("a: &a [*a]\n", 1, "nested too deeply"),
        ("a: 1\nb: " + "{c: " * 14 + "1" + "}" * 14 + "\n", 2, "nested too deeply"),
    ],
)
def test_a_fault_is_told_at_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    assert refused(tmp_path, text).startswith(f"{tmp_path / 'spec.yaml'}:{line}: {what}")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"# only a comment\n", "a spec is a mapping"),
        (b"- a\n- b\n", "a spec is a mapping"),
        (b"just text", "a spec is a mapping"),
        (b"name: caf\xe9\n", "not UTF-8 text (byte 9)"),
        (b"a: \x00\n", "not valid YAML"),
        (b"a: 2026-99-99\n", "not valid YAML"),
        (b"a: " + b"9" * 5000 + b"\n", "not valid YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_whole(tmp_path: Path, text: bytes, what: str) -> None:
    assert refused(tmp_path, text).startswith(f"{tmp_path / 'spec.yaml'}: {what}")


def test_aliases_that_multiply_are_refused_before_they_are_built(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10)]
    text = "\n".join(["l0: &l0 [0, 0, 0, 0, 0, 0, 0, 0, 0]", *levels])
    assert "more than 10,000 values" in refused(tmp_path, text)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(TenureError, match="there is no such file"):
            read_yaml(path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    data, lines = read_yaml(write(tmp_path, b"\xef\xbb\xbfa: 1\n"))
    assert data == {"a": 1}
    assert lines[("a",)] == 1
