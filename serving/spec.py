"""The serving spec: what an endpoint serves, where it listens, and what it lets through. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from serving.moderation_spec import Filter
from training.section import Count, Flag, NonNegative, Positive, Section, Text, fault

Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Limits(Section):
    """Bounds on every request and on every key; a key's own quotas go before those here.

    `max_running` requests are answered at a time, `max_waiting` wait in a line that is fair over keys, none for longer
    than `max_wait_s`. Quotas count prompts and answers together.
    """

    max_body_bytes: Count = 4 * 2**20
    body_timeout_s: Positive = 30.0
    request_timeout_s: Positive = 600.0
    max_running: Count = 256
    max_waiting: Count = 1024
    max_wait_s: Positive = 60.0
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None


def _existing(value: Any, info: ValidationInfo) -> Path:
    """A file, looked for beside the spec."""
    if not isinstance(value, str | Path):
        raise fault(f"{value!r} is no file", "give the path of a PEM file")
    path = Path((info.context or {}).get("folder", ".")).absolute() / Path(value).expanduser()
    if not path.is_file():
        raise fault(f"there is no file {path}", "give the path of a PEM file, absolute or beside the spec")
    return path


PemFile = Annotated[Path, BeforeValidator(_existing)]


class Tls(Section):
    """PEM files of the certificate (with its chain) and its private key."""

    certificate: PemFile
    key: PemFile


class Autoscaling(Section):
    """Replicas of every engine between a warm floor and a ceiling, by requests in flight at each."""

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_requests: Count = 16

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise fault("min_replicas is above max_replicas", "raise max_replicas", ("min_replicas",))
        return self


class Access(Section):
    """What is asked of a request before it reaches a model; picklable, for the ingress."""

    folder: Path
    keys: Literal["auto", "required"] = "auto"
    host: Text = "127.0.0.1"
    limits: Limits = Limits()
    moderation: tuple[Filter, ...] = ()
    price_per_hour: NonNegative | None = None


class ServingSpec(Section):
    """One endpoint.

    `models` are runs, or aliases of releases such as production. `keys` says whether a request needs an API key:
    `auto` asks for none on the loopback as long as none exists. `resident_adapters` bounds how many adapters each
    engine keeps in memory. `price_per_hour` is what the machine costs.
    """

    models: Annotated[tuple[Text, ...], Field(min_length=1)]
    host: Text = "127.0.0.1"
    port: Port = 8000
    tls: Tls | None = None
    keys: Literal["auto", "required"] = "auto"
    replicas: Count | Autoscaling = 1
    max_model_len: Count = 2048
    resident_adapters: Count = 16
    trust_remote_code: Flag = False
    limits: Limits = Limits()
    moderation: tuple[Filter, ...] = ()
    price_per_hour: NonNegative | None = None

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK
