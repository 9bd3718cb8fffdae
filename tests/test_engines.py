"""From the gate to engines over HTTP: fake engines on real sockets, leased by a stand-in for Ray's handles."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from fake_engine import MODELS, FakeEngine, chat

from serving import channels
from serving.catalog import Alias, Catalog, CatalogFile
from serving.engines import Engines
from serving.files import ServingFolder
from serving.gate import Gate
from serving.keys import KeyStore
from serving.listening import Lease, Leases, Listen, listen
from serving.spec import Access
from serving.wire import EngineGoneError, Wires


class ActorDiedError(Exception):
    """As Ray's looks by its name."""


class Replica:
    """A fake engine behind a server of its own."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.leases = Leases()
        self.alive = True
        self.granted = 0

    async def start(self) -> Replica:
        self.server, port = await listen(self.leases.guard(self.engine.app), Listen("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{port}"
        return self

    def kill(self) -> None:
        """As SIGKILL does: every connection breaks, and nobody listens."""
        self.alive = False
        for server in self.server.servers:
            server.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()


class Answer:
    """What Ray gives for a call that streams."""

    def __init__(self, replica: Replica, ticket: str) -> None:
        self._items = self._grant(replica, ticket)

    async def _grant(self, replica: Replica, ticket: str) -> AsyncIterator[str]:
        if not replica.alive:
            raise ActorDiedError("the actor died")
        replica.granted += 1
        async for url in replica.leases.grant(ticket, replica.url):
            yield url

    def __aiter__(self) -> AsyncIterator[str]:
        return self._items

    def cancel(self) -> None:
        """Nothing is left of a call that failed."""


class Handle:
    """Chooses by turns among the replicas, of which it takes a moment to learn that one died."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self.turn = 0
        self.model = ""

    def options(self, **more: Any) -> Handle:
        return self

    @property
    def lease(self) -> Handle:
        return self

    def remote(self, ticket: str) -> Answer:
        self.turn += 1
        return Answer(self.replicas[self.turn % len(self.replicas)], ticket)


class Served:
    """A gate that listens, over replicas that do."""

    def __init__(self, folder: Path, replicas: int) -> None:
        self.folder = ServingFolder(folder)
        alias = Alias(name="production", current="tuned-1")
        CatalogFile(self.folder.catalog).write(Catalog(models=MODELS, aliases={"production": alias}))
        _, self.admin = KeyStore(self.folder.keys).create("root", ("models", "admin"))
        self.replicas = [Replica() for _ in range(replicas)]

    async def __aenter__(self) -> httpx.AsyncClient:
        for replica in self.replicas:
            await replica.start()
        engines = Engines({"base": Handle(self.replicas)}, CatalogFile(self.folder.catalog))
        self.server, port = await listen(Gate(engines, Access(folder=self.folder.path)), Listen("127.0.0.1", 0))
        headers = {"authorization": f"Bearer {self.admin}"}
        url, limits = f"http://127.0.0.1:{port}", httpx.Limits(max_connections=64)
        self.client = httpx.AsyncClient(base_url=url, headers=headers, timeout=30, limits=limits, trust_env=False)
        return self.client

    async def __aexit__(self, *_: Any) -> None:
        await self.client.aclose()
        for server in (self.server, *(replica.server for replica in self.replicas)):
            server.should_exit = True
            server.force_exit = True


CHAT = "/v1/chat/completions"


def test_an_engine_answers_those_with_a_ticket_alone(tmp_path: Path) -> None:
    async def body() -> None:
        served = Served(tmp_path, 1)
        async with served as client:
            assert (await client.post(CHAT, json=chat("hello"))).status_code == 200
            replica = served.replicas[0]
            async with httpx.AsyncClient(base_url=replica.url, trust_env=False) as other:
                for headers in ({}, {"x-tenure-ticket": ""}, {"x-tenure-ticket": "guessed"}):
                    assert (await other.post(CHAT, json=chat("hello"), headers=headers)).status_code == 403
            assert len(replica.engine.asked) == 1

    asyncio.run(body())


def test_a_lease_is_used_again_until_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        served = Served(tmp_path, 1)
        async with served as client:
            for _ in range(5):
                assert (await client.post(CHAT, json=chat("hello"))).status_code == 200
            assert served.replicas[0].granted == 1
            monkeypatch.setattr(channels, "LIFE_S", 0.0)
            assert (await client.post(CHAT, json=chat("hello"))).status_code == 200
            assert served.replicas[0].granted == 2

    asyncio.run(body())


def test_a_lease_that_the_replica_ended_is_taken_anew(tmp_path: Path) -> None:
    async def body() -> None:
        served = Served(tmp_path, 1)
        async with served as client:
            assert (await client.post(CHAT, json=chat("hello"))).status_code == 200
            served.replicas[0].leases._held.clear()
            assert (await client.post(CHAT, json=chat("hello"))).status_code == 200

    asyncio.run(body())


def test_a_client_that_leaves_stops_its_engine_within_a_token_or_two(tmp_path: Path) -> None:
    async def body() -> None:
        served = Served(tmp_path, 1)
        async with served as client:
            engine = served.replicas[0].engine
            asked = chat("slowly " + "word " * 200, stream=True)
            async with client.stream("POST", CHAT, json=asked) as reply:
                await anext(aiter(reply.aiter_bytes()))
                assert engine.running == 1
            for _ in range(100):
                if not engine.running:
                    break
                await asyncio.sleep(0.02)
            assert (engine.running, engine.stopped) == (0, 1)

    asyncio.run(body())


def test_a_stream_passes_byte_for_byte_on_the_loop_of_rays_replicas(tmp_path: Path) -> None:
    said = 'a "usage":{} "error" [DONE] \u20ac word'

    async def body() -> list[str]:
        served = Served(tmp_path, 1)
        async with served as client:
            url = f"{served.replicas[0].url}{CHAT}"
            asked = chat(said, stream=True, stream_options={"include_usage": True})
            through = (await client.post(CHAT, json=asked)).text
            served.replicas[0].leases._held["known"] = Lease()
            bare = (await client.post(url, json=asked, headers={"x-tenure-ticket": "known"})).text
        return [through, bare]

    through, bare = uvloop.run(body())
    assert through == bare
    assert through.count("data: ") == len(said.split(" ")) + 3


def test_an_answer_larger_than_what_is_read_ahead_arrives_whole(tmp_path: Path) -> None:
    said = "long " * 200_000

    async def body() -> str:
        async with Served(tmp_path, 1) as client:
            reply = await client.post(CHAT, json=chat(said))
        return str(reply.json()["choices"][0]["message"]["content"])

    assert asyncio.run(body()) == said


def test_connections_to_an_engine_are_used_again_unless_an_answer_was_left(tmp_path: Path) -> None:
    async def body() -> tuple[int, int]:
        served = Served(tmp_path, 1)
        async with served as client:
            for _ in range(3):
                assert (await client.post(CHAT, json=chat("a b", stream=True))).status_code == 200
            known = served.replicas[0].server.server_state.connections
            first = len(known)
            async with client.stream("POST", CHAT, json=chat("slowly " + "word " * 200, stream=True)) as reply:
                await anext(aiter(reply.aiter_bytes()))
            while known:
                await asyncio.sleep(0.01)
            assert (await client.post(CHAT, json=chat("a b"))).status_code == 200
            return first, len(known)

    assert asyncio.run(body()) == (1, 1)


@pytest.mark.parametrize("said", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"])
def test_an_engine_that_answers_in_part_or_in_no_http_is_gone(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    async def body() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, Wires().ask(f"http://127.0.0.1:{port}", CHAT, {}, b"{}") as wire:
            while await wire.piece():
                pass

    with pytest.raises(EngineGoneError):
        asyncio.run(body())


def test_what_has_begun_to_stream_ends_with_an_error_where_its_replica_dies(tmp_path: Path) -> None:
    async def body() -> None:
        served = Served(tmp_path, 1)
        async with served as client, client.stream("POST", CHAT, json=chat("slowly a b c", stream=True)) as reply:
            pieces = aiter(reply.aiter_text())
            first = await anext(pieces)
            served.replicas[0].kill()
            rest = "".join([piece async for piece in pieces])
        assert "slowly" in first
        assert '"code": "unavailable"' in rest

    asyncio.run(body())


def test_no_request_fails_while_a_release_rolls_out_a_replica_dies_and_the_release_goes_back(tmp_path: Path) -> None:
    async def body() -> Counter[str]:
        served, seen, left = Served(tmp_path, 2), Counter[str](), iter(range(300))
        async with served as client:

            async def work() -> None:
                for number in left:
                    stream = bool(number % 2)
                    reply = await client.post(CHAT, json=chat(f"slowly {number}", "production", stream=stream))
                    whole = reply.status_code == 200 and "error" not in reply.text
                    seen["answered" if whole else f"{reply.status_code} {reply.text[-200:]}"] += 1

            async def happen() -> None:
                steps = [{"share": 0.5, "seconds": 0, "requests": 20}, {"share": 1.0, "seconds": 0, "requests": 0}]
                rollout = {"alias": "production", "model": "tuned-2", "steps": steps, "watch": {"max_slowdown": 100}}
                assert (await client.post("/admin/rollouts", json=rollout)).status_code == 200
                while seen["answered"] < 100:
                    await asyncio.sleep(0.01)
                served.replicas[1].kill()
                while seen["answered"] < 200:
                    await asyncio.sleep(0.01)
                assert (await client.post("/admin/rollback", json={"alias": "production"})).status_code == 200

            await asyncio.gather(happen(), *(work() for _ in range(32)))
            seen["on the candidate"] = sum(
                asked["model"] == "tuned-2" for replica in served.replicas for asked in replica.engine.asked
            )
        return seen

    seen = asyncio.run(body())
    # What streamed on the killed replica cannot be asked again; everything else is answered.
    broken = sum(count for what, count in seen.items() if "unavailable" in what)
    assert seen["answered"] + broken == 300, seen
    assert broken <= 32
    assert seen["on the candidate"] >= 20
