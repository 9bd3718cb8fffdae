"""A whole run by the command line that asks the base and a teacher before it trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

from commands import Command
from jobs import STEPS, rows_of, write_spec
from tiny import make_tiny_model

from training.evaluation.scorecard import read_scorecard
from training.workspace import Workspace


def test_frozen_models_are_asked_once_and_what_they_mask_is_told(tiny_model: Path, tmp_path: Path) -> None:
    teacher = make_tiny_model(tmp_path / "teacher", seed=3)
    spec = write_spec(
        tmp_path / "spec",
        tiny_model,
        tuning={"type": "full"},
        training=STEPS | {"max_steps": 3},
        scaling={"workers": 2, "zero_stage": 3},
        protections=[{"type": "kl", "top_k": 8}, {"type": "stm", "threshold": 2000.0}],
        amend={
            "objective": {"type": "distill", "teacher": str(teacher), "top_k": 8},
            "contract": {"min_gain": 0.0, "max_loss": 100.0},
        },
    )
    workspace = Workspace.at(tmp_path / "workspace")
    command = Command.start("train", spec, workspace=workspace.root)
    assert command.finish() == 0, command.err
    run = workspace.run("tiny-1")
    told = re.search(r"stm masks (\d+) of (\d+) target tokens", command.out)
    assert told
    assert 0 < int(told[1]) < int(told[2])
    assert len(list((workspace.cache / "signals").iterdir())) == 2
    steps = [row for row in rows_of(run) if row["kind"] == "step"]
    assert [set(row) >= {"kl", "divergence", "cross_entropy"} for row in steps] == [True] * 3
    assert read_scorecard(run.scorecard).contract.verdict == "kept"
    assert "KL from the base" in run.report.read_text(encoding="utf-8")
    assert json.loads(run.lineage.read_text())["teacher"]["path"] == str(teacher)
