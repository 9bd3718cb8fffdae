"""One Ray and one tiny model for the whole session."""

from __future__ import annotations

import functools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from commands import Command
from jobs import (
    LONG,
    PROTECTIONS,
    STEPS,
    TUNINGS,
    TWO_WORKERS,
    JobValues,
    single_process,
    start_job,
    train_in_group,
    write_spec,
)
from tiny import make_tiny_model

from training.quiet import QUIET, be_quiet
from training.workspace import RunFolder, Workspace

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
be_quiet()


# Fixtures of the whole session that take minutes: all files that want one are tested by one process.
COSTLY = re.compile(r"\b(two_workers|kept_run)\b")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes test (`pytest -n 2`), a file stays with one of them, as its own fixtures do."""
    from xdist.scheduler import LoadFileScheduling

    class ByFixture(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(super()._split_scope(nodeid))

    return ByFixture(config, log)


@functools.cache
def group_of(file: str) -> str:
    """The costly fixture that a test file names, or else the file itself."""
    found = COSTLY.search((ROOT / file).read_text(encoding="utf-8"))
    return found[0] if found else file


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test does to the environment variables ends with it; scoring, for one, forgets a process group's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of four (shared) CPUs, whose workers import the package and the tests' helpers."""
    import ray

    path = ":".join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {**QUIET, "PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random chat model."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    with single_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="session")
def two_workers(ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobValues]:
    """The same data trained by two workers at every ZeRO stage (in bf16 from 1 on): "TUNING PRECISION STAGE"."""
    folder = tmp_path_factory.mktemp("two")
    jobs = {
        f"{name} {precision} {stage}": start_job(
            folder / f"{name}-{precision}-{stage}",
            tiny_model,
            workers=2,
            zero=stage,
            tuning=TUNINGS[name],
            training=STEPS | {"precision": precision},
            protections=PROTECTIONS.get(name),
        )
        for precision, names, first in (("fp32", ("lora", "full", "l2sp"), 0), ("bf16", ("lora", "full"), 1))
        for name in names
        for stage in range(first, 4)
    }
    train_in_group(list(jobs.values()), 2, folder / "ray")
    return jobs


@dataclass(frozen=True)
class WholeRun:
    """A run of the command line that has ended."""

    command: Command
    status: int
    workspace: Workspace
    run: RunFolder
    spec: Path


@pytest.fixture(scope="session")
def kept_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """`tenure train` on two workers, not disturbed; its contract is kept."""
    folder = tmp_path_factory.mktemp("kept")
    promise = {"contract": {"min_gain": 0.0, "max_loss": 100.0}}
    spec = write_spec(folder, tiny_model, training=LONG, scaling=TWO_WORKERS, amend=promise)
    workspace = Workspace.at(folder / "workspace")
    command = Command.start("train", spec, workspace=workspace.root)
    return WholeRun(command, command.finish(), workspace, workspace.run("tiny-1"), spec)


@pytest.fixture(scope="session")
def broken_run(kept_run: WholeRun, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The same training in the same workspace, with a worker killed and restarted by Ray, and a broken contract."""
    folder, workspace = tmp_path_factory.mktemp("broken"), kept_run.workspace
    promise = {"name": "broken", "contract": {"min_gain": 1.0, "max_loss": 100.0}}
    training = LONG | {"checkpoint_every_steps": 3}
    spec = write_spec(folder, tiny_model, training=training, scaling=TWO_WORKERS | {"max_failures": 1}, amend=promise)
    command = Command.start("train", spec, workspace=workspace.root)
    run = RunFolder(workspace.runs / "broken-1")
    command.kill_a_worker_at(random.Random(2).randrange(5, 30), run)
    return WholeRun(command, command.finish(), workspace, run, spec)
