"""The playground in headless Chromium, over a gate and a fake engine; and what answers cost."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from fake_engine import MODELS, Endpoint, chat
from probing import free_port
from starlette.responses import HTMLResponse
from test_gate import CHAT, get
from test_report import CHROMIUM, CHROMIUM_FLAGS

from serving.catalog import Alias, Catalog, CatalogFile
from serving.cost import Meter
from serving.exchange import Receive, Scope, Send
from serving.page import playground

# The clock of the browser stands while it waits for an answer, so that it waits by asking.
DRIVE = """
const wait = async what => { while (!what()) await (await fetch('/health')).text() };
frame.onload = async () => {
  const page = frame.contentDocument, by = id => page.getElementById(id);
  await wait(() => page.querySelectorAll('select').length === 2);
  by('text').value = '<b>one</b> two three';
  by('form').requestSubmit();
  await wait(() => page.body.dataset.answered);
  const told = [...page.querySelectorAll('.assistant')].map(x => x.textContent).join('|');
  const notes = [...page.querySelectorAll('section > p.note')].map(x => x.textContent.includes('3 tokens')).join();
  const models = [...page.querySelectorAll('select')].map(x => x.value).join('|');
  const wide = page.documentElement.scrollWidth;
  document.title = [models, told, notes, page.querySelectorAll('b').length, wide,
    page.querySelector('dd.kept') !== null, by('usage').textContent.includes('price per million')].join(' ; ');
};
frame.src = '/';
"""


class Framed:
    """The gate, and a page of the same origin that drives the playground in a frame."""

    def __init__(self, endpoint: Endpoint, width: int) -> None:
        self.endpoint = endpoint
        self.page = HTMLResponse(
            f"<title>waiting</title><iframe id=frame width={width} height=800></iframe><script>{DRIVE}</script>"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/drive":
            await self.page(scope, receive, send)
        else:
            await self.endpoint.gate(scope, receive, send)


@pytest.fixture(params=[375, 1200])
def driven(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of the driving page, in a frame as wide as a telephone and as a desk's screen."""
    endpoint = Endpoint(tmp_path / "serving", price_per_hour=2.0)
    endpoint.keys.revoke(endpoint.admin.split("-")[1])
    models = {
        **MODELS,
        "tuned-1": MODELS["tuned-1"].model_copy(update={"card": {"contract": "kept", "run": "tuned-1"}}),
    }
    alias = Alias(name="production", current="tuned-1")
    CatalogFile(endpoint.folder.catalog).write(Catalog(models=models, aliases={"production": alias}))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Framed(endpoint, request.param), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/drive?{request.param}"
    server.should_exit = True
    thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_both_models_answer_side_by_side(driven: str, tmp_path: Path) -> None:
    flags = [
        *CHROMIUM_FLAGS,
        "--window-size=1400,900",
        "--virtual-time-budget=20000",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    command = [str(CHROMIUM), *flags, "--dump-dom", driven]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r"<title>([^<]*)</title>", done.stdout)
    assert found
    models, told, notes, bold, wide, kept, priced = found[1].replace("&lt;", "<").replace("&gt;", ">").split(" ; ")
    assert models == "base|production"
    assert told == "<b>one</b> two three|<b>one</b> two three"
    assert (notes, bold, kept, priced) == ("true,true", "0", "true", "true")
    assert int(wide) <= int(driven.rpartition("?")[2])


def test_the_page_asks_nobody_else(tmp_path: Path) -> None:
    page = playground().decode()
    assert re.findall(r"(?:https?:)?//[a-z]", page) == []
    assert "innerHTML" not in page
    reply = get(Endpoint(tmp_path), "/", None)
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"


def test_a_price_follows_from_busy_time_and_tokens() -> None:
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    assert meter.cost(3600.0).price_per_request is None
    for at, what in ((0, "begin"), (1, "begin"), (4, "end"), (5, "end"), (100, "begin"), (105, "end")):
        now[0] = float(at)
        meter.begin() if what == "begin" else meter.end(500)
    cost = meter.cost(3600.0)
    assert (cost.busy_seconds, cost.requests, cost.tokens) == (10.0, 3, 1500)
    assert cost.tokens_per_second == 150.0
    assert cost.price_per_request == pytest.approx(10 / 3)
    assert cost.price_per_million_tokens == pytest.approx(10 / 1500 * 1e6)
    assert meter.cost(None).price_per_million_tokens is None


def test_the_endpoint_tells_what_answers_cost(tmp_path: Path) -> None:
    import asyncio

    endpoint = Endpoint(tmp_path, price_per_hour=1.0)

    async def body() -> httpx.Response:
        async with endpoint.client(endpoint.admin) as client:
            await client.post(CHAT, json=chat("one two three"))
            return await client.get("/usage")

    cost = asyncio.run(body()).json()["cost"]
    assert cost["tokens"] == 10
    assert cost["price_per_million_tokens"] > 0
