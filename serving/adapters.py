"""What runs inside Ray's replicas: adapters read from local or NFS folders, each under a plain model name.

Ray loads adapters from cloud addresses only and names them `base:adapter`. Both are replaced here through the
constructor arguments that `ray.serve.llm` offers for it; importing this module imports vLLM (about 10 s).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.accelerators import CPUConfig
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress

ADAPTERS_KEY = "tenure_adapters"


class FolderLoader:
    """Finds an adapter's folder on first use; takes the place of Ray's LoraModelLoader."""

    def __init__(self, folders: Mapping[str, str], download_timeout_s: float | None = None, max_tries: int = 1) -> None:
        del download_timeout_s, max_tries  # nothing is downloaded
        self._folders = dict(folders)
        self._ids = itertools.count(1)

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """Where the adapter of this name lies.

        Raises:
            HTTPException: 404, no adapter of this name is configured or its folder is gone.
        """
        folder = self._folders.get(lora_model_id)
        if folder is None or not (Path(folder) / "adapter_config.json").is_file():
            raise HTTPException(404, f"there is no adapter '{lora_model_id}' for '{llm_config.model_id}'")
        return DiskMultiplexConfig(
            model_id=lora_model_id, max_total_tokens=None, local_path=folder, lora_assigned_int_id=next(self._ids)
        )


class CpuEngine(VLLMEngine):  # type: ignore[misc]
    """Runs the model in vLLM's engine process, not in one more beside it.

    The extra process serves to bind OpenMP threads to cores, which Tenure turns off; without it a start takes about
    10 s and 0.7 GB less. Ray allows no such choice on CPU, so this sets it on the finished configuration.
    """

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        vllm_engine_config.parallel_config.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class AdapterServer(LLMServer):  # type: ignore[misc]
    """An engine whose adapters come from the folders named in its configuration."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        loader: Any = partial(FolderLoader, llm_config.experimental_configs[ADAPTERS_KEY])
        engine = CpuEngine if isinstance(llm_config.accelerator_config, CPUConfig) else None
        await super().__init__(llm_config, model_downloader=loader, engine_cls=engine, **kwargs)

    async def start(self) -> None:
        """Start the engine, without the usage report that Ray makes at this point through an actor of its own."""
        self.engine = self._engine_cls(self._llm_config)
        await self.engine.start()


class NamedIngress(OpenAiIngress):  # type: ignore[misc]
    """Routes plain adapter names, listed by /v1/models, to the engine of their base model."""

    def __init__(
        self,
        llm_deployments: dict[str, DeploymentHandle[Any]],
        model_cards: dict[str, Any],
        *,
        bases: Mapping[str, str],
        lora_paths: dict[str, str] | None = None,
    ) -> None:
        """`bases` gives for every adapter's name that of its base model."""
        del lora_paths  # cloud folders, which are listed over the network
        for name, base in bases.items():
            llm_deployments[name] = llm_deployments[base].options(multiplexed_model_id=name)
            model_cards[name] = model_cards[base].model_copy(update={"id": name})
        super().__init__(llm_deployments, model_cards)


class LocalFiles(CallbackBase):  # type: ignore[misc]
    """Skips Ray's download step: the models are local, and its extra process costs seconds at every start."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
