"""Asks a served model whether a text may pass."""

from __future__ import annotations

import json

import httpx

from serving.exchange import App, Exchange
from serving.moderation_spec import ModelJudge
from serving.refusals import retry_later

_MAX_TOKENS = 8


async def blocks(judge: ModelJudge, text: str, exchange: Exchange, app: App) -> bool:
    """Whether the judge says that the text may not pass.

    Raises:
        Refusal: 503, it cannot be asked and may not be left out.
    """
    question = judge.prompt.replace("{text}", text)
    request = {
        "model": judge.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _MAX_TOKENS,
        "temperature": 0,
    }
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://inside") as client:
        reply = await client.post(
            "/v1/chat/completions", json=request, headers={"x-request-id": f"{exchange.id}-judge"}
        )
    said = _answer_in(reply)
    if said is None and not judge.fail_open:
        raise retry_later(503, "the model that filters requests does not answer", "filter_unavailable")
    return said is not None and said.lower().startswith(tuple(word.lower() for word in judge.blocks))


def _answer_in(reply: httpx.Response) -> str | None:
    if reply.status_code != 200:
        return None
    try:
        content = json.loads(reply.content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return str(content or "").strip()
