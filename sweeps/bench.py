"""What one warm process keeps between trials: a process group, base weights, base scores, the sweep's spec."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sweeps.folder import Shared, SweepFolder
from sweeps.spec import SweepSpec
from training import tuning
from training.data.items import Answered
from training.evaluation import scoring
from training.evaluation.judge import build_scorecard
from training.evaluation.kl import kl_to_base
from training.evaluation.scorecard import Probe, Scorecard
from training.interpolate import mixed, scaled
from training.models import hash_folder
from training.spec import RunSpec
from training.stages import protocol_key
from training.strategy import AnyTuning, Lora, is_adapter
from training.workspace import Workspace

Answers = tuple[dict[str, list[Answered]], tuple[Probe, ...]]


@dataclass
class Bench:
    """One process's place to try settings at, one after the other."""

    workspace: Workspace
    folder: SweepFolder
    sweep: SweepSpec
    shared: Shared
    bases: dict[tuple[str, torch.dtype], torch.nn.Module] = field(default_factory=dict)
    base_answers: dict[str, Answers] = field(default_factory=dict)

    @classmethod
    def open(cls, workspace: str, folder: str) -> Bench:
        """The place, with a process group of this process alone where it trains."""
        at = SweepFolder(Path(folder))
        sweep = at.read_spec()
        if sweep.run.scaling.workers == 1:
            join_alone()
        return cls(Workspace.at(workspace), at, sweep, at.read_shared())

    def load(self, tuning_: AnyTuning, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        """A base to tune: a copy of the one in memory, read from disk for the first trial alone."""
        if isinstance(tuning_, Lora) and tuning_.bits:
            fresh: torch.nn.Module = tuning.load_base_for(tuning_, folder, dtype)
            return fresh
        model: torch.nn.Module = copy.deepcopy(self.pristine(folder, dtype))
        return model

    def pristine(self, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        """The base's own weights on the CPU, which nobody changes."""
        key = (str(folder), dtype)
        if key not in self.bases:
            self.bases[key] = tuning.load_base(folder, dtype)
        return self.bases[key]

    # ------------------------------------------------------------------------------------------- scoring

    def answers_of_base(self, spec: RunSpec) -> Answers:
        """The base's answers, scored before the trials began."""
        _, key = protocol_key(spec)
        if key not in self.base_answers:
            cached = scoring.cached_scores(self.workspace, Path(spec.model), key)
            self.base_answers[key] = scoring.read_scores(cached)
        return self.base_answers[key]

    def card(self, spec: RunSpec, run: str, model: torch.nn.Module, artifact_hash: str) -> Scorecard:
        """The scorecard of a model in memory against the base, with its distance from that."""
        started = time.monotonic()
        protocol, key = protocol_key(spec)
        cached = scoring.cached_scores(self.workspace, Path(spec.model), key)
        with scoring.alone():
            held = scoring.held_model(model, Path(spec.model))
            tuned = scoring.ask_suites(spec, held)
            far = kl_to_base(
                spec, held.model, held.tokenizer, held.max_length, scoring.base_log_probs(cached), is_base=False
            )
        return build_scorecard(
            run_id=run,
            spec=spec,
            artifact_hash=artifact_hash,
            protocol=protocol,
            protocol_hash=key,
            base=self.answers_of_base(spec),
            tuned=tuned,
            seconds=time.monotonic() - started,
            kl=far,
        )

    def exported(self, spec: RunSpec, artifact: Path) -> Exported:
        """An artifact as serving would load it, in memory."""
        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        base = self.pristine(Path(spec.model), dtype)
        if is_adapter(spec.tuning):
            from peft import PeftModel

            model: Any = PeftModel.from_pretrained(copy.deepcopy(base), artifact)
        else:
            model = tuning.load_base(artifact, dtype)
        model = model.to("cuda" if gpu else "cpu").eval()
        return Exported(model, base, artifact, is_adapter(spec.tuning))


@dataclass
class Exported:
    """A tuned model in memory, which can be moved between its base (alpha 0) and what was tuned (alpha 1)."""

    model: Any
    base: torch.nn.Module
    artifact: Path
    adapter: bool
    tuned: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def at(self, alpha: float) -> Any:
        """The model with the weights that interpolate() would write for that alpha."""
        named = {n: p for n, p in self.model.named_parameters() if not self.adapter or ".lora_" in n}
        if self.tuned is None:
            self.tuned = {name: parameter.detach().cpu().clone() for name, parameter in named.items()}
        bases = dict(self.base.named_parameters()) if not self.adapter else {}
        for name, parameter in named.items():
            kept = self.tuned[name]
            made = (
                scaled(name, kept, alpha, self.artifact)
                if self.adapter
                else mixed(name, kept, bases.get(name), alpha, self.artifact)
            )
            parameter.copy_(made)
        return self.model


def join_alone() -> None:
    """A process group of this process alone, as Ray Train would have made it; once a process."""
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(0)
    store = Path(tempfile.mkdtemp(prefix="tenure-trial-")) / "store"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{store}", rank=0, world_size=1)


def hash_at(artifact: Path, alpha: float | None) -> str:
    """What names a model between base and artifact: no file holds its weights."""
    whole = hash_folder(artifact)
    return whole if alpha is None else f"{whole}@{alpha:g}"
