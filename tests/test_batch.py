"""Batches in OpenAI's format over a gate and a fake engine: answered, resumed after a cut, refused with every fault."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_engine import Endpoint, chat
from probing import free_port

from cluster.cli import cli
from serving.batch import Done, answered_in, errors_file, read_batch, run_batch
from serving.spec import Limits
from training.errors import TenureError


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def request(name: str, text: str = "hello there", **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": chat(text, **more)}


def run(endpoint: Endpoint, source: Path, out: Path, concurrency: int = 4) -> Done:
    async def body() -> Done:
        async with endpoint.client(endpoint.admin) as client:
            return await run_batch(read_batch(source), out, client, concurrency)

    return asyncio.run(body())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


def test_a_batch_is_answered_and_resumed_after_a_cut(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "serving")
    source = write(tmp_path / "in.jsonl", [request(f"r{n}", f"word {n} ü") for n in range(20)])
    out = tmp_path / "out.jsonl"
    done = run(endpoint, source, out)
    assert (done.answered, done.failed, done.completion_tokens) == (20, 0, 60)
    found = {row["custom_id"]: row["response"] for row in read(out)}
    assert found["r3"]["body"]["choices"][0]["message"]["content"] == "word 3 ü"
    assert found["r3"]["status_code"] == 200
    assert found["r3"]["request_id"].startswith("req-")
    rows = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(rows[:7]) + rows[7][:25])
    asked = len(endpoint.engine.asked)
    again = run(endpoint, source, out)
    assert (again.before, again.answered) == (7, 13)
    assert len(endpoint.engine.asked) == asked + 13
    assert answered_in(out) == {f"r{n}" for n in range(20)}


def test_what_is_refused_goes_to_the_file_of_errors(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "serving")
    source = write(tmp_path / "in.jsonl", [request("good"), request("bad", model="nobody")])
    done = run(endpoint, source, tmp_path / "out.jsonl")
    assert (done.answered, done.failed) == (1, 1)
    (row,) = read(errors_file(tmp_path / "out.jsonl"))
    assert (row["custom_id"], row["response"]["status_code"]) == ("bad", 404)


def test_overload_is_waited_out(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "serving", limits=Limits(max_running=1, max_waiting=1, max_wait_s=0.2))
    source = write(tmp_path / "in.jsonl", [request(f"r{n}") for n in range(12)])
    assert run(endpoint, source, tmp_path / "out.jsonl", concurrency=6).answered == 12


def test_every_fault_of_a_batch_is_told_with_its_line(tmp_path: Path) -> None:
    rows = [
        request("a"),
        "{\n",
        "[]\n",
        {"custom_id": 3, "url": "/v1/completions", "body": {}},
        request("a"),
        {**request("b"), "url": "/v1/files"},
        {**request("c"), "method": "GET"},
        {**request("d"), "body": {}},
        request("e", stream=True),
    ]
    with pytest.raises(TenureError) as caught:
        read_batch(write(tmp_path / "in.jsonl", rows))
    lines = [problem.where.rpartition("line ")[2] for problem in caught.value.problems]
    assert lines == ["2", "3", "4", "5", "6", "7", "8", "9"]
    for missing in (tmp_path / "nothing.jsonl", write(tmp_path / "empty.jsonl", [])):
        with pytest.raises(TenureError):
            read_batch(missing)


def test_the_command_refuses_what_cannot_work(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request("a")])
    url = f"http://127.0.0.1:{free_port()}/v1"
    for out, what in ((source, "over the requests"), (tmp_path / "out.jsonl", "no endpoint answers")):
        done = CliRunner().invoke(cli, ["batch", str(source), str(out), "--url", url])
        assert isinstance(done.exception, TenureError)
        assert what in str(done.exception)
