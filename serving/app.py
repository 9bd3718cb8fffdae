"""The Serve application: a vLLM engine for every base or whole model, and the gated ingress in front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.files import ServingFolder
from serving.fleet import Engine, Fleet
from serving.spec import Access, Autoscaling
from training.errors import Problem, fail, raise_all
from training.quiet import QUIET

if TYPE_CHECKING:
    from ray import serve
    from ray.serve.llm import LLMConfig

    from serving.listening import Listen

# Every process of the endpoint gets these: nothing is reported, and nothing is fetched from a hub.
OFFLINE_ENV = {**QUIET, "HF_HUB_OFFLINE": "1"}
# One GiB of key-value cache is plenty for the small models that a CPU can serve. Without `nobind` every engine pins
# itself to the same cores. Compiling the sampler needs a C++ compiler and took up to 30 s of the first request.
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
CPUS_PER_ENGINE = 1.0
# Share of a replica's GPU that Ray's task needs which reads what the GPU can do.
_ASKED = 0.01
_HEAD = "node:__internal_head__"  # Ray's name of a resource that the head node alone has


# On a CPU a batch of two adapters ends vLLM 0.29's engine (an einsum in its LoRA operations), so they take turns there.
MAX_LORAS_IN_A_BATCH = 4


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
    max_model_len: int = 1024

    @property
    def fleet(self) -> Fleet:
        """One engine, or two for a fully tuned model."""
        base = Engine(self.base_name, self.base_path, {}, None)
        if self.adapter_rank is None:
            engines: tuple[Engine, ...] = (base, Engine(self.tuned_name, self.tuned_path))
        else:
            adapters = {self.tuned_name: self.tuned_path}
            engines = (Engine(self.base_name, self.base_path, adapters, self.adapter_rank),)
        return Fleet(engines, gpus=self.gpus, max_model_len=self.max_model_len)


def build_application(fleet: Fleet, access: Access, listen_at: Listen | None = None) -> serve.Application:
    """An OpenAI-compatible application that answers under the fleet's names.

    It listens by itself, on the head node; without `listen_at` it is asked through Ray's proxy.

    Raises:
        TenureError: see check_fleet.
    """
    check_fleet(fleet)
    from ray import serve
    from ray.llm._internal.serve.core.server.builder import build_llm_deployment

    from serving.adapters import Front

    catalog = ServingFolder(access.folder).catalog
    configs = [engine_config(fleet, engine, catalog) for engine in fleet.engines]
    handles = {config.model_id: build_llm_deployment(config) for config in configs}
    front = serve.deployment(serve.ingress()(Front), **_front_options(fleet, access, listen_at))
    return front.bind(handles, access, listen_at)


def _front_options(fleet: Fleet, access: Access, listen_at: Listen | None) -> dict[str, Any]:
    """One replica, since windows of rates and the line of requests live in it."""
    limits = access.limits
    head = {"resources": {_HEAD: 0.001}} if listen_at is not None else {}
    return {
        "name": "Front",
        "num_replicas": 1,
        "max_ongoing_requests": 2 * (limits.max_running + limits.max_waiting),
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": _env(fleet)}, **head},
    }


def check_fleet(fleet: Fleet) -> None:
    """Refuse what cannot be served, before anything starts.

    Raises:
        TenureError: a name that Ray's routing cannot carry or that is given twice, a folder without a model, or an
            adapter's rank above what vLLM takes.
    """
    for name in (*fleet.names, *fleet.aliases):
        if not name or ":" in name:
            raise fail(f"'{name}' cannot name a served model", "", "use a name without ':'")
    twice = sorted({name for name in fleet.names if fleet.names.count(name) > 1 or name in fleet.aliases})
    if twice:
        raise fail(f"two models are both called '{twice[0]}'", "", "give each its own name")
    raise_all(problem for engine in fleet.engines for problem in _engine_problems(engine))


def _engine_problems(engine: Engine) -> list[Problem]:
    problems = _folder_problems(engine.path, "config.json")
    for path in engine.adapters.values():
        problems += _folder_problems(path, "adapter_config.json")
    if engine.max_rank is not None and engine.max_rank > VLLM_RANKS[-1]:
        what = f"an adapter's rank {engine.max_rank} is above {VLLM_RANKS[-1]}, the highest that vLLM serves"
        problems.append(Problem(what, str(engine.path), "export it merged, and serve the merged model"))
    return problems


def _folder_problems(folder: Path, config: str) -> list[Problem]:
    missing = [pattern for pattern in (config, "*.safetensors") if not any(folder.glob(pattern))]
    return [
        Problem(f"there is no model in {folder}: it holds no {pattern}", "", "give the artifact's folder")
        for pattern in missing[:1]
    ]


def engine_config(fleet: Fleet, engine: Engine, catalog: Path) -> LLMConfig:
    """How Ray deploys one engine of the fleet."""
    from ray.llm._internal.common.callbacks.base import CallbackConfig
    from ray.serve.llm import LLMConfig

    from serving.adapters import CATALOG_KEY, AdapterServer, LocalFiles

    resident = {"max_num_adapters_per_replica": fleet.resident_adapters}
    return LLMConfig(
        model_loading_config={"model_id": engine.name, "model_source": str(engine.path)},
        engine_kwargs=_engine_arguments(fleet, engine),
        lora_config=resident if engine.max_rank is not None else None,
        experimental_configs={CATALOG_KEY: str(catalog)},
        server_cls=AdapterServer,
        callback_config=CallbackConfig(callback_class=LocalFiles),
        placement_group_config={"bundle_per_worker": _bundle(fleet)},
        deployment_config={
            **_replicas(fleet.replicas),
            "max_constructor_retry_count": 1,
            "ray_actor_options": _actor(fleet),
        },
        runtime_env={"env_vars": _env(fleet)},
        log_engine_metrics=False,
    )


def _replicas(replicas: int | Autoscaling) -> dict[str, Any]:
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    bounds = {"min_replicas": replicas.min_replicas, "max_replicas": replicas.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": replicas.target_requests}}


def _engine_arguments(fleet: Fleet, engine: Engine) -> dict[str, Any]:
    """Arguments of one vLLM engine."""
    kwargs: dict[str, Any] = {
        "dtype": fleet.dtype,
        "max_model_len": fleet.max_model_len,
        "trust_remote_code": fleet.trust_remote_code,
        "load_format": "safetensors",
    }
    if fleet.gpus:
        kwargs["tensor_parallel_size"] = _gpus_per_engine(fleet)
        kwargs["gpu_memory_utilization"] = fleet.gpu_memory * _gpu_share(fleet)
    else:
        kwargs["enforce_eager"] = True  # compiling takes longer than a session with a small model gives back
    if engine.max_rank is not None:
        kwargs |= _lora_arguments(engine.max_rank, fleet.resident_adapters, MAX_LORAS_IN_A_BATCH if fleet.gpus else 1)
    return kwargs


def _lora_arguments(max_rank: int, resident: int, in_a_batch: int) -> dict[str, Any]:
    rank = next(rank for rank in VLLM_RANKS if rank >= max_rank)
    in_a_batch = min(in_a_batch, resident)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": in_a_batch, "max_cpu_loras": resident}


def _gpu_share(fleet: Fleet) -> float:
    """Share of one GPU that each engine takes: two engines halve a single GPU."""
    return min(1.0, fleet.gpus / len(fleet.engines))


def _gpus_per_engine(fleet: Fleet) -> int:
    return max(1, fleet.gpus // len(fleet.engines))


def _actor(fleet: Fleet) -> dict[str, float]:
    """What Ray sets aside for each replica itself: the GPU, where one is enough and the engine runs beside it."""
    if not fleet.gpus:
        return {"num_cpus": CPUS_PER_ENGINE / 2}
    return {"num_cpus": 0.0, "num_gpus": (1 - _ASKED) * _gpu_share(fleet) if _gpus_per_engine(fleet) == 1 else 0.0}


def _bundle(fleet: Fleet) -> dict[str, float]:
    """What Ray sets aside for each engine worker, beside what its replica asks for."""
    if fleet.gpus:
        return {"CPU": 1.0, "GPU": _ASKED * _gpu_share(fleet) if _gpus_per_engine(fleet) == 1 else 1.0}
    return {"CPU": CPUS_PER_ENGINE / 2}


def _env(fleet: Fleet) -> dict[str, str]:
    return OFFLINE_ENV if fleet.gpus else OFFLINE_ENV | CPU_ENV
