"""What finalists are run again as, by the records of their trials."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sweep_results import made_up_sweep, point
from tiny_spec import write_tiny_spec

from sweeps.driver import interrupted
from sweeps.finals import seed_jobs
from sweeps.folder import Record, SweepFolder
from sweeps.loading import load_sweep
from sweeps.spec import SweepSpec


@pytest.fixture
def ended(tmp_path: Path) -> tuple[SweepSpec, SweepFolder]:
    """A sweep over the seeds 0 and 1, two of whose trials have ended."""
    write_tiny_spec(tmp_path, Path("/models/tiny"))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "spec.yaml", "preset": "quick", "seeds": [0, 1]}), encoding="utf-8")
    folder = SweepFolder(tmp_path / "swept")
    folder.trials.mkdir(parents=True)
    for trial in made_up_sweep(2).trials[:2]:
        folder.write(Record(trial=trial))
    return load_sweep(path)[0], folder


def test_a_trial_with_two_finalists_runs_once_under_each_seed(ended: tuple[SweepSpec, SweepFolder]) -> None:
    """One stands at its end and one half way: both are scored, and no two processes work in one folder."""
    sweep, folder = ended
    nominees = [point(0.5, 0.9, "full-0", alpha=0.5), point(0.4, 0.9, "full-l2sp-0"), point(0.6, 0.5, "full-0")]
    jobs = seed_jobs(sweep, folder, nominees)
    assert [(job.name, job.seed, job.rerun_of, job.alphas) for job in jobs] == [
        ("full-0-seed-1", 1, "full-0", [0.5]),
        ("full-l2sp-0-seed-1", 1, "full-l2sp-0", []),
    ]


def test_an_interrupted_seed_of_a_finalist_is_no_trial_of_the_search(ended: tuple[SweepSpec, SweepFolder]) -> None:
    """As one it would be halved, or stopped early, and the finalist would lose it."""
    _, folder = ended
    begun = {"strategy": "full", "values": {}, "seed": 0, "rerun_of": None, "generation": None}
    for name, given in (("full-0", {}), ("torn", {}), ("full-0-seed-1", {"seed": 1, "rerun_of": "full-0"})):
        folder.start(name, {"name": name, **begun, **given})
    assert [note["name"] for note in interrupted(folder)] == ["torn"]
