"""The gate over a fake engine: errors in OpenAI's form, keys, limits, fairness, streams, logs and metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Endpoint, chat
from tiny import make_tiny_adapter

from serving.audit import read_acts
from serving.canary import read_items
from serving.catalog import Served
from serving.keys import Quota
from serving.queueing import FairQueue
from serving.refusals import Refusal
from serving.spec import Limits
from training.errors import TenureError

CHAT = "/v1/chat/completions"


def run(body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(body())


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)


def ask(
    endpoint: Endpoint, request: Any, key: str | None = "admin", path: str = CHAT, **headers: str
) -> httpx.Response:
    async def body() -> httpx.Response:
        async with endpoint.client(endpoint.admin if key == "admin" else key, **headers) as client:
            if isinstance(request, bytes):
                return await client.post(path, content=request)
            return await client.post(path, json=request)

    found: httpx.Response = run(body)
    return found


def get(endpoint: Endpoint, path: str, key: str | None = "admin", **headers: str) -> httpx.Response:
    async def body() -> httpx.Response:
        async with endpoint.client(endpoint.admin if key == "admin" else key, **headers) as client:
            return await client.get(path)

    found: httpx.Response = run(body)
    return found


def test_a_request_passes_and_is_logged_without_its_words(endpoint: Endpoint) -> None:
    reply = ask(endpoint, chat("hello there"))
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "hello there"
    assert reply.headers["x-request-id"].startswith("req-")
    (line,) = [json.loads(text) for text in endpoint.folder.requests.read_text().splitlines()]
    assert (line["status"], line["model"], line["completion_tokens"]) == (200, "base", 2)
    assert line["id"] == reply.headers["x-request-id"]
    assert "hello" not in endpoint.folder.requests.read_text()
    assert endpoint.admin not in endpoint.folder.requests.read_text()


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"model": "base", "temperature": NaN}', 400, "invalid_json"),
        (chat("hi", n=129), 400, "invalid_value"),
        (chat("hi", n="many"), 400, "invalid_value"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"\xff\xfe\x00", 400, "invalid_json"),
        ({"messages": []}, 400, "missing_required_parameter"),
        (chat("hi", model="nobody"), 404, "model_not_found"),
        (chat("hi", model="../../etc/passwd"), 404, "model_not_found"),
        ({**chat("hi"), "model": 3}, 400, "invalid_type"),
        (chat("too long"), 400, "context_length_exceeded"),
        (chat("detail"), 400, "invalid_value"),
        (chat("bug"), 500, "internal_error"),
        (chat("die"), 503, "unavailable"),
        (b"x" * 5_000_000, 413, "request_too_large"),
    ],
)
def test_errors_have_openais_form_and_the_right_status(
    endpoint: Endpoint, request_: Any, status: int, code: str
) -> None:
    reply = ask(endpoint, request_)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    assert "x-request-id" in reply.headers
    assert ("retry-after" in reply.headers) == (status == 503)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/engines/metrics", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/../keys.db", 404),
        ("OPTIONS", CHAT, 405),
    ],
)
def test_other_paths_and_methods_are_refused(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    async def body() -> httpx.Response:
        async with endpoint.client(endpoint.admin) as client:
            return await client.request(method, path)

    reply = run(body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    assert "access-control-allow-origin" not in reply.headers


def make_key(endpoint: Endpoint, **how: Any) -> str:
    _, secret = endpoint.keys.create("k", **how)
    return secret


def credentials(endpoint: Endpoint) -> dict[str, dict[str, str]]:
    """Fifty headers that must not open anything."""
    good = make_key(endpoint)
    key_id = good.split("-")[1]
    revoked = make_key(endpoint)
    endpoint.keys.revoke(revoked.split("-")[1])
    expired = make_key(endpoint, lasts_s=-1.0)
    stored = {key.id: key for key in endpoint.keys.all()}[key_id]
    row = endpoint.folder.keys.read_bytes()
    bearer = {
        "nothing": "",
        "revoked": revoked,
        "expired": expired,
        "id alone": key_id,
        "id and prefix": f"tnr-{key_id}",
        "id and empty secret": f"tnr-{key_id}-",
        "other secret": f"tnr-{key_id}-{'A' * 43}",
        "shorter": good[:-1],
        "longer": good + "A",
        "other case": good.swapcase(),
        "upper prefix": good.replace("tnr", "TNR"),
        "secret of another key": f"tnr-{key_id}-{endpoint.admin.split('-', 2)[2]}",
        "unknown id": f"tnr-000000000000-{good.split('-', 2)[2]}",
        "name of the key": stored.name,
        "wildcard id": f"tnr-%-{good.split('-', 2)[2]}",
        "sql": "tnr-' OR 1=1 --",
        "sql union": "tnr-x' UNION SELECT * FROM keys --",
        "none": "none",
        "null": "null",
        "zero byte": f"{good}%00",
        "line break": f"{good}%0d%0ax: y",
        "space inside": good.replace("-", " "),
        "two keys": f"{revoked},{good}",
        "quoted": f'"{good}"',
        "hash": "".join(chr(byte) for byte in row if 48 <= byte < 103)[:64],
        "openai": "sk-proj-abcdefghijklmnopqrstuvwxyz",
        "huge": "A" * 8000,
        "jwt none": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
        "admin": "admin",
        "tenure": "tenure",
        "star": "*",
        "dots": "../../keys.db",
        "reversed": good[::-1],
        "base64": "dG5yLXNlY3JldA==",
        "padded": f"A{good}",
        "slash": f"/{good}",
        "unicode": "tnr-é-ü",
    }
    found = {name: {"authorization": f"Bearer {secret}"} for name, secret in bearer.items()}
    found |= {
        "no header": {},
        "no scheme": {"authorization": good},
        "basic": {"authorization": f"Basic {good}"},
        "token scheme": {"authorization": f"Token {good}"},
        "scheme twice": {"authorization": f"Bearer Bearer {good}"},
        "x-api-key": {"x-api-key": good},
        "api-key": {"api-key": good},
        "cookie": {"cookie": f"key={good}"},
        "proxy": {"proxy-authorization": f"Bearer {good}"},
        "forwarded for": {"x-forwarded-for": "127.0.0.1"},
        "real ip": {"x-real-ip": "127.0.0.1"},
        "forwarded host": {"x-forwarded-host": "127.0.0.1"},
        "original url": {"x-original-url": "/health"},
        "rewrite url": {"x-rewrite-url": "/health"},
        "method override": {"x-http-method-override": "GET"},
        "model id": {"serve_multiplexed_model_id": "tuned-1"},
    }
    return found


def test_fifty_ways_in_without_a_key_all_fail(endpoint: Endpoint) -> None:
    ways = credentials(endpoint)
    assert len(ways) >= 50

    async def body() -> None:
        async with endpoint.client() as client:
            for name, given in ways.items():
                headers = {header: value.encode("latin-1") for header, value in given.items()}
                for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/usage")):
                    reply = await client.request(method, path, headers=headers, json=chat("hi"))
                    assert reply.status_code == 401, (name, path, reply.text)
                    assert reply.headers["www-authenticate"] == "Bearer"

    run(body)
    assert endpoint.engine.asked == []


def test_another_keys_rights_are_not_lent(endpoint: Endpoint) -> None:
    narrow = make_key(endpoint, models=("tuned-*",))
    admin_only = make_key(endpoint, scopes=("admin",))
    assert ask(endpoint, chat("hi", model="tuned-1"), narrow).status_code == 200
    assert ask(endpoint, chat("hi", model="base"), narrow).status_code == 403
    assert ask(endpoint, chat("hi", model="production"), narrow).status_code == 403
    assert ask(endpoint, chat("hi"), admin_only).status_code == 200
    assert [model["id"] for model in get(endpoint, "/v1/models", narrow).json()["data"]] == ["tuned-1", "tuned-2"]
    assert get(endpoint, "/v1/models/base", narrow).status_code == 403
    for path in ("/admin/models", "/admin/rollouts", "/admin/rollback"):
        assert ask(endpoint, {}, narrow, path).status_code == 403
    assert get(endpoint, "/admin/keys", narrow).status_code == 403
    assert get(endpoint, "/metrics", narrow).status_code == 403
    ask(endpoint, chat("hi"))
    assert {use["key"] for use in get(endpoint, "/usage", narrow).json()["usage"]} == {narrow.split("-")[1]}


def test_models_are_open_on_the_loopback_until_there_is_a_key(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    endpoint.keys.revoke(endpoint.admin.split("-")[1])
    assert ask(endpoint, chat("hi"), None).status_code == 200
    assert ask(endpoint, {}, None, "/admin/rollback").status_code == 401
    rebound = ask(endpoint, chat("hi"), None, host="evil.test")
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "unknown_host")
    endpoint.keys.create("first")
    assert ask(endpoint, chat("hi"), None).status_code == 401


@pytest.mark.parametrize("access", [{"keys": "required"}, {"host": "0.0.0.0"}])
def test_elsewhere_there_is_no_way_in_without_keys(tmp_path: Path, access: dict[str, Any]) -> None:
    endpoint = Endpoint(tmp_path, **access)
    endpoint.keys.revoke(endpoint.admin.split("-")[1])
    assert ask(endpoint, chat("hi"), None).status_code == 401


def test_another_page_may_not_call(endpoint: Endpoint) -> None:
    reply = ask(endpoint, chat("hi"), origin="https://evil.test")
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "cross_origin")
    assert ask(endpoint, chat("hi"), origin="http://127.0.0.1:8000").status_code == 200


def test_secrets_are_stored_hashed_and_readable_by_the_owner_alone(endpoint: Endpoint) -> None:
    secret = make_key(endpoint)
    everything = b"".join(path.read_bytes() for path in endpoint.folder.path.iterdir() if path.is_file())
    assert secret.encode() not in everything
    assert secret.split("-", 2)[2].encode() not in everything
    assert endpoint.folder.keys.stat().st_mode & 0o077 == 0


def test_requests_and_tokens_are_limited_by_key(endpoint: Endpoint) -> None:
    one = make_key(endpoint, quota=Quota(requests_per_minute=2))
    two = make_key(endpoint, quota=Quota(tokens_per_minute=10))
    three = make_key(endpoint, quota=Quota(tokens_per_day=5))
    statuses = [ask(endpoint, chat("hi"), one).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    spent = ask(endpoint, chat("hi"), one)
    assert 1 <= int(spent.headers["retry-after"]) <= 61
    assert spent.json()["error"]["code"] == "rate_limit_exceeded"
    for key in (two, three):
        assert [ask(endpoint, chat("a b c d"), key).status_code for _ in range(2)] == [200, 429]
    assert ask(endpoint, chat("hi")).status_code == 200


def test_limits_of_the_endpoint_hold_for_keys_without_their_own(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, limits=Limits(requests_per_minute=1))
    own = make_key(endpoint, quota=Quota(requests_per_minute=5))
    assert [ask(endpoint, chat("hi")).status_code for _ in range(2)] == [200, 429]
    assert ask(endpoint, chat("hi"), own).headers["x-ratelimit-remaining-requests"] == "4"


def test_a_stream_is_passed_on_and_usage_told_only_where_asked(endpoint: Endpoint) -> None:
    plain = ask(endpoint, chat("one two three", stream=True))
    assert plain.headers["content-type"].startswith("text/event-stream")
    assert plain.text.count("data: {") == 4
    assert '"usage"' not in plain.text
    assert plain.text.endswith("data: [DONE]\n\n")
    asked = ask(endpoint, chat("one two three", stream=True, stream_options={"include_usage": True}))
    assert '"completion_tokens":3' in asked.text
    lines = [json.loads(text) for text in endpoint.folder.requests.read_text().splitlines()]
    assert [line["completion_tokens"] for line in lines] == [3, 3]


def test_an_engine_that_breaks_midway_ends_the_stream_with_an_error(endpoint: Endpoint) -> None:
    reply = ask(endpoint, chat("one break two", stream=True))
    last = json.loads(reply.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "internal_error"
    assert "engine broke" not in reply.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_generation(endpoint: Endpoint, stream: bool) -> None:
    body = json.dumps(chat("slowly " + "word " * 100, stream=stream)).encode()

    async def leave() -> float:
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            return None

        headers = [(b"authorization", f"Bearer {endpoint.admin}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        scope |= {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 8000), "root_path": ""}
        call = asyncio.ensure_future(endpoint.gate(scope, receive, send))
        await asyncio.sleep(0.2)
        assert endpoint.engine.running == 1
        left.set()
        began = asyncio.get_running_loop().time()
        await call
        return asyncio.get_running_loop().time() - began

    assert run(leave) < 0.2
    assert (endpoint.engine.running, endpoint.engine.stopped) == (0, 1)
    assert json.loads(endpoint.folder.requests.read_text())["code"] == "client_left"


def test_an_answer_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, limits=Limits(request_timeout_s=0.1))
    reply = ask(endpoint, chat("slowly does it"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert endpoint.engine.running == 0


def test_concurrency_is_bounded_and_the_overflow_told_to_come_back(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, limits=Limits(max_running=2, max_waiting=2, max_wait_s=5.0))

    async def body() -> list[httpx.Response]:
        async with endpoint.client(endpoint.admin) as client:
            return await asyncio.gather(*(client.post(CHAT, json=chat("slowly")) for _ in range(6)))

    replies = run(body)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 200, 200, 429, 429]
    assert endpoint.engine.peak == 2
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 429)


def test_the_queue_is_fair_over_keys_and_gives_up_in_time() -> None:
    order: list[str] = []

    async def one(queue: FairQueue, key: str) -> None:
        async with queue.turn(key):
            order.append(key)
            await asyncio.sleep(0)

    async def body() -> None:
        queue = FairQueue(1, 100, 5.0)
        async with queue.turn("x"):
            tasks = [asyncio.ensure_future(one(queue, key)) for key in ("a", "a", "a", "a", "b", "c", "b")]
            await asyncio.sleep(0.01)
            assert queue.waiting == 7
        await asyncio.gather(*tasks)
        short = FairQueue(1, 100, 0.05)
        async with short.turn("x"):
            with pytest.raises(Refusal, match="no slot"):
                await short._enter("y")
        assert (short.waiting, short._free) == (0, 1)

    run(body)
    assert order == ["a", "b", "c", "a", "b", "a", "a"]


def test_metrics_name_models_and_keys_but_nothing_that_clients_invent(endpoint: Endpoint) -> None:
    ask(endpoint, chat("one two"))
    ask(endpoint, chat("hi", model="invented-by-a-client"))
    text = get(endpoint, "/metrics").text
    key = endpoint.admin.split("-")[1]
    assert f'tenure_completion_tokens_total{{key="{key}",model="base"}} 2.0' in text
    assert "tenure_time_to_first_token_seconds_bucket" in text
    assert "invented" not in text
    assert "engine_metric 1" in text


def test_probes_need_no_key(endpoint: Endpoint) -> None:
    assert get(endpoint, "/health", None).json() == {"status": "ok"}
    assert get(endpoint, "/ready", None).status_code == 200


def act(endpoint: Endpoint, path: str, asked: dict[str, Any]) -> httpx.Response:
    return ask(endpoint, asked, path=path)


def test_a_rollout_shares_requests_out_and_takes_over(endpoint: Endpoint) -> None:
    steps = [{"share": 0.5, "seconds": 0, "requests": 5}, {"share": 1.0, "seconds": 0, "requests": 5}]
    asked = {"alias": "production", "model": "tuned-2", "steps": steps}
    assert act(endpoint, "/admin/rollouts", asked).json()["rollout"]["state"] == "rolling"
    assert act(endpoint, "/admin/rollouts", asked).status_code == 409
    for _ in range(60):
        assert ask(endpoint, chat("hi", model="production")).status_code == 200
    alias = endpoint.gate.catalog.read().aliases["production"]
    assert (alias.current, alias.previous, alias.rollout.state) == ("tuned-2", ("tuned-1",), "done")
    targets = [request["model"] for request in endpoint.engine.asked]
    assert {"tuned-1", "tuned-2"} == set(targets)
    assert set(targets[-5:]) == {"tuned-2"}
    back = act(endpoint, "/admin/rollback", {"alias": "production", "reason": "worse"})
    assert back.json()["current"] == "tuned-1"
    acts = [line["act"] for line in read_acts(endpoint.folder.audit)]
    assert acts == ["rollout started", "rollout advanced", "rollout advanced", "rolled back"]


def test_errors_of_a_candidate_roll_it_back(endpoint: Endpoint) -> None:
    endpoint.engine.broken.add("tuned-2")
    steps = [{"share": 0.9, "seconds": 60, "requests": 5}]
    asked = {"alias": "production", "model": "tuned-2", "steps": steps, "watch": {"min_requests": 5}}
    act(endpoint, "/admin/rollouts", asked)
    for _ in range(30):
        ask(endpoint, chat("hi", model="production"))
    alias = endpoint.gate.catalog.read().aliases["production"]
    assert (alias.current, alias.rollout.state) == ("tuned-1", "rolled_back")
    assert "requests failed" in alias.rollout.reason
    assert ask(endpoint, chat("hi", model="production")).status_code == 200


@pytest.mark.parametrize("steps", [None, []])
def test_a_candidate_that_loses_on_the_canary_suite_gets_no_request(
    endpoint: Endpoint, steps: list[Any] | None
) -> None:
    endpoint.engine.broken.add("tuned-2")
    items = [{"prompt": "It is BLUE.", "answer": "blue"}, {"prompt": "It is red.", "answer": "green"}]
    asked = {"alias": "production", "model": "tuned-2", "canary": {"items": items, "max_loss": 0.4}}
    found = act(endpoint, "/admin/rollouts", asked | ({} if steps is None else {"steps": steps})).json()
    assert (found["current"], found["rollout"]["state"]) == ("tuned-1", "rolled_back")
    assert found["rollout"]["reason"] == "0 of 2 canary items are right, and 1 were with 'tuned-1'"
    assert [request["model"] for request in endpoint.engine.asked] == ["tuned-1"] * 2 + ["tuned-2"] * 2
    assert ask(endpoint, chat("hi", model="production")).json()["model"] == "tuned-1"
    assert [line["act"] for line in read_acts(endpoint.folder.audit)] == ["rollout rolled back"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_candidate_that_loses_no_more_than_it_may_rolls_out(endpoint: Endpoint, broken: bool) -> None:
    if broken:
        endpoint.engine.broken.add("tuned-2")
    canary = {"items": [{"prompt": "It is BLUE.", "answer": "blue"}], "max_loss": 1.0 if broken else 0.0}
    asked = {"alias": "production", "model": "tuned-2", "canary": canary}
    assert act(endpoint, "/admin/rollouts", asked).json()["rollout"]["state"] == "rolling"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}', "items.jsonl:1: this is no item of a canary suite (answer: Field required)"),
        ('{"prompt": "a", "answer": "b"}\nnothing', "items.jsonl:2: this is no item"),
        ("\n", "it has 0 items"),
        ('{"prompt": "a", "answer": "b"}\n' * 201, "it has 201 items"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_canary_suite_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "items.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TenureError) as caught:
        read_items(file)
    assert said in str(caught.value)


def test_a_slow_candidate_is_rolled_back_from_the_shadow_and_nobody_waits_for_it(endpoint: Endpoint) -> None:
    endpoint.engine.slow["tuned-2"] = 0.05
    asked = {"alias": "production", "model": "tuned-2", "shadow": 1.0, "watch": {"min_requests": 5}}
    act(endpoint, "/admin/rollouts", asked)

    async def body() -> None:
        async with endpoint.client(endpoint.admin) as client:
            for _ in range(8):
                reply = await client.post(CHAT, json=chat("hi", model="production"))
                assert reply.json()["model"] == "tuned-1"
            await asyncio.sleep(0.3)
            await client.post(CHAT, json=chat("hi", model="production"))

    run(body)
    alias = endpoint.gate.catalog.read().aliases["production"]
    assert alias.rollout.state == "rolled_back"
    assert "times as long" in alias.rollout.reason


@pytest.mark.parametrize(
    ("path", "asked", "status"),
    [
        ("/admin/rollouts", {"alias": "production", "model": "nobody"}, 404),
        ("/admin/rollouts", {"alias": "base", "model": "tuned-1"}, 409),
        ("/admin/rollouts", {"alias": "../x", "model": "tuned-1"}, 400),
        ("/admin/rollouts", {"alias": "production", "model": "tuned-1", "shadow": 7}, 400),
        ("/admin/rollouts", {"alias": "production", "model": "tuned-2", "canary": {"items": []}}, 400),
        ("/admin/rollback", {"alias": "nobody"}, 404),
        ("/admin/rollback", {"alias": "production"}, 409),
        ("/admin/models", {"model": {"name": "a:b", "path": "/x"}}, 400),
        ("/admin/models", {"model": {"name": "x", "path": "/x", "base": "other"}}, 400),
        ("/admin/models", {"model": {"name": "production", "path": "/x"}}, 409),
        ("/admin/models", {"model": {"name": "base", "path": "/y"}}, 409),
        ("/admin/models", {}, 400),
    ],
)
def test_what_administration_cannot_do_is_told(
    endpoint: Endpoint, path: str, asked: dict[str, Any], status: int
) -> None:
    reply = act(endpoint, path, asked)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


def test_an_adapter_joins_from_a_store_and_is_not_copied_twice(
    endpoint: Endpoint, tmp_path: Path, tiny_model: Path
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    made = make_tiny_adapter(tiny_model, tmp_path / "made", 1)
    store = MemoryFileSystem()
    for file in made.iterdir():
        store.pipe_file(f"/bucket/support/{file.name}", file.read_bytes())
    base = Served(name="tiny", path=str(tiny_model), max_rank=8)
    endpoint.gate.catalog.change(lambda catalog: catalog.with_model(base))
    asked = {"model": {"name": "support", "path": "memory://bucket/support", "base": "tiny"}}
    for _ in range(2):
        assert act(endpoint, "/admin/models", asked).json() == {"added": "support"}
    (copy,) = endpoint.folder.adapters.iterdir()
    found = endpoint.gate.catalog.read().models["support"]
    assert (found.path, found.source) == (str(copy), "memory://bucket/support")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == {
        file.name: file.read_bytes() for file in made.iterdir()
    }
    assert ask(endpoint, chat("hi", model="support")).status_code == 200
    other = {"model": {**asked["model"], "path": "memory://bucket/other"}}
    assert act(endpoint, "/admin/models", other).status_code == 409


@pytest.mark.parametrize(
    ("address", "files", "code"),
    [
        ("memory://nowhere/at-all", {}, "unreadable_address"),
        ("nostore://bucket/a", {}, "unreadable_address"),
        ("memory://bad/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "unfit_artifact"),
    ],
)
def test_what_a_store_lacks_or_holds_amiss_is_told_and_not_kept(
    endpoint: Endpoint, tiny_model: Path, address: str, files: dict[str, bytes], code: str
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    for name, content in files.items():
        MemoryFileSystem().pipe_file(f"{address.removeprefix('memory:/')}/{name}", content)
    base = Served(name="tiny", path=str(tiny_model), max_rank=8)
    endpoint.gate.catalog.change(lambda catalog: catalog.with_model(base))
    reply = act(endpoint, "/admin/models", {"model": {"name": "x", "path": address, "base": "tiny"}})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert not list(endpoint.folder.adapters.iterdir())
    assert "x" not in endpoint.gate.catalog.read().models


def test_no_request_fails_while_a_release_rolls_out_and_is_taken_back(endpoint: Endpoint) -> None:
    steps = [{"share": 0.3, "seconds": 0, "requests": 10}, {"share": 1.0, "seconds": 0, "requests": 10}]

    async def body() -> set[int]:
        async with endpoint.client(endpoint.admin) as client:
            left = iter(range(200))

            async def work() -> list[int]:
                request = chat("one two", model="production", stream=True)
                return [(await client.post(CHAT, json=request)).status_code for _ in left]

            async def govern() -> None:
                asked = {"alias": "production", "model": "tuned-2", "steps": steps}
                assert (await client.post("/admin/rollouts", json=asked)).status_code == 200
                while endpoint.gate.catalog.read().aliases["production"].current != "tuned-2":
                    await asyncio.sleep(0.01)
                assert (await client.post("/admin/rollback", json={"alias": "production"})).status_code == 200

            *answered, _ = await asyncio.gather(*(work() for _ in range(32)), govern())
            assert sum(map(len, answered)) == 200
            return {status for statuses in answered for status in statuses}

    assert run(body) == {200}
    assert endpoint.gate.catalog.read().aliases["production"].current == "tuned-1"
    assert {request["model"] for request in endpoint.engine.asked} == {"tuned-1", "tuned-2"}
