"""Prometheus metrics of the endpoint, per model and key."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.exchange import Exchange
from serving.queueing import FairQueue

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """What is counted. Labels are names of the catalog and ids of keys, so there are few of them."""

    def __init__(self, queue: FairQueue) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "key")
        self._requests = self._counter("requests", "Requests by outcome", (*labels, "status"))
        self._errors = self._counter("errors", "Requests that were refused or failed, by reason", (*labels, "code"))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts", labels)
        self._completion = self._counter("completion_tokens", "Tokens of answers", labels)
        self._interventions = self._counter("moderation_interventions", "Interventions of filters", labels)
        self._left = self._counter("clients_left", "Requests whose client went away", labels)
        self._first = self._histogram("time_to_first_token_seconds", "To the first token", SECONDS)
        self._token = self._histogram("time_per_output_token_seconds", "Per token after the first", TOKEN_SECONDS)
        self._whole = self._histogram("request_seconds", "Whole requests", SECONDS)
        self._gauge("requests_running", "Requests at the engines", lambda: queue.running)
        self._gauge("requests_waiting", "Requests in line", lambda: queue.waiting)

    def note(self, exchange: Exchange, model: str) -> None:
        """Count a request that has come to its end; `model` is a known name, or empty."""
        labels = (model, exchange.key_id)
        self._requests.labels(*labels, str(exchange.status)).inc()
        if exchange.code == "client_left":
            self._left.labels(*labels).inc()
        elif exchange.status >= 400 or exchange.code:
            self._errors.labels(*labels, exchange.code or str(exchange.status)).inc()
        self._prompt.labels(*labels).inc(exchange.prompt_tokens)
        self._completion.labels(*labels).inc(exchange.completion_tokens)
        self._interventions.labels(*labels).inc(exchange.interventions)
        if model and exchange.status == 200:
            self._time(exchange, model)

    def _time(self, exchange: Exchange, model: str) -> None:
        whole = exchange.seconds
        self._whole.labels(model).observe(whole)
        if exchange.first_s is None:
            return
        self._first.labels(model).observe(exchange.first_s)
        if exchange.completion_tokens > 1 and whole > exchange.first_s:
            self._token.labels(model).observe((whole - exchange.first_s) / (exchange.completion_tokens - 1))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"tenure_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tenure_{name}", what, ("model",), buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(f"tenure_{name}", what, registry=self.registry).set_function(value)
