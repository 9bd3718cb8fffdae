"""Asks an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from training.errors import fail

KEY_VARIABLE = "TENURE_API_KEY"
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception): ")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def connect(
    base_url: str, timeout_s: float = 120.0, secret: str | None = None, certificate: Path | None = None
) -> OpenAI:
    """A client of an endpoint (base_url ends in /v1); a loopback address is asked through no proxy.

    Args:
        secret: an API key; that in $TENURE_API_KEY where none is given, or none at all.
        certificate: the endpoint's own, where no authority that the machine trusts has signed it.
    """
    loopback = urlsplit(base_url).hostname in _LOOPBACK
    trusted = ssl.create_default_context(cafile=str(certificate)) if certificate else True
    http = openai.DefaultHttpxClient(trust_env=not loopback, verify=trusted)
    key = secret or os.environ.get(KEY_VARIABLE) or "none"
    return OpenAI(base_url=base_url, api_key=key, timeout=timeout_s, max_retries=0, http_client=http)


@contextmanager
def told_plainly(base_url: str) -> Iterator[None]:
    """Turns the client's errors into a TenureError that names the endpoint."""
    try:
        yield
    except openai.APIStatusError as error:
        instead = "see GET /v1/models for the names it serves" if error.status_code == 404 else ""
        raise fail(f"the endpoint refused (HTTP {error.status_code}): {_said(error)}", base_url, instead) from error
    except openai.APITimeoutError as error:
        raise fail("the endpoint did not answer in time", base_url, "try again, or see its logs") from error
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise fail(f"the endpoint cannot be reached ({reason})", base_url, "is it running? tenure serve RUN") from error


def _said(error: openai.APIStatusError) -> str:
    """What the endpoint gave as the reason: vLLM says `message`, Ray's ingress `detail`."""
    body = error.body if isinstance(error.body, dict) else {}
    return exception_in(str(body.get("message") or body.get("detail") or error.message))


def exception_in(text: str) -> str:
    """The exception that ends a traceback, on one line; other text unchanged but for its line breaks."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if _EXCEPTION.match(line)]
    return " ".join(lines[starts[-1] if starts else 0 :])


def ask(
    question: str, base_url: str, models: Sequence[str] | None, max_tokens: int, system: str | None = None
) -> dict[str, str]:
    """Each model's answer to one question, decoded greedily, by model name; all models served when None.

    `system` is the system turn before the question; without one the chat template's own applies.

    Raises:
        TenureError: the endpoint cannot be reached, does not know a model, or refuses the request.
    """
    with told_plainly(base_url), connect(base_url) as client:
        names = [model.id for model in client.models.list()] if models is None else models
        messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        return {name: _answer(client, name, messages, max_tokens) for name in names}


def _answer(client: OpenAI, model: str, messages: list[ChatCompletionMessageParam], max_tokens: int) -> str:
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0.0)
    return reply.choices[0].message.content or ""
