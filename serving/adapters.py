"""What runs inside Ray's replicas: the gated ingress, and engines that read adapters from local or NFS folders.

Ray loads adapters from cloud addresses only and names them `base:adapter`. Both are replaced here through the
constructor arguments that `ray.serve.llm` offers for it; importing this module imports vLLM (about 10 s).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from prometheus_client import generate_latest
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.accelerators import CPUConfig
from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig
from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest
from ray.llm._internal.serve.core.ingress.ingress import make_fastapi_ingress
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request
from ray.llm._internal.serve.core.protocol import RawRequestInfo
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress
from starlette.responses import Response

from serving.catalog import CatalogFile
from serving.gate import Gate
from serving.refusals import UNAVAILABLE
from serving.spec import Access

CATALOG_KEY = "tenure_catalog"
TRIES = 8
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0


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


class AdapterServer(LLMServer):  # type: ignore[misc]
    """An engine whose adapters come from the folders named in the catalog."""

    async def __init__(self, llm_config: LLMConfig, **kwargs: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        catalog = CatalogFile(Path(llm_config.experimental_configs[CATALOG_KEY]))
        loader: Any = partial(FolderLoader, catalog)
        engine = CpuEngine if isinstance(llm_config.accelerator_config, CPUConfig) else None
        await super().__init__(llm_config, model_downloader=loader, engine_cls=engine, **kwargs)

    async def start(self) -> None:
        """Start the engine, without the usage report that Ray makes at this point through an actor of its own."""
        self.engine = self._engine_cls(self._llm_config)
        await self.engine.start()

    async def metrics(self) -> str:
        """vLLM's own metrics of this replica, in Prometheus' text format."""
        lines = generate_latest().decode().splitlines()
        return "\n".join(line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ")[:5] == "vllm:")

    def _batch_output_stream(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
        return as_they_come(generator)


async def as_they_come(generator: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
    """What a stream gave since the last was taken. Ray waits 50 ms instead, which the first token would bear, too."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    end = object()

    async def read() -> None:
        try:
            async for item in generator:
                queue.put_nowait(item)
        finally:
            queue.put_nowait(end)

    reader = asyncio.ensure_future(read())
    try:
        while True:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            if items[-1] is end:
                if items[:-1]:
                    yield items[:-1]
                await reader
                return
            yield items
    finally:
        reader.cancel()


class NamedIngress(OpenAiIngress):  # type: ignore[misc]
    """Routes the catalog's names to the engines; an adapter's goes to the engine of its base."""

    def __init__(
        self, llm_deployments: dict[str, DeploymentHandle[Any]], model_cards: dict[str, Any], folder: str
    ) -> None:
        """`folder` holds the catalog."""
        super().__init__(llm_deployments, model_cards)
        self._catalog = CatalogFile(Path(folder))

    async def _get_model_id(self, model: str | None) -> str:
        return model or ""  # the gate has looked it up

    def _get_configured_serve_handle(self, model_id: str) -> DeploymentHandle[Any]:
        if model_id not in self._configured_serve_handles:
            self._configured_serve_handles[model_id] = self._new_handle(model_id)
        return self._configured_serve_handles[model_id]

    def _new_handle(self, model_id: str) -> DeploymentHandle[Any]:
        model = self._catalog.read().models.get(model_id)
        if model is None:
            raise HTTPException(404, f"the model '{model_id}' does not exist")
        if model.application is not None:
            return serve.get_app_handle(model.application).options(stream=True)
        if model.base is None:
            return self._default_serve_handles[model.name].options(stream=True)
        return self._default_serve_handles[model.base].options(stream=True, multiplexed_model_id=model.name)

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncIterator[Any]:
        """The engine's answer. Where a replica dies before anything came of it, another is asked."""
        if isinstance(body, ChatCompletionRequest):
            body = _sanitize_chat_completion_request(body)
        info = RawRequestInfo.from_starlette_request(raw_request) if raw_request is not None else None
        method = getattr(self._get_configured_serve_handle(body.model), call_method)
        for number in range(TRIES):
            begun = False
            try:
                async for item in until_left(method.remote(body, info), bool(getattr(body, "stream", False))):
                    begun = True
                    yield item
                return
            except Exception as error:
                if begun or number + 1 == TRIES or not _is_gone(error):
                    raise
            await asyncio.sleep(min(_FIRST_WAIT_S * 2**number, _LONGEST_WAIT_S))

    async def engine_metrics(self) -> Response:
        """The metrics of one replica of every engine."""
        texts = await asyncio.gather(*(handle.metrics.remote() for handle in self._default_serve_handles.values()))
        lines = dict.fromkeys(line for text in texts for line in text.splitlines())
        return Response("\n".join([*lines, ""]), media_type="text/plain")

    async def engine_health(self) -> dict[str, str]:
        """Whether every engine says that it is well."""
        await asyncio.gather(*(handle.check_health.remote() for handle in self._default_serve_handles.values()))
        return {"status": "ok"}


async def until_left(answer: Any, streams: bool) -> AsyncIterator[Any]:
    """What an engine answers; the engine stops when nobody takes it any more.

    Ray takes the one item of an answer that does not stream and drops the iterator, which then is no reason to stop.
    """
    try:
        async for item in answer:
            yield item
    except asyncio.CancelledError:
        answer.cancel()
        raise
    except GeneratorExit:
        if streams:
            answer.cancel()
        raise


def _is_gone(error: BaseException) -> bool:
    return any(kind.__name__ in UNAVAILABLE for kind in type(error).__mro__)


_ROUTES: Mapping[str, Any] = {
    "completions": lambda app: app.post("/v1/completions"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "tokenize": lambda app: app.post("/tokenize"),
    "detokenize": lambda app: app.post("/detokenize"),
    "engine_metrics": lambda app: app.get("/engines/metrics"),
    "engine_health": lambda app: app.get("/engines/health"),
}


def gated_ingress(access: Access) -> type:
    """The ingress' class with the gate around its app; unlike Ray's own, no page elsewhere may call it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, access=access)
    made: type = make_fastapi_ingress(NamedIngress, endpoint_map=dict(_ROUTES), app=app)
    return made


class LocalFiles(CallbackBase):  # type: ignore[misc]
    """Skips Ray's download step: the models are local, and its extra process costs seconds at every start."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
