"""`tenure serve` and `tenure ask`: scored runs behind an endpoint, and one question to it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cluster.screen import make_screen
from cluster.session import ray_session
from serving.client import ask
from serving.endpoint import Endpoint, check_port, deploy_fleet
from serving.files import ServingFolder
from serving.fleet import Engine, Fleet
from serving.registry import registered_artifact
from serving.releases import releases
from serving.spec import Access, ServingSpec
from training.errors import Problem, TenureError, fail, raise_all
from training.evaluation.scorecard import Probe, Scorecard, read_scorecard
from training.faults import output_to
from training.spec import RunSpec
from training.specfile import read_section
from training.stages import spec_of
from training.strategy import AnyTuning, is_adapter, is_served_as_adapter, unmergeable
from training.workspace import MERGED_FOLDER, RunFolder, Workspace, read_json

MAX_MODEL_LEN = 2048
_SPEC_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Servable:
    """A scored run as an engine takes it: the folder, and the rank of the adapter in it (None: a whole model)."""

    run: RunFolder
    spec: RunSpec
    scorecard: Scorecard
    path: Path
    rank: int | None

    @property
    def base(self) -> Path:
        return Path(self.spec.model)

    @property
    def card(self) -> dict[str, str]:
        """What the playground shows of it."""
        suites = {
            f"{suite.role}: {suite.name}": f"{suite.base:.4g} to {suite.tuned:.4g}" for suite in self.scorecard.suites
        }
        told = {"run": self.run.id, "contract": self.scorecard.contract.verdict, "tuned from": self.base.name, **suites}
        return told | {"artifact": self.scorecard.artifact_hash[:12], "base": self.scorecard.base_hash[:12]}


def servable(run: RunFolder) -> Servable:
    """A run, if it can be served.

    Raises:
        TenureError: it was not scored, has changed since, or no endpoint takes such a model.
    """
    spec, scorecard = spec_of(run), read_scorecard(run.scorecard)
    path, rank = served_form(spec.tuning, registered_artifact(run, scorecard))
    return Servable(run, spec, scorecard, path, rank)


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


def read_serving_spec(what: str, workspace: Workspace, host: str | None, port: int | None) -> ServingSpec:
    """The serving spec in a YAML file, or one of a single run or alias; host and port go before the spec's."""
    told = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if not what.endswith(_SPEC_ENDINGS):
        return ServingSpec.model_validate({"models": (what,), **told})
    path = Path(what)
    spec, _ = read_section(ServingSpec, path, {"folder": path.parent, "look_at_files": True})
    return spec.model_copy(update=told)


def serve(what: str, workspace: Workspace, host: str | None, port: int | None, address: str | None) -> None:
    """Deploy what a run, an alias or a spec names, with the bases, and keep it up until SIGINT or SIGTERM.

    Raises:
        TenureError: the port is taken, a run was not scored or has changed since, or the endpoint's
            log-probabilities are not those of the scored models.
    """
    spec = read_serving_spec(what, workspace, host, port)
    check_port(spec.host, spec.port)
    fleet, probes = fleet_of(spec, workspace)
    folder = ServingFolder(workspace.root / "serving")
    access = Access(
        folder=folder.path,
        keys=spec.keys,
        host=spec.host,
        limits=spec.limits,
        moderation=spec.moderation,
        price_per_hour=spec.price_per_hour,
    )
    console = make_screen()
    console.print(f"log {folder.log}")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    needs = {"CPU": 2.0} | ({"GPU": float(fleet.gpus)} if fleet.gpus else {})
    with output_to(folder.log), ray_session(address, needs, folder.log):
        told = deploy_fleet(fleet, probes, access, port=spec.port, tls=spec.tls, on_progress=console.print)
        with told as endpoint:
            _show_endpoint(console, endpoint)
            stop.wait()
            console.print("stopping")


def fleet_of(spec: ServingSpec, workspace: Workspace) -> tuple[Fleet, dict[str, Sequence[Probe]]]:
    """The engines that a spec asks for, and what each model was scored with.

    Raises:
        TenureError: with everything that cannot be served.
    """
    aliases = {name: _runs_of(name, workspace) for name in spec.models if not (workspace.runs / name).is_dir()}
    wanted = dict.fromkeys(run for name in spec.models for run in aliases.get(name, (name,)))
    found: list[Servable] = []
    problems: list[Problem] = []
    for name in wanted:
        try:
            found.append(servable(workspace.run(name)))
        except TenureError as error:
            problems += error.problems
    raise_all(problems)
    return _fleet(spec, found, aliases), _probes(found)


def _runs_of(alias: str, workspace: Workspace) -> tuple[str, ...]:
    """The run that goes by an alias."""
    history = releases(workspace, alias)
    current = next((release.run for release in history if release.current), None)
    if current is None:
        return (workspace.run(alias).id,)  # which says that there is none, and names the nearest
    return (current,)


def _fleet(spec: ServingSpec, found: Sequence[Servable], aliases: Mapping[str, tuple[str, ...]]) -> Fleet:
    bases = dict.fromkeys(model.base for model in found)
    engines = [_base_engine(base, [model for model in found if model.base == base]) for base in bases]
    engines += [Engine(model.run.id, model.path) for model in found if model.rank is None]
    return Fleet(
        tuple(engines),
        gpus=max(model.spec.scaling.gpus_per_worker for model in found),
        max_model_len=min([spec.max_model_len, *(max_positions(base) for base in bases)]),
        replicas=spec.replicas,
        resident_adapters=spec.resident_adapters,
        trust_remote_code=spec.trust_remote_code,
        aliases={alias: runs[0] for alias, runs in aliases.items()},
        cards={model.run.id: model.card for model in found},
    )


def _base_engine(base: Path, models: Sequence[Servable]) -> Engine:
    """A base model with the adapters that were trained on it."""
    ranks = {model.run.id: model.rank for model in models if model.rank is not None}
    adapters = {model.run.id: model.path for model in models if model.rank is not None}
    return Engine(base.name, base, adapters, max(ranks.values(), default=None))


def _probes(found: Sequence[Servable]) -> dict[str, Sequence[Probe]]:
    probes: dict[str, Sequence[Probe]] = {}
    for model in found:
        probes.setdefault(model.base.name, model.scorecard.probes["base"])
        probes[model.run.id] = model.scorecard.probes["tuned"]
    return probes


def _show_endpoint(console: Console, endpoint: Endpoint) -> None:
    for name, found in endpoint.parity.items():
        worst = f"log-probabilities differ by {found.largest:.1e} nats at most over {found.num_tokens} tokens"
        console.print(f"{name} answers as it did when it was scored: {worst}")
    if endpoint.open:
        console.print("[yellow]no API key is needed on this machine[/]; tenure keys create NAME makes the first")
    console.print(f"[bold green]ready[/] {endpoint.base_url}   models {', '.join(endpoint.names)}")


def show_answers(question: str, url: str, models: tuple[str, ...], system: str | None, max_tokens: int) -> None:
    """One panel an answer, side by side where the terminal is wide enough."""
    answers = ask(question, url, models or None, max_tokens, system)
    panels = [Panel(Text(answer.strip()), title=name, width=52) for name, answer in answers.items()]
    Console(highlight=False).print(Columns(panels))
