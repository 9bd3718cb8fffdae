"""Task sequences: all tasks planned before the first, then one run after the other, each from the last artifact."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from cluster import pipeline
from cluster.checking import plan_table, tell_lineage
from cluster.screen import facts, make_screen
from training import stages
from training.errors import Problem, TenureError, fail
from training.evaluation.scorecard import Scorecard, State
from training.faults import output_to
from training.lineage import find_base, inherit_suites
from training.plan import GIB, Plan
from training.protection.importance import IMPORTANCE_FOLDER
from training.protection.passes import importance_of_run
from training.sequences.folder import SequenceFolder, claim_sequence, find_sequence, new_sequence
from training.sequences.report import print_sequence, write_sequence_report
from training.sequences.result import SequenceResult, make_result, read_result, write_result
from training.sequences.spec import SequenceSpec
from training.sequences.steps import Before, load_sequence, next_model, step_spec
from training.spec import RunSpec
from training.strategy import Ewc, Replay, Si
from training.workspace import RunFolder, Workspace, write_json


def read_sequence(path: Path, workspace: Workspace) -> SequenceSpec:
    """The sequence of a file with its model found and its data files seen."""
    return load_sequence(path, find_model=lambda name: find_base(name, workspace))


def plan_sequence(sequence: SequenceSpec, workspace: Workspace) -> list[tuple[RunSpec, Plan]]:
    """Check, encode and plan every task as if it went on from the base; nothing of a run exists yet.

    Raises:
        TenureError: with the faults of every task at once.
    """
    planned: list[tuple[RunSpec, Plan]] = []
    problems: list[Problem] = []
    for index in range(len(sequence.tasks)):
        spec = inherit_suites(step_spec(sequence, index, Before(sequence.model)), workspace)
        try:
            planned.append((spec, stages.plan_run(spec, workspace)[0]))
        except TenureError as error:
            problems += error.problems
    if problems:
        raise TenureError(dict.fromkeys(problems))
    stages.check_disk(workspace, sum(plan.disk_bytes for _, plan in planned), "the sequence")
    return planned


def show_check(path: Path, workspace: Workspace) -> None:
    """Validate a sequence and all its data, and print every task's plan and what they come to."""
    sequence = read_sequence(path, workspace)
    planned = plan_sequence(sequence, workspace)
    console = Console(highlight=False)
    console.print(f"[bold green]valid[/]  {path}: {len(planned)} tasks")
    for task, (spec, plan) in zip(sequence.tasks, planned, strict=True):
        console.print(f"\n[bold]{task.name}[/]  run {spec.name}-N; retains {_names(spec)}")
        console.print(plan_table(plan, spec.protection(Replay)))
    tell_lineage(console, planned[0][0], workspace)
    console.print()
    console.print(_totals([plan for _, plan in planned]))


def _names(spec: RunSpec) -> str:
    return ", ".join(suite.name for suite in spec.suites.retention) or "nothing"


def _totals(plans: list[Plan]) -> Table:
    tokens = sum(round(plan.num_tokens_per_epoch * plan.steps / plan.steps_per_epoch) for plan in plans)
    return facts(
        {
            "all tasks": f"{sum(plan.steps for plan in plans):,} steps, about {tokens:,} tokens",
            "disk": f"about {sum(plan.disk_bytes for plan in plans) / GIB:.2f} GiB",
        }
    )


def start_sequence(
    path: Path, sequence: SequenceSpec, workspace: Workspace, sequence_id: str | None = None
) -> SequenceFolder:
    """A new folder with the sequence as it was given and as it was read."""
    folder = claim_sequence(workspace, sequence_id) if sequence_id else new_sequence(workspace, sequence.name)
    shutil.copyfile(path, folder.spec_yaml)
    write_json(folder.spec, sequence.model_dump(mode="json", exclude_unset=True))
    return folder


def train_sequence(path: Path, workspace: Workspace, address: str | None, sequence_id: str | None = None) -> State:
    """Plan all tasks of a file, learn them in order, and tell what came of it; the worst of the contracts' verdicts.

    Args:
        sequence_id: its folder's name; by default the sequence's with a number.
    """
    sequence = read_sequence(path, workspace)
    planned = plan_sequence(sequence, workspace)
    console = make_screen()
    tell_lineage(console, planned[0][0], workspace)
    console.print(_totals([plan for _, plan in planned]))
    with pipeline.session(workspace, address, sequence.scaling):
        return _finish(start_sequence(path, sequence, workspace, sequence_id), workspace, console)


def resume_sequence(name: str, workspace: Workspace, address: str | None, *, rescaled: bool) -> State:
    """Go on with an interrupted sequence at the task and step where it stopped; the worst of the contracts' verdicts.

    Raises:
        TenureError: another scale is asked for, which only a run can take.
    """
    folder = find_sequence(workspace, name)
    runs = list(folder.runs().values())
    if rescaled:
        what = f"'{name}' is a sequence, and another scale is for one run"
        run = runs[-1] if runs else "RUN"
        raise fail(what, "--workers, --zero-stage", f"tenure resume {run} with it, then tenure resume {name}")
    with pipeline.session(workspace, address, folder.read_spec().scaling):
        return _finish(folder, workspace, make_screen())


def report_sequence(name: str, workspace: Workspace, *, as_json: bool) -> None:
    """Print what a sequence came to so far, as a table or as JSON, and write its page anew.

    Raises:
        TenureError: no task is learned yet.
    """
    folder = find_sequence(workspace, name)
    result = read_result(folder.result)
    if result is None:
        raise fail(f"sequence '{name}' has learned no task yet", str(folder.path), f"tenure resume {name}")
    if as_json:
        print(folder.result.read_text(encoding="utf-8"), end="")
        return
    write_sequence_report(folder.report, result)
    console = make_screen()
    print_sequence(console, result)
    console.print(f"report   {folder.report}")


def _finish(folder: SequenceFolder, workspace: Workspace, console: Console) -> State:
    """Learn what is left, and tell what came of it."""
    again = f"go on with: tenure resume {folder.id}"
    try:
        result = run_sequence(folder, workspace, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; {again}")
        sys.exit(130)
    except TenureError:
        console.print(f"the sequence stopped; {again}")
        raise
    console.print()
    print_sequence(console, result)
    last = workspace.run(list(folder.runs().values())[-1])
    console.print(f"report   {folder.report}\nresult   {folder.result}\nartifact {last.artifact}")
    for line in open_contracts(result):
        console.print(line)
    return worst_verdict(result)


def worst_verdict(result: SequenceResult) -> State:
    """Broken where one task's contract is, else undecided where one is, else kept."""
    states = {row.contract for row in result.rows}
    return "broken" if "broken" in states else "undecided" if "undecided" in states else "kept"


def open_contracts(result: SequenceResult) -> list[str]:
    """A sentence for every task whose contract is not kept."""
    told = {"broken": "is broken", "undecided": "is undecided: too few items to tell"}
    rows = [row for row in result.rows if row.contract in told]
    return [f"the contract of {row.task} {told[str(row.contract)]}; see tenure report {row.run}" for row in rows]


def run_sequence(folder: SequenceFolder, workspace: Workspace, console: Console) -> SequenceResult:
    """Do what is left of a sequence; its result. Finished tasks are not done again.

    Ray is connected by the caller, see pipeline.session(). The result and the report are written anew after each task.

    Raises:
        TenureError: a task's run failed; the sequence goes on from there when it is resumed.
    """
    sequence, cards = folder.read_spec(), list[Scorecard]()
    console.print(f"sequence [bold]{folder.id}[/]   {folder.path}")
    with RunFolder(folder.path).held():
        for index, task in enumerate(sequence.tasks):
            console.print(f"\ntask {index + 1} of {len(sequence.tasks)}: [bold]{task.name}[/]")
            run = _run_of(folder, sequence, index, workspace) or _start(folder, sequence, index, workspace)
            cards.append(pipeline.execute(run, workspace, console))
            result = make_result(folder.id, sequence, cards)
            write_result(folder.result, result)
            write_sequence_report(folder.report, result)
    return result


def _run_of(folder: SequenceFolder, sequence: SequenceSpec, index: int, workspace: Workspace) -> RunFolder | None:
    """The run that learns, or learned, a task; None before it was started."""
    run = folder.runs().get(sequence.tasks[index].name)
    return workspace.run(run) if run else None


def _start(folder: SequenceFolder, sequence: SequenceSpec, index: int, workspace: Workspace) -> RunFolder:
    """The run of the next task, from the artifact of the one before."""
    task = sequence.tasks[index]
    with output_to(folder.log):
        spec = step_spec(sequence, index, _before(folder, sequence, index, workspace))
        spec = inherit_suites(spec, workspace)
        plan, _ = stages.plan_run(spec, workspace)
        file = folder.step_yaml(task.name)
        file.parent.mkdir(exist_ok=True)
        given = spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        file.write_text(yaml.safe_dump(given, sort_keys=False, allow_unicode=True), encoding="utf-8")
        about = {"sequence": {"id": folder.id, "task": task.name, "step": index + 1}}
        run = pipeline.start_run(file, spec, plan, workspace, about)
    folder.note_run(task.name, run)
    return run


def _before(folder: SequenceFolder, sequence: SequenceSpec, index: int, workspace: Workspace) -> Before:
    """What a task goes on from: the base, or the last task's model and the importance that it used or left."""
    last = _run_of(folder, sequence, index - 1, workspace) if index else None
    if last is None:
        return Before(sequence.model)
    spec, carried = stages.spec_of(last), {one.type for one in sequence.carry}
    importances: dict[str, Path] = {}
    ewc = spec.protection(Ewc)
    if "ewc" in carried and ewc is not None:
        used = importance_of_run(ewc, spec, workspace)
        importances |= {"ewc": used} if used else {}
    if "si" in carried and spec.protection(Si) is not None:
        importances["si"] = last.artifact / IMPORTANCE_FOLDER
    return Before(str(next_model(last.artifact, spec)), importances)
