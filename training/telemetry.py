"""What a worker tells of its steps while it makes them: gauges for Prometheus, and a line a step in its own log.

The gauges go through Ray, whose agent on every node is what Prometheus reads; outside of Ray there are none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Every gauge is called tenure_train_NAME and has the labels run and rank; those of the run alone come from rank 0.
GAUGES = {
    "step": "optimizer steps done",
    "loss": "loss of the last step, a mean over the target tokens of its global batch",
    "grad_norm": "norm of the last step's gradient, before clipping",
    "learning_rate": "learning rate of the last step",
    "tokens_per_second": "tokens of the last step, of all workers, over its seconds",
    "mfu": "share of the GPUs' peak that the last step's arithmetic makes; absent where the peak is not known",
    "step_seconds": "seconds of the last step",
    "data_seconds": "seconds of the last step in which this worker gathered its batches",
    "checkpoint_seconds": "seconds that training waited for the last checkpoint",
    "restarts": "attempts of this run after the first",
    "memory_bytes": "the most of its GPU's memory that this worker's allocator has held",
}
_OF_THE_RUN = ("loss", "grad_norm", "learning_rate")


@dataclass
class Telemetry:
    """One worker's gauges and log. `step_flops` are operations a token, `peak_flops` those of all GPUs a second."""

    run: str
    rank: int
    log: Path
    token_flops: float = 0.0
    peak_flops: float | None = None
    _gauges: dict[str, Any] = field(default_factory=dict)

    def tell_step(self, row: Mapping[str, Any], data_seconds: float) -> None:
        """Tell of a step by its row in the metrics."""
        values = {"step": row["step"], "step_seconds": row["seconds"], "data_seconds": data_seconds}
        if torch.cuda.is_available():
            values["memory_bytes"] = torch.cuda.max_memory_reserved()
        self._write({"time_s": round(time.time(), 3), "rank": self.rank, **values})
        if self.rank == 0:
            values |= {name: row[name] for name in _OF_THE_RUN if row[name] is not None}
            values["tokens_per_second"] = row["num_tokens"] / row["seconds"]
            if self.peak_flops:
                values["mfu"] = values["tokens_per_second"] * self.token_flops / self.peak_flops
        self.set(values)

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges, where this process is one of Ray's."""
        import ray

        if ray.is_initialized():
            for name, value in values.items():
                self._gauge(name).set(float(value))

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            gauge = Gauge(f"tenure_train_{name}", description=GAUGES[name], tag_keys=("run", "rank"))
            gauge.set_default_tags({"run": self.run, "rank": str(self.rank)})
            self._gauges[name] = gauge
        return self._gauges[name]

    def _write(self, row: Mapping[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
