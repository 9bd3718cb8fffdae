"""What runs inside Ray's replicas: the gate, and engines that read adapters from local or NFS folders.

Ray loads adapters from cloud addresses only and names them `base:adapter`. Both are replaced here through the
constructor arguments that `ray.serve.llm` offers for it; importing this module imports vLLM (about 10 s).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
from fastapi import HTTPException
from prometheus_client import generate_latest
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.accelerators import CPUConfig
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from vllm.usage.usage_lib import UsageContext

from serving.catalog import CatalogFile
from serving.engines import Engines
from serving.files import ServingFolder
from serving.gate import Gate
from serving.listening import Leases, Listen, listen
from serving.spec import Access

CATALOG_KEY = "tenure_catalog"


class FolderLoader:
    """Finds an adapter's folder on first use; takes the place of Ray's LoraModelLoader."""

    def __init__(self, catalog: CatalogFile, download_timeout_s: float | None = None, max_tries: int = 1) -> None:
        del download_timeout_s, max_tries  # nothing is downloaded
        self._catalog = catalog
        self._ids = itertools.count(1)

    async def load_model_from_config(self, lora_model_id: str, llm_config: LLMConfig) -> DiskMultiplexConfig:
        """Where the adapter of this name lies.

        Raises:
            HTTPException: 404, the catalog has no such adapter or its folder is gone.
        """
        model = self._catalog.read().models.get(lora_model_id)
        known = model is not None and model.base == llm_config.model_id
        if model is None or not known or not (Path(model.path) / "adapter_config.json").is_file():
            raise HTTPException(404, f"there is no adapter '{lora_model_id}' for '{llm_config.model_id}'")
        return DiskMultiplexConfig(
            model_id=lora_model_id, max_total_tokens=None, local_path=model.path, lora_assigned_int_id=next(self._ids)
        )


class CpuEngine(VLLMEngine):  # type: ignore[misc]
    """Runs the model in vLLM's engine process, not in one more beside it.

    The extra process serves to bind OpenMP threads to cores, which Tenure turns off; without it a start takes about
    10 s and 0.7 GB less. Ray allows no such choice on CPU, so this sets it on the finished configuration.
    """

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        vllm_engine_config.parallel_config.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class GpuEngine(VLLMEngine):  # type: ignore[misc]
    """Runs the model of one GPU in vLLM's engine process, as vLLM's own server does.

    Ray would run it in an actor of its own and call that at every step, which also rules out vLLM's scheduling ahead.
    """

    def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
        if vllm_engine_config.parallel_config.world_size == 1:
            vllm_engine_args.distributed_executor_backend = "uni"
            vllm_engine_config = vllm_engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)


class AdapterServer(LLMServer):  # type: ignore[misc]
    """An engine whose adapters come from the folders named in the catalog."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        catalog = CatalogFile(Path(llm_config.experimental_configs[CATALOG_KEY]))
        loader: Any = partial(FolderLoader, catalog)
        engine = CpuEngine if isinstance(llm_config.accelerator_config, CPUConfig) else GpuEngine
        await super().__init__(llm_config, model_downloader=loader, engine_cls=engine, **kwargs)

    async def start(self) -> None:
        """Start the engine and its server, without the usage report that Ray makes at this point."""
        self.engine = self._engine_cls(self._llm_config)
        await self.engine.start()
        app = await self.engine.build_asgi_app()
        self.engine._oai_models = app.state.openai_serving_models  # Ray 2.58 gives its app another list of adapters
        self._leases = Leases()
        self._loading = asyncio.Lock()
        host = node_address()
        app.state.server, port = await listen(self._leases.guard(app), Listen(host, 0))
        self._url = f"http://{host}:{port}"
        spare_the_collector()

    async def lease(self, ticket: str) -> AsyncIterator[str]:
        """The address of this engine's server, for one request with this ticket; lasts until that is over."""
        async with self._loading:  # vLLM refuses an adapter that is asked for again while it is loaded
            await self._maybe_resolve_lora_from_multiplex()
        async for url in self._leases.grant(ticket, self._url):
            yield url

    async def metrics(self) -> str:
        """vLLM's own metrics of this replica, in Prometheus' text format."""
        lines = generate_latest().decode().splitlines()
        return "\n".join(line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ")[:5] == "vllm:")


class Front:
    """The gate and what is behind it: listens by itself, or is asked through Ray's proxy where `listen_at` is None."""

    async def __init__(self, handles: dict[str, Any], access: Access, listen_at: Listen | None) -> None:  # type: ignore[misc]
        catalog = CatalogFile(ServingFolder(access.folder).catalog)
        self._gate = Gate(Engines(handles, catalog), access)
        if listen_at is not None:
            self._server, _ = await listen(self._gate, listen_at)
        spare_the_collector()

    async def __serve_build_asgi_app__(self) -> Gate:
        return self._gate


def spare_the_collector() -> None:
    """What is there by now stays: the garbage collector need not look at it again, as in vLLM's own server.

    Importing Ray and vLLM leaves hundreds of thousands of objects; going through them stops every stream meanwhile.
    """
    gc.collect()
    gc.freeze()


def node_address() -> str:
    """Where an engine listens for its gate: the loopback, or on a cluster of several nodes this node's address."""
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return "127.0.0.1" if alone else str(ray.util.get_node_ip_address())


class LocalFiles(CallbackBase):  # type: ignore[misc]
    """Skips Ray's download step: the models are local, and its extra process costs seconds at every start."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
