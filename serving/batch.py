"""Many requests from a file to a file, in OpenAI's batch format; what was answered before is not asked again."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx

from training.errors import Problem, fail, raise_all

URLS = ("/v1/chat/completions", "/v1/completions")
RETRIED = (408, 429, 500, 502, 503, 504)
MOST_TRIES = 8
_LONGEST_WAIT_S = 60.0
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass
class Done:
    """What became of a batch: requests answered now and before, those that failed, and tokens of the answers."""

    answered: int = 0
    before: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: Path = field(default_factory=Path)


def read_batch(path: Path) -> list[Line]:
    """The requests in a file.

    Raises:
        TenureError: with the first twenty lines that are no request, or whose custom_id stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"the batch cannot be read: {error}", str(path), "give a JSONL file in UTF-8") from None
    lines: dict[str, Line] = {}
    problems: list[Problem] = []
    for number, row in enumerate(text.splitlines(), start=1):
        if not row.strip() or len(problems) == _MOST_PROBLEMS:
            continue
        found = _parse(row)
        if isinstance(found, Line) and found.custom_id in lines:
            found = f"the custom_id {found.custom_id!r} stands twice"
        if isinstance(found, Line):
            lines[found.custom_id] = found
        else:
            problems.append(Problem(found, f"{path} line {number}", "see docs/serving.md for a line's form"))
    raise_all(problems)
    if not lines:
        raise fail("the batch holds no requests", str(path), "write one JSON object a line")
    return list(lines.values())


def _parse(row: str) -> Line | str:
    """The request in a row, or what is wrong with it."""
    try:
        told = json.loads(row)
    except (ValueError, RecursionError) as error:
        return f"this is no JSON: {error}"
    if not isinstance(told, dict):
        return "this is no JSON object"
    custom_id, url, body = told.get("custom_id"), told.get("url"), told.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        return "custom_id is missing, or no text"
    if told.get("method", "POST") != "POST":
        return f"the method {told.get('method')!r} is not POST"
    if url not in URLS:
        return f"the url {url!r} is none of {', '.join(URLS)}"
    if not isinstance(body, dict) or "model" not in body:
        return "the body is missing, or names no model"
    return "a batch does not stream: remove stream" if body.get("stream") else Line(custom_id, url, body)


def errors_file(out: Path) -> Path:
    """Where the requests that failed are written, beside the answers."""
    return out.with_name(f"{out.stem}.errors{out.suffix or '.jsonl'}")


def answered_in(out: Path) -> set[str]:
    """The custom_ids that a file of answers holds; a torn last line is cut off, and asked again."""
    if not out.is_file():
        return set()
    found, whole = set(), 0
    with out.open("rb") as file:
        for row in file:
            try:
                found.add(str(json.loads(row)["custom_id"]))
            except (ValueError, KeyError, TypeError):
                break
            if not row.endswith(b"\n"):
                found.discard(str(json.loads(row)["custom_id"]))
                break
            whole += len(row)
    os.truncate(out, whole)
    return found


async def run_batch(
    lines: Sequence[Line],
    out: Path,
    client: httpx.AsyncClient,
    concurrency: int,
    on_answer: Callable[[Done], None] = lambda done: None,
) -> Done:
    """Ask for every line that `out` does not answer yet, this many at a time; answers are written as they come.

    Overload and failures of the endpoint are tried again, as long as it says; other refusals go to the file of errors.
    """
    before = answered_in(out)
    done = Done(before=sum(line.custom_id in before for line in lines), errors=errors_file(out))
    left = iter([line for line in lines if line.custom_id not in before])
    done.errors.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as answers:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(_work(left, answers, client, done, on_answer))
    return done


async def _work(
    left: Iterator[Line], answers: TextIO, client: httpx.AsyncClient, done: Done, on_answer: Callable[[Done], None]
) -> None:
    for line in left:
        reply, error = await _ask(line, client)
        told = _output(line, reply, error)
        if reply is not None and reply.status_code == 200:
            done.answered += 1
            usage = told["response"]["body"].get("usage") or {}
            done.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            done.completion_tokens += int(usage.get("completion_tokens") or 0)
            answers.write(json.dumps(told, ensure_ascii=False) + "\n")
            answers.flush()
        else:
            done.failed += 1
            with done.errors.open("a", encoding="utf-8") as errors:
                errors.write(json.dumps(told, ensure_ascii=False) + "\n")
        on_answer(done)


async def _ask(line: Line, client: httpx.AsyncClient) -> tuple[httpx.Response | None, str]:
    error = ""
    reply: httpx.Response | None = None
    for number in range(MOST_TRIES):
        try:
            reply, error = await client.post(line.url, json=line.body), ""
        except httpx.TransportError as failure:
            reply, error = None, str(failure) or type(failure).__name__
        if reply is not None and reply.status_code not in RETRIED:
            break
        if number + 1 < MOST_TRIES:
            await asyncio.sleep(_wait_s(reply, number))
    return reply, error


def _wait_s(reply: httpx.Response | None, number: int) -> float:
    told = reply.headers.get("retry-after", "") if reply is not None else ""
    return min(_LONGEST_WAIT_S, float(told) if told.isdigit() else 0.5 * 2.0**number)


def _output(line: Line, reply: httpx.Response | None, error: str) -> dict[str, Any]:
    """A line of the output, as OpenAI's batches have it."""
    told: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id}
    if reply is None:
        return told | {"response": None, "error": {"code": "unreachable", "message": error}}
    try:
        body = reply.json()
    except ValueError:
        body = {"error": {"message": reply.text[:1000], "type": "server_error", "param": None, "code": None}}
    response = {"status_code": reply.status_code, "request_id": reply.headers.get("x-request-id"), "body": body}
    return told | {"response": response, "error": None}
