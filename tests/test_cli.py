"""The command line: what help loads, what check shows, and its exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from one_command import ROOT, run_tenure
from tiny_spec import write_tiny_spec

from cluster.checking import preview_text
from cluster.cli import cli
from cluster.session import check_address
from training.data.encoding import encode, load_tokenizer
from training.data.rows import Conversation
from training.errors import TenureError
from training.yamlfile import read_yaml

HEAVY = ("torch", "ray", "mlflow", "transformers", "deepspeed", "peft", "vllm", "openai", "matplotlib", "datasets")


def test_what_hands_a_run_to_its_workers_loads_none_of_their_libraries() -> None:
    """Nor does Ray Train's controller, which imports the module of the function that workers run."""
    code = f"""
import sys
from cluster import pipeline
from training.fit import train_worker
print(train_worker.__module__, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "training.fit []"


def test_help_loads_nothing_heavy() -> None:
    """Of `tenure --help` and of every command's, one after the other in one process."""
    asked = [["--help"], *([name, "--help"] for name in cli.commands)]
    code = f"""
import sys
from cluster import cli
for arguments in {asked!r}:
    sys.argv = ["tenure", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        print("status", *arguments, done.code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    told = done.stdout.splitlines()
    assert [line for line in told if line.startswith("status")] == [f"status {' '.join(one)} 0 []" for one in asked]
    assert sum(line.startswith("Usage: tenure") for line in told) == len(asked)


def test_every_command_is_told_in_one_line() -> None:
    assert set(cli.commands) >= {
        "train",
        "check",
        "resume",
        "runs",
        "report",
        "compare",
        "serve",
        "ask",
        "fetch",
        "schema",
    }
    for command in cli.commands.values():
        assert command.get_short_help_str(200).endswith(".")


def test_the_schema_is_one_that_the_tiny_spec_keeps(tmp_path: Path) -> None:
    done = run_tenure(tmp_path, "schema")
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    data, _ = read_yaml(write_tiny_spec(tmp_path, tmp_path))
    jsonschema.validate(data, schema)


def test_the_schema_of_sweeps_is_one_that_the_example_keeps(tmp_path: Path) -> None:
    schema = json.loads(run_tenure(tmp_path, "schema", "sweep").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    data, _ = read_yaml(ROOT / "examples" / "sweep" / "quick.yaml")
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "preset": "slow"}, schema)


def test_check_shows_the_plan_and_the_tokens_that_carry_loss(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_spec(tmp_path, tiny_model)
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "valid  spec.yaml" in done.stdout
    assert "8 = 1 workers x 1 accumulated x 8" in done.stdout
    assert "6 (6 an epoch)" in done.stdout
    assert "what is 0+1<|im_end|>\n<|im_start|>assistant\n[1<|im_end|>]" in done.stdout
    assert not (tmp_path / "workspace" / "runs").exists()


@pytest.mark.parametrize(
    ("objective", "source", "shown"),
    [
        ("lm", {"text": "answer"}, "0[<|im_end|>]"),
        (
            "dpo",
            {"prompt": "question", "chosen": "answer", "rejected": "{{ answer }}0"},
            "<|im_start|>assistant\n[0<|im_end|>]\nrejected: [00<|im_end|>]",
        ),
    ],
)
def test_check_previews_text_and_pairs(
    tiny_model: Path, tmp_path: Path, objective: str, source: dict[str, str], shown: str
) -> None:
    path = write_tiny_spec(tmp_path, tiny_model)
    spec = yaml.safe_load(path.read_text())
    spec |= {
        "objective": {"type": objective},
        "data": {"train": [{"path": "train.jsonl", **source}], "max_overlap": 1.0},
    }
    path.write_text(yaml.safe_dump(spec))
    done = run_tenure(tmp_path, "check", "spec.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_a_preview_puts_what_carries_loss_in_brackets(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    turns = ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"})
    text = preview_text(encode(tokenizer, Conversation(turns, ""), chat=False), tokenizer)
    assert text.plain == "1+1[ 2<|im_end|>]"
    assert {str(span.style) for span in text.spans} == {"dim", "bold green"}


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["serve", "x", "--port", "0"], ["serve", "x", "--port", "99999"], ["report"]]
)
def test_a_wrong_command_line_is_refused_with_its_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = run_tenure(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "workspace").exists()


def test_a_workspace_without_runs_says_how_to_start_one(tmp_path: Path) -> None:
    done = run_tenure(tmp_path, "runs")
    assert (done.returncode, done.stdout) == (0, "no runs yet; start one with: tenure train SPEC\n")


@pytest.mark.parametrize("address", ["nowhere", ":6379", "host:", "host:abc", "host:0", "host:65536", "ray://host"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(TenureError, match="is no address"):
        check_address(address)
