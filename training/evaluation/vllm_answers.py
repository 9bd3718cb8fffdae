"""Greedy answers by vLLM's offline engine, for suites whose answers are written; the rest stays in transformers.

The engine gets token ids that were rendered here and gives ids back, so prompts and texts are those of the other
engine. It ends before the model is loaded to be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.items import read_items
from training.evaluation.suites import Question, ask, render_item
from training.strategy import AnyTuning, is_adapter, is_served_as_adapter
from training.suite_spec import Answering
from training.workspace import MERGED_FOLDER, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Without `nobind` every engine pins itself to the same cores; compiling, and processes of the engine's own, take longer
# than a small model gives back. On a GPU a process of its own gives all memory back when it ends.
_CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_ON_CPU: dict[str, Any] = {"enforce_eager": True, "distributed_executor_backend": "uni"}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_GPU_SHARE = 0.85


@dataclass(frozen=True)
class Weights:
    """What vLLM loads: a whole model, and a LoRA adapter with its rank on top of it where there is one."""

    model: Path
    adapter: Path | None = None
    rank: int = 0

    @classmethod
    def of(cls, base: Path, artifact: Path | None, tuning: AnyTuning) -> Weights:
        """A base, a whole tuned model, a LoRA adapter, or the merged model of an adapter that vLLM does not know."""
        if artifact is None or not is_adapter(tuning):
            return cls(artifact or base)
        if not is_served_as_adapter(tuning):
            return cls(artifact / MERGED_FOLDER)
        return cls(base, artifact, int(read_json(artifact / "adapter_config.json")["r"]))


def questions_of(suites: Sequence[Answering], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Question]:
    """What suites ask, each question once."""
    asked = (
        ask(suite, render_item(suite, item, tokenizer).prompt, tokenizer, suite.max_new_tokens, max_length)
        for suite in suites
        for item in read_items(suite)
    )
    return list(dict.fromkeys(asked))


def answer(
    weights: Weights, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, dtype: str, *, gpu: bool
) -> dict[Question, str]:
    """The greedy answer to every question."""
    if not questions:
        return {}
    with _engine(weights, max(len(q.ids) + q.max_new_tokens for q in questions), dtype, gpu=gpu) as engine:
        ids = _written(engine, weights, questions, tokenizer)
    return {
        question: tokenizer.decode(written, skip_special_tokens=True)
        for question, written in zip(questions, ids, strict=True)
    }


@contextmanager
def _engine(weights: Weights, max_length: int, dtype: str, *, gpu: bool) -> Iterator[Any]:
    """An engine over weights, which ends with the block."""
    if not gpu:
        os.environ.update(_CPU_ENV)  # a scoring process is nobody else's
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given: dict[str, Any] = {"gpu_memory_utilization": _GPU_SHARE} if gpu else dict(_ON_CPU)
    if weights.adapter:
        rank = next(rank for rank in _RANKS if rank >= weights.rank)
        given |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    engine = LLM(
        str(weights.model),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=max_length,
        seed=0,
        trust_remote_code=False,
        **given,
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _written(
    engine: Any, weights: Weights, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The ids that are written, without what ends an answer. The model's own penalties hold, as in transformers."""
    from vllm.lora.request import LoRARequest

    ends = _ends(weights.model, tokenizer)
    sampling = []
    for question in questions:
        one = engine.get_default_sampling_params()
        one.temperature, one.top_p, one.top_k, one.min_p = 0.0, 1.0, 0, 0.0
        one.max_tokens, one.stop_token_ids, one.detokenize = question.max_new_tokens, sorted(ends), False
        sampling.append(one)
    request = LoRARequest("tuned", 1, str(weights.adapter)) if weights.adapter else None
    prompts = [{"prompt_token_ids": list(question.ids)} for question in questions]
    outputs = engine.generate(prompts, sampling, use_tqdm=False, lora_request=request)
    return [[token for token in output.outputs[0].token_ids if token not in ends] for output in outputs]


def _ends(model: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    path = model / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.is_file() else None
    given = named if isinstance(named, list) else [named]
    return {token for token in (*given, tokenizer.eos_token_id) if token is not None}


def max_length_of(model: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a model reads, found as the harness finds it."""
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    return int(resolve_max_length(AutoConfig.from_pretrained(model), tokenizer))
