"""`tenure eval`: what artifacts gained and forgot, by the suites and the contract of a spec, without training.

Each scorecard lies in WORKSPACE/evals/ID beside the spec, what was scored and the logs. Under its id an evaluation is
gone on with: whatever was scored before comes from the cache. Several artifacts are scored side by side.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from training.errors import fail, raise_all
from training.workspace import EVALUATIONS, RunFolder, Workspace, read_json, write_json

if TYPE_CHECKING:
    from training.evaluation.scorecard import Scorecard
    from training.spec import RunSpec

SCORED_FILE = "scored.json"
_EXIT = {"broken": 3, "undecided": 4}


@click.command("eval")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--of",
    "subjects",
    metavar="RUN|FOLDER",
    required=True,
    multiple=True,
    help="A run, or the folder of an artifact. Again for more, scored side by side.",
)
@click.option("--id", "eval_id", help="The evaluation's id. Default: the name in SPEC and a number.")
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.pass_context
def eval_command(
    context: click.Context, spec: Path, subjects: tuple[str, ...], eval_id: str | None, address: str | None
) -> None:
    """Score artifacts against their base by the suites and the contract of SPEC.

    Exit status as for train, that of the worst verdict.
    """
    from cluster.screen import make_screen
    from training.reporting.report import print_scorecard

    found = evaluate(spec, subjects, context.obj, address, eval_id)
    console = make_screen()
    for folder, scorecard in found:
        print_scorecard(console, scorecard)
        console.print(f"scorecard {folder.scorecard}", soft_wrap=True)
    verdicts = {scorecard.contract.verdict for _, scorecard in found}
    for verdict, status in _EXIT.items():
        if verdict in verdicts:
            sys.exit(status)


def evaluate(
    path: Path,
    subjects: Sequence[str],
    workspace: Workspace,
    address: str | None = None,
    eval_id: str | None = None,
) -> list[tuple[RunFolder, Scorecard]]:
    """Score artifacts of runs, or in folders, by a spec; where each evaluation lies, and its scorecard.

    Raises:
        TenureError: the spec is not valid, there is no such artifact, it does not fit the spec's model, adapters and
            whole models stand side by side, or the id is that of another evaluation.
    """
    from cluster import pipeline

    if eval_id and len(subjects) > 1:
        raise fail("one id cannot be that of several evaluations", "--id", "leave it out, or name one --of")
    artifacts = [find_artifact(subject, workspace) for subject in subjects]
    spec = _spec_of_all(pipeline.read_spec(path, workspace), artifacts)
    folders = [_begun(workspace, eval_id, path, spec, artifact) for artifact in artifacts]
    cards = _scored(folders, artifacts, spec, workspace, address)
    for folder, card in zip(folders, cards, strict=True):
        write_json(folder.scorecard, card.model_dump(mode="json"))
    return list(zip(folders, cards, strict=True))


def _spec_of_all(spec: RunSpec, artifacts: Sequence[Path]) -> RunSpec:
    specs = [scored_spec(spec, artifact) for artifact in artifacts]
    if len({one.tuning.type for one in specs}) > 1:
        raise fail("adapters and whole models are not scored in one go", "--of", "one command for each kind")
    return specs[0]


def _begun(workspace: Workspace, eval_id: str | None, path: Path, spec: RunSpec, artifact: Path) -> RunFolder:
    """The folder of an evaluation, with its spec and what it scores."""
    from training import stages
    from training.models import hash_folder

    scored = {"artifact": str(artifact), "artifact_hash": hash_folder(artifact), "spec_hash": stages.hash_spec(spec)}
    folder = claim(workspace, eval_id, spec.name, scored)
    shutil.copyfile(path, folder.spec_yaml)
    write_json(folder.spec, spec.model_dump(mode="json"))
    return folder


def _scored(
    folders: Sequence[RunFolder], artifacts: Sequence[Path], spec: RunSpec, workspace: Workspace, address: str | None
) -> list[Scorecard]:
    """The artifacts' scorecards, in order; the logs lie in the first one's folder."""
    from cluster import pipeline
    from cluster.screen import make_screen
    from training import stages
    from training.faults import output_to
    from training.processes import claim_of
    from training.waiting import waits_told

    one_worker = spec.scaling.model_copy(update={"workers": 1, "min_workers": None})
    names = ["tuned"] if len(folders) == 1 else [f"tuned-{folder.id}" for folder in folders]
    tell = pipeline.teller(make_screen())
    with ExitStack() as stack:
        stack.enter_context(pipeline.session(workspace, address, one_worker))
        for folder in folders:
            stack.enter_context(folder.held())
        stack.enter_context(output_to(folders[0].logs / "driver.log"))
        stack.enter_context(waits_told(claim_of(one_worker), 1, tell))
        cards = stages.score_artifacts(folders[0], spec, workspace, dict(zip(names, artifacts, strict=True)))
    return [cards[name].model_copy(update={"run": folder.id}) for name, folder in zip(names, folders, strict=True)]


def find_artifact(subject: str, workspace: Workspace) -> Path:
    """The folder of an artifact: one that is given, or that of a run.

    Raises:
        TenureError: there is none.
    """
    given = Path(subject).expanduser()
    if given.is_dir():
        return given.absolute()
    if "/" in subject:
        raise fail(f"there is no folder {given}", "--of", "give a run's id, or the folder of an artifact")
    run = workspace.run(subject)
    if not run.artifact.is_dir():
        raise fail(f"run '{run.id}' has no artifact", str(run.path), f"go on with it: tenure resume {run.id}")
    return run.artifact


def scored_spec(spec: RunSpec, artifact: Path) -> RunSpec:
    """The spec, with a tuning of the artifact's own kind: an adapter's weights are read over those of the base.

    Raises:
        TenureError: the artifact is not of the spec's model, is not whole, or holds pickled weights.
    """
    from serving.artifacts import artifact_problems
    from training.strategy import Full, Lora, is_adapter

    raise_all(artifact_problems(artifact, Path(spec.model)))
    of_adapter = (artifact / "adapter_config.json").is_file()
    if of_adapter == is_adapter(spec.tuning):
        return spec
    return spec.model_copy(update={"tuning": Lora() if of_adapter else Full()})


def claim(workspace: Workspace, eval_id: str | None, name: str, scored: dict[str, str]) -> RunFolder:
    """The folder of an evaluation: a fresh one, or under a given id the one that scores the same.

    Raises:
        TenureError: under the id lies the evaluation of something else.
    """
    root = workspace.root / EVALUATIONS
    folder = RunFolder(root / eval_id) if eval_id else _numbered(root, name)
    known = folder.path / SCORED_FILE
    if known.is_file() and read_json(known) != scored:
        what = f"the id '{folder.id}' is that of another evaluation"
        raise fail(what, str(folder.path), "give another --id")
    write_json(known, scored)
    return folder


def _numbered(root: Path, name: str) -> RunFolder:
    number = 1
    while True:
        path = root / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return RunFolder(path)
