"""`tenure serve` and `tenure ask`: a scored run behind an endpoint, and one question to it."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cluster.pipeline import spec_of
from cluster.screen import make_screen
from cluster.session import ray_session
from serving.app import ServedModels
from serving.client import ask
from serving.endpoint import Endpoint, check_port, deploy
from serving.registry import registered_artifact
from training.errors import fail
from training.evaluation.scorecard import Scorecard, read_scorecard
from training.faults import output_to
from training.strategy import AnyTuning, is_adapter, is_served_as_adapter, unmergeable
from training.workspace import MERGED_FOLDER, RunFolder, read_json

MAX_MODEL_LEN = 2048


def served_models(run: RunFolder, scorecard: Scorecard) -> ServedModels:
    """The base under its folder's name and the artifact, merged unless vLLM takes it as it is, under the run's id.

    Raises:
        TenureError: the artifact has changed since it was scored, or no endpoint takes such a model.
    """
    spec = spec_of(run)
    artifact = registered_artifact(run, scorecard)
    tuned, rank = served_form(spec.tuning, artifact)
    return ServedModels(
        base_name=Path(spec.model).name,
        base_path=Path(spec.model),
        tuned_name=run.id,
        tuned_path=tuned,
        adapter_rank=rank,
        gpus=spec.scaling.gpus_per_worker,
        max_model_len=min(MAX_MODEL_LEN, max_positions(Path(spec.model))),
    )


def served_form(tuning: AnyTuning, artifact: Path) -> tuple[Path, int | None]:
    """The folder that vLLM loads, and the rank of the adapter in it; None for a whole model."""
    if is_served_as_adapter(tuning):
        return artifact, int(read_json(artifact / "adapter_config.json")["r"])
    reason = unmergeable(tuning)
    if reason:
        what = f"{tuning.type} cannot be served: vLLM takes LoRA adapters and whole models, and {reason}"
        raise fail(what, str(artifact), "load it with PEFT, or train with another tuning")
    return (artifact / MERGED_FOLDER if is_adapter(tuning) else artifact), None


def max_positions(model: Path) -> int:
    """How many positions a model has, by its config."""
    from training.models import read_model_info

    return read_model_info(model).max_positions or MAX_MODEL_LEN


def serve_run(run: RunFolder, host: str, port: int, address: str | None) -> None:
    """Deploy a run and its base and keep them up until SIGINT or SIGTERM.

    Raises:
        TenureError: the port is taken, the run was not scored or has changed since, or the endpoint's
            log-probabilities are not those of the scored models.
    """
    check_port(host, port)
    scorecard = read_scorecard(run.scorecard)
    served = served_models(run, scorecard)
    console = make_screen()
    console.print(f"log {run.logs / 'serve.log'}")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    needs = {"CPU": 2.0} | ({"GPU": float(served.gpus)} if served.gpus else {})
    log = run.logs / "serve.log"
    with output_to(log), ray_session(address, needs, log):
        told = deploy(served, scorecard.probes, host=host, port=port, on_progress=console.print)
        with told as endpoint:
            _show_endpoint(console, endpoint)
            stop.wait()
            console.print("stopping")


def _show_endpoint(console: Console, endpoint: Endpoint) -> None:
    for name, found in ((endpoint.base_name, endpoint.parity.base), (endpoint.tuned_name, endpoint.parity.tuned)):
        worst = f"log-probabilities differ by {found.largest:.1e} nats at most over {found.num_tokens} tokens"
        console.print(f"{name} answers as it did when it was scored: {worst}")
    console.print(f"[bold green]ready[/] {endpoint.base_url}   models {endpoint.base_name}, {endpoint.tuned_name}")


def show_answers(question: str, url: str, models: tuple[str, ...], system: str | None, max_tokens: int) -> None:
    """One panel an answer, side by side where the terminal is wide enough."""
    answers = ask(question, url, models or None, max_tokens, system)
    panels = [Panel(Text(answer.strip()), title=name, width=52) for name, answer in answers.items()]
    Console(highlight=False).print(Columns(panels))
