"""`tenure plan SPEC`: what the cluster has, what the run should ask of it, and why."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from cluster.machines import GIB, Gpu, Node, describe
from cluster.planning import Choice


@click.command("plan")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--address", help="The head's dashboard, http://HOST:8265. Default: this machine.")
@click.option("--gpus", type=click.IntRange(min=1), help="Plan for so many GPUs, instead of what is there.")
@click.option("--gpu", "gpu_name", default="H100", show_default=True, help="With --gpus: their kind.")
@click.option("--gpu-memory", default=80.0, show_default=True, type=click.FloatRange(min=1), help="With --gpus: GiB.")
@click.option("--price", type=click.FloatRange(min=0), help="What a GPU hour costs. Default: the spec's.")
@click.pass_context
def plan_command(
    context: click.Context,
    spec: Path,
    address: str | None,
    gpus: int | None,
    gpu_name: str,
    gpu_memory: float,
    price: float | None,
) -> None:
    """Say how SPEC best runs on a cluster: workers, ZeRO stage, micro-batch, memory, time, price, alternatives."""
    if gpus:
        nodes = [Node("given", 8 * gpus, 0, (Gpu(gpu_name, int(gpu_memory * GIB)),) * gpus)]
    elif address:
        from cluster.jobs import nodes_at

        nodes = nodes_at(address)
    else:
        from cluster.machines import this_machine

        nodes = [this_machine()]
    show_plan(spec, context.obj, nodes, price)


def show_plan(path: Path, workspace: object, nodes: list[Node], price: float | None) -> None:
    from cluster import pipeline
    from cluster.planning import advice, choices, nearest, short_of
    from cluster.screen import table
    from training.data.prepare import load_prepared, prepare
    from training.models import read_model_info
    from training.plan import make_plan
    from training.workspace import Workspace

    assert isinstance(workspace, Workspace)
    spec = pipeline.read_spec(path, workspace)
    counts = load_prepared(prepare(spec, workspace)).counts()
    info = read_model_info(Path(spec.model))
    plan = make_plan(spec, info, counts, None)
    made = choices(spec, info, plan, plan.row_tokens or counts.longest, nodes, price or spec.scaling.price_per_gpu_hour)
    best, console = made[0], Console(highlight=False)
    for line in describe(nodes):
        console.print(line, markup=False)
    if short := short_of(spec, nodes):
        console.print(short, markup=False)
    console.print(f"{plan.steps:,} steps of {plan.num_tokens_per_epoch / plan.steps_per_epoch:,.0f} tokens\n")
    console.print(f"[bold]{'set' if best.fits else 'refused'}[/] {advice(spec, best)}\n", soft_wrap=True)
    _show_memory(console, best)
    console.print(table(_COLUMNS, [_row(choice) for choice in [best, *nearest(made, best)]]))
    console.print(_assumed(spec.scaling.gpus_per_worker > 0, best), soft_wrap=True)


_COLUMNS = ("workers", "ZeRO", "micro-batch", "layers", "a worker, GiB", "fits", "s/step", "hours", "price")


def _row(choice: Choice) -> tuple[str, ...]:
    fits = "?" if choice.limit_bytes is None else "yes" if choice.fits else "no"
    layers = "run again" if choice.recomputes else "kept"
    sizes = (str(choice.workers), str(choice.zero_stage), str(choice.micro_batch_size), layers)
    return (*sizes, f"{choice.memory.total / GIB:.1f}", fits, *map(_told, (choice.step_s, choice.hours, choice.price)))


def _told(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _show_memory(console: Console, best: Choice) -> None:
    from cluster.screen import table

    parts = [(name, f"{value / GIB:.2f}") for name, value in vars(best.memory).items() if value]
    console.print(table(("a worker's memory", "GiB"), [*parts, ("in all", f"{best.memory.total / GIB:.2f}")]))
    console.print()


def _assumed(on_gpus: bool, best: Choice) -> str:
    if best.step_s is None:
        why = "no GPU of a known kind is there" if on_gpus else "processors differ too much"
        return f"Memory is an estimate. Time is not estimated ({why}): the first steps tell it."
    return (
        "Memory and time are estimates. Time assumes 44 % of peak for all operations that are made, measured on H100 "
        "at 1.2 B in full and 8 B by LoRA, one host, full batches; small models and other GPUs reach less."
    )
