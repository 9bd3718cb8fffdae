"""`tenure check`: the plan of a spec, and a preview of which tokens carry loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import pipeline
from cluster.inspecting import tell_leakage
from cluster.screen import facts
from training import stages
from training.data.encoding import Encoded, load_tokenizer, preview
from training.data.prepare import Faulty, load_prepared
from training.data.shapes import describe_source
from training.lineage import describe_lineage
from training.plan import GIB, Plan, describe_replay, describe_tasks
from training.spec import RunSpec
from training.strategy import Replay
from training.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREVIEWED = 2


def show_check(spec_path: Path, workspace: Workspace) -> None:
    """Validate a spec and its data, print the plan and the first examples as the model will see them."""
    spec = pipeline.read_spec(spec_path, workspace)
    plan, prepared = stages.plan_run(spec, workspace)
    tell_leakage(spec, workspace)
    console = Console(highlight=False)
    console.print(f"[bold green]valid[/]  {spec_path}")
    console.print(plan_table(plan, spec.protection(Replay)))
    tell_lineage(console, spec, workspace)
    weak = stages.known_power(spec, workspace)
    if weak is None:
        console.print("what the suites can show is told once the base is scored, when training starts")
    for line in weak or ():
        console.print(Text.assemble(("weak suite ", "yellow"), line))
    data = load_prepared(prepared)
    replay = spec.protection(Replay)
    for source, faulty in zip((*spec.data.train, *(replay.data if replay else ())), data.faulty, strict=True):
        console.print(f"rows of {source.path}: {describe_source(source)}", soft_wrap=True, markup=False)
        tell_dropped(console, faulty)
    tokenizer = load_tokenizer(Path(spec.model))
    console.print("the first examples; [bold green]green[/] tokens carry loss, others are only read:")
    for index in range(min(PREVIEWED, len(data.train))):
        console.print(preview_text(data.train[index], tokenizer), soft_wrap=True)
        if data.rejected:
            console.print(Text("rejected: ") + preview_text(answer_of(data.rejected[index]), tokenizer), soft_wrap=True)


def tell_dropped(console: Console, faulty: Faulty) -> None:
    """How many faulty rows of a source are dropped, and the first of them; nothing where there is none."""
    if faulty.num_rows:
        console.print(f"{faulty.num_rows:,} faulty rows are dropped, the first of them:", soft_wrap=True)
        for problem in faulty.first[:PREVIEWED]:
            console.print(f"  {problem.where}: {problem.what}", soft_wrap=True, markup=False)


def tell_lineage(console: Console, spec: RunSpec, workspace: Workspace) -> None:
    """What the run watches because of where its base came from; nothing where there is nothing to tell."""
    told = describe_lineage(spec, workspace)
    if told:
        console.print(told, soft_wrap=True)


def plan_table(plan: Plan, replay: Replay | None = None) -> Table:
    """The plan in words and units."""
    share = plan.trainable_parameters / plan.model_parameters
    return facts(
        {
            "model": f"{plan.model_parameters:,} parameters",
            "trainable": f"{plan.trainable_parameters:,} ({share:.2%})",
            "ZeRO stage": str(plan.zero_stage),
            "batch": f"{plan.global_batch_size} = {plan.workers} workers x {plan.accumulation_steps} "
            f"accumulated x {plan.micro_batch_size}",
            **({"packing": f"rows of up to {plan.row_tokens:,} tokens"} if plan.row_tokens else {}),
            "steps": f"{plan.steps} ({plan.steps_per_epoch} an epoch)",
            "examples": f"{plan.num_examples:,} ({plan.num_overlong:,} longer than max_length"
            + (f", {plan.num_untaught:,} without target tokens dropped" if plan.num_untaught else "")
            + (f", {plan.num_faulty:,} faulty ones dropped)" if plan.num_faulty else ")"),
            **({"tasks": "\n".join(describe_tasks(plan.tasks))} if plan.tasks else {}),
            "tokens": f"{plan.num_tokens_per_epoch:,} an epoch, {plan.num_target_tokens_per_epoch:,} carry loss",
            **({"replay": describe_replay(plan, replay.share)} if replay else {}),
            "memory": f"about {plan.memory_per_worker_bytes / GIB:.1f} GiB a worker (estimated)",
            "disk": f"about {plan.disk_bytes / GIB:.2f} GiB",
        }
    )


def preview_text(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    """An example's text with its target tokens in green and, without colour, between brackets."""
    text = Text()
    for piece, is_target in preview(tokenizer, example):
        text.append(f"[{piece}]" if is_target else piece, style="bold green" if is_target else "dim")
    return text


def answer_of(example: Encoded) -> Encoded:
    """A row from its first target on: a rejected answer without the prompt that it shares with the chosen one."""
    start = example.is_target.index(True)
    return Encoded(example.ids[start:], example.is_target[start:])
