"""Where an endpoint keeps its keys, its catalog and its logs: workspace/serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServingFolder:
    """Paths below one folder, which every process of the endpoint sees."""

    path: Path

    @property
    def keys(self) -> Path:
        return self.path / "keys.db"

    @property
    def catalog(self) -> Path:
        return self.path / "catalog.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def requests(self) -> Path:
        return self.path / "requests.jsonl"

    @property
    def adapters(self) -> Path:
        """Adapters that were copied from stores."""
        return self.path / "adapters"

    @property
    def log(self) -> Path:
        """What libraries say while the endpoint runs."""
        return self.path / "serve.log"

    @property
    def endpoint(self) -> Path:
        """Where the running endpoint listens, and the key of administration that this machine's user may read."""
        return self.path / "endpoint.json"
