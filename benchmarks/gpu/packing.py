"""What packing end to end saves against padding on one GPU, at the lengths of real instructions.

    python benchmarks/gpu/packing.py --out benchmarks/gpu/packing.json

Full tuning of random models in bf16 with fused AdamW: the same global batches of 64 examples, once in micro-batches of
16 like lengths padded to the longest (transformers' SDPA), once laid end to end in rows of 2048 tokens with attention
kept inside examples by torch's variable-length flash attention. The two take turns. Losses and gradients are compared
first. Tokens are those of examples, without padding.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.attention import attend_within
from training.data.batches import micro_batches
from training.data.encoding import Encoded
from training.data.packing import pack, packed_batches
from training.data.prepare import Prepared
from training.objective.objectives import TokenObjective
from training.objective.targets import TargetLogits
from training.objective.weighing import Weighed

LENGTHS = Path(__file__).with_name("instruction-lengths.json")
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
BATCH, MICRO, ROW = 64, 16, 2048


class Bare:
    """What an objective needs of an engine, around a bare model."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.module, self.device = model, device

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class Side:
    """A model that learns padded or packed examples."""

    def __init__(self, shape: str, rows: tuple[Encoded, ...], device: torch.device, packed: bool) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=ROW)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            self.model: Any = LlamaForCausalLM(config).to(dtype)
        if packed:
            attend_within(self.model)
        self.packed, self.lengths = packed, [len(row.ids) for row in rows]
        self.objective = TokenObjective(
            TargetLogits(self.model), Weighed(Prepared(rows, {}, 0)), 0, 1.0, (), end_to_end=packed
        )
        self.engine = Bare(self.model, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")

    def batches(self, indices: list[int]) -> list[list[int]]:
        if self.packed:
            count = -(-len(pack(indices, self.lengths, ROW)) // 8)
            return packed_batches(indices, self.lengths, ROW, count)
        return micro_batches(indices, self.lengths, MICRO, BATCH // MICRO)

    def gradients(self, indices: list[int]) -> torch.Tensor:
        """The loss of a global batch; gradients are left at the weights."""
        self.model.zero_grad()
        totals = self.objective.totals(indices)
        whole = torch.zeros((), device=self.engine.device)
        for batch in self.batches(indices):
            loss = self.objective.loss(self.engine, batch, totals).value
            loss.backward()  # type: ignore[no-untyped-call]
            whole += loss.detach()
        return whole

    def step(self, indices: list[int]) -> None:
        self.gradients(indices)
        self.optimizer.step()


def examples(vocabulary: int, count: int) -> tuple[Encoded, ...]:
    """Random tokens of real lengths."""
    draw = random.Random(0)
    lengths = json.loads(LENGTHS.read_text())["tokens_and_targets"]
    draw.shuffle(lengths)
    return tuple(
        Encoded(tuple(draw.randrange(vocabulary) for _ in range(n)), tuple(i >= n - targets for i in range(n)))
        for n, targets in lengths[:count]
    )


def compare(padded: Side, packed: Side, indices: list[int]) -> dict[str, float]:
    """Largest differences of one global batch's loss and gradients, relative."""
    losses = [float(side.gradients(indices)) for side in (padded, packed)]
    pairs = zip(padded.model.parameters(), packed.model.parameters(), strict=True)
    apart = max(float((one.grad - two.grad).float().norm() / one.grad.float().norm()) for one, two in pairs)
    return {"loss": abs(losses[1] - losses[0]) / losses[0], "gradient": apart}


def measure(shape: str, steps: int, device: torch.device) -> dict[str, Any]:
    rows = examples(SHAPES[shape]["vocab_size"], BATCH * steps)
    sides = {"padded": Side(shape, rows, device, False), "packed": Side(shape, rows, device, True)}
    first = list(range(BATCH))
    apart = compare(sides["padded"], sides["packed"], first)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(3):
        for name, side in sides.items():
            seconds = run(side, steps, device)
            rates[name].append(sum(side.lengths) / seconds)
            print(f"{shape} {name} turn {turn}: {rates[name][-1]:,.0f} tokens/s", flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "shape": shape,
        "relative_difference": apart,
        "tokens_per_second": medians,
        "of_each_turn": rates,
        "packed_over_padded": medians["packed"] / medians["padded"],
    }


def run(side: Side, steps: int, device: torch.device) -> float:
    """Seconds of an epoch, after one step that warms up."""
    side.step(list(range(BATCH)))
    wait(device)
    start = time.perf_counter()
    for step in range(steps):
        side.step(list(range(step * BATCH, (step + 1) * BATCH)))
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1b"])
    parser.add_argument("--steps", type=int, default=20, help="global batches of a turn")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine["device"] = torch.cuda.get_device_name() if gpu else "cpu"
    results = []
    for shape in arguments.shapes:
        results.append(measure(shape, arguments.steps, device))
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
