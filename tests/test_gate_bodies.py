"""Whatever is sent to the gate: no 5xx, no traceback, errors in OpenAI's form. And TLS, live."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Endpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.access import ROUTES
from serving.client import connect
from serving.listening import Listen, listen

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = ("messages", "prompt", "max_tokens", "n", "stream", "stream_options", "stop", "logprobs", "temperature")
REQUEST = st.fixed_dictionaries(
    {"model": st.sampled_from(["base", "tuned-1", "production"]) | JSON},
    optional=dict.fromkeys(FIELDS, JSON),
)
PATHS = [path for path, route in ROUTES.items() if "POST" in route.methods]
# What the fake engine is told by words is its own affair.
TOLD = ("bug", "die", "break")


def tried(endpoint: Endpoint, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
    async def body() -> httpx.Response:
        async with endpoint.client(endpoint.admin) as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(body())


def check(reply: httpx.Response) -> None:
    assert reply.status_code < 500, reply.text
    assert "Traceback" not in reply.text
    assert 'File "' not in reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    return Endpoint(tmp_path_factory.mktemp("bodies"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), request=REQUEST | JSON)
def test_no_json_breaks_the_gate(endpoint: Endpoint, path: str, request: Any) -> None:
    if not any(word in json.dumps(request) for word in TOLD):
        check(tried(endpoint, path, json.dumps(request).encode(), {}))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200), length=st.sampled_from(["", "-1", "x", "9" * 30]))
def test_no_bytes_break_the_gate(endpoint: Endpoint, path: str, content: bytes, length: str) -> None:
    headers = {"content-length": length} if length else {}
    check(tried(endpoint, path, content, headers))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for the loopback that signs itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
    )
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private.write_bytes(key.private_bytes(*form))
    return certificate, private


def test_the_official_client_is_answered_over_tls_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)

    async def body() -> None:
        server, port = await listen(endpoint.gate, Listen("127.0.0.1", 0, certificate, key))

        def ask() -> str | None:
            with connect(f"https://127.0.0.1:{port}/v1", secret=endpoint.admin, certificate=certificate) as client:
                messages: Any = [{"role": "user", "content": "sealed"}]
                return client.chat.completions.create(model="base", messages=messages).choices[0].message.content

        assert await asyncio.to_thread(ask) == "sealed"
        async with httpx.AsyncClient(trust_env=False) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get(f"http://127.0.0.1:{port}/health")
            with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
                await plain.get(f"https://127.0.0.1:{port}/health")
        trusted = ssl.create_default_context(cafile=str(certificate))
        async with httpx.AsyncClient(trust_env=False, verify=trusted) as sealed:
            assert (await sealed.get(f"https://127.0.0.1:{port}/health")).status_code == 200
        server.should_exit = server.force_exit = True
        await asyncio.sleep(0.3)

    asyncio.run(body())
