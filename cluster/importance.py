"""`tenure importance`: computes what a spec's protections weigh weights by, and shows it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import pipeline
from cluster.screen import facts
from training import stages
from training.errors import fail
from training.faults import output_to
from training.protection.importance import TENSORS_FILE, check_importances, read_info
from training.protection.passes import ready_importances
from training.strategy import Ewc, Si
from training.workspace import Workspace


def compute_importances(spec_path: Path, workspace: Workspace, address: str | None) -> None:
    """What the protections of a spec need, computed unless it is cached; each is shown.

    Raises:
        TenureError: none of the spec's protections weighs weights by importance.
    """
    spec = pipeline.read_spec(spec_path, workspace)
    if not any(isinstance(protection, Ewc | Si) for protection in spec.protections):
        raise fail("no protection of this spec needs an importance", str(spec_path), "list ewc or si under protections")
    check_importances(spec)
    logs = workspace.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with pipeline.session(workspace, address, spec.scaling), output_to(logs / "importance.log"):
        folders = ready_importances(spec, workspace, logs, stages.memory_limit(spec.scaling))
    for folder in folders.values():
        print_importance(Path(folder))


def print_importance(folder: Path) -> None:
    """What an importance was estimated from, and its share and largest element module by module."""
    from safetensors import safe_open

    info = read_info(folder)
    console = Console(highlight=False)
    rows = {
        "importance": str(folder),
        "of the model": info.base_hash[:16],
        "estimator": f"{info.estimator}, over {info.examples} examples, loss a {info.reduction} over targets",
        "tasks": f"{info.tasks} (earlier ones times {info.gamma:g})",
        "trace": f"{info.trace:.4g}",
        "mean, largest": f"{info.mean:.4g}, {info.maximum:.4g}",
        "elements": f"{info.elements:,}",
    }
    console.print(facts(rows))
    parts = Table("parameter", "share of the trace", "mean", "largest", box=None, pad_edge=False)
    with safe_open(folder / TENSORS_FILE, "pt") as file:
        sums = {name: file.get_tensor(name).clamp(min=0) for name in file.keys()}  # noqa: SIM118
        for name, value in sorted(sums.items(), key=lambda pair: -pair[1].sum().item())[:_SHOWN]:
            share = value.sum().item() / info.trace
            parts.add_row(name, f"{share:.1%}", f"{value.mean().item():.3g}", f"{value.max().item():.3g}")
    console.print(parts)


_SHOWN = 12
