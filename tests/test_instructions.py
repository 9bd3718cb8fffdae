"""Prompt templates: drawn for each row under a seed, by name or in the spec, and listed in a page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from tiny_spec import write_rows, write_tiny_spec

from cluster.cli import cli
from training.data import templating
from training.data.instructions import LIBRARY, Kind, page
from training.data.rows import Conversation, examples
from training.errors import TenureError
from training.section import Source
from training.specfile import load_spec

ROWS = [{"article": f"text {n}", "summary": f"s{n}"} for n in range(200)]
TEMPLATES = ("Sum up: {{ article }}", "{{ article }} TL;DR", "Short: {{ article }}")


def prompts(path: Path, seed: int = 0, **fields: Any) -> list[str]:
    source = Source.model_validate({"path": path, "completion": "summary", **fields})
    found = [example for example in examples(source, seed=seed) if isinstance(example, Conversation)]
    return [example.messages[-2]["content"] for example in found]


def test_one_of_the_templates_is_drawn_for_every_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    drawn = prompts(path, templates=TEMPLATES)
    kinds = Counter(prompt.replace(row["article"], "_") for prompt, row in zip(drawn, ROWS, strict=True))
    assert set(kinds) == {"Sum up: _", "_ TL;DR", "Short: _"}
    assert min(kinds.values()) > 40


def test_the_draw_depends_on_the_row_and_the_seed_alone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    drawn = prompts(path, templates=TEMPLATES)
    assert prompts(write_rows(tmp_path / "turned.jsonl", ROWS[::-1]), templates=TEMPLATES) == drawn[::-1]
    assert prompts(path, templates=TEMPLATES) == drawn != prompts(path, seed=1, templates=TEMPLATES)


def test_the_source_s_prompt_stands_in_a_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    assert prompts(path, prompt="{{ article|upper }}", templates=["<{{ prompt }}>"]) == ["<TEXT 0>"]
    library = {"library": "translate", "values": {"language": "French ({{ summary }})"}}
    (prompt,) = prompts(path, prompt="article", templates=library)
    assert "text 0" in prompt
    assert "French (s0)" in prompt


@pytest.mark.parametrize("kind", LIBRARY)
def test_every_template_of_the_library_can_be_filled_and_holds_the_prompt(kind: Kind) -> None:
    row = {"prompt": "PROMPT", "context": "C", "labels": "L", "wanted": "W", "manner": "M", "language": "X"}
    for template in LIBRARY[kind]:
        assert "PROMPT" in templating.fill_text(template, row)
    assert len(set(LIBRARY[kind])) == len(LIBRARY[kind])


def test_a_value_that_is_missing_is_a_fault_of_the_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(TenureError, match=r"row 1: .*'language' is undefined"):
        prompts(path, prompt="article", templates={"library": "translate"})


def test_templates_go_with_columns_that_are_recognised(tmp_path: Path) -> None:
    path = write_tiny_spec(tmp_path, tmp_path)
    columns = "    prompt: question\n    completion: answer\nsuites"
    path.write_text(path.read_text().replace(columns, "    templates: {library: answer}\nsuites"))
    assert load_spec(path).data.train[0].prompt == "question"
    write_rows(tmp_path / "train.jsonl", [{"text": "x"}])
    with pytest.raises(TenureError, match="rows of the form text have no prompt to fill"):
        load_spec(path)
    path.write_text(path.read_text().replace("library: answer", "library: sumarise"))
    with pytest.raises(TenureError, match=r"templates\.library: 'sumarise' is no kind of template"):
        load_spec(path)


def test_a_template_that_loops_endlessly_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templating, "MAX_SECONDS", 0.2)
    path = write_rows(tmp_path / "rows.jsonl", [{"article": "x" * 1000, "summary": "s"}] * 3)
    loops = "{% for a in article %}" * 4 + "{% endfor %}" * 4
    for faulty in ("refuse", "drop"):
        with pytest.raises(TenureError, match=r"it has not come to an end in 0\.2 seconds") as caught:
            prompts(path, templates=["{{ article }}" + loops], faulty=faulty)
        assert [problem.where for problem in caught.value.problems] == [f"{path} row 1"]


def test_the_page_is_what_the_command_prints() -> None:
    text = (Path(__file__).parents[1] / "docs" / "templates.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m training.data.instructions > docs/templates.md"
    assert CliRunner().invoke(cli, ["templates"]).output == text
    assert set(get_args(Kind)) == set(LIBRARY)


def test_faulty_rows_are_dropped_where_the_source_says_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS[:2], {"article": "x"}, {"article": "y", "summary": ""}])
    assert prompts(path, prompt="article", faulty="drop") == ["text 0", "text 1"]
    with pytest.raises(TenureError) as caught:
        prompts(path, prompt="article")
    assert len(caught.value.problems) == 2
