"""What the comparison makes of an endpoint's answers; a server of the standard library gives them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import openai
import pytest

from serving.client import connect
from serving.parity import Tolerance, check_parity, read_log_probs
from training.errors import TenureError
from training.evaluation.scorecard import Probe

TOLERANCE = Tolerance(largest=0.01, mean=0.001)
EXPECTED = Probe(token_ids=(7, 8, 9, 10), log_probs=(-1.0, -2.0, -3.0))
Answer = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def endpoint(answer: Answer) -> Iterator[openai.OpenAI]:
    """A client of a server that gives these answers to completion requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answered = {"id": "", "object": "text_completion", "created": 0, "model": "m", **answer(request)}
            self.send_response(answered.pop("status", 200))
            body = json.dumps(answered)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with connect(f"http://127.0.0.1:{server.server_port}/v1") as client:
            yield client
    finally:
        server.shutdown()
        server.server_close()


def echoing(*log_probs: float | None) -> Answer:
    """Answers that echo the prompt with these log-probabilities."""
    logprobs = {"token_logprobs": list(log_probs), "tokens": [], "text_offset": [], "top_logprobs": None}
    choice = {"index": 0, "text": "the prompt", "finish_reason": "length", "logprobs": logprobs}
    return lambda request: {"choices": [choice]}


def test_the_prompt_is_sent_as_token_ids_and_nothing_is_generated() -> None:
    seen: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        seen.append(request)
        return echoing(None, -1.0, -2.0, -3.0)(request)

    with endpoint(answer) as client:
        text, log_probs = read_log_probs(client, "m", EXPECTED.token_ids)
    assert (text, log_probs) == ("the prompt", (-1.0, -2.0, -3.0))
    assert seen == [{"model": "m", "prompt": [7, 8, 9, 10], "echo": True, "logprobs": 1, "max_tokens": 0}]


def test_differences_are_the_largest_and_the_mean_over_all_probes() -> None:
    with endpoint(echoing(None, -1.0, -2.003, -3.0)) as client:
        found = check_parity(client, "m", [EXPECTED, EXPECTED], Tolerance(largest=0.01, mean=0.01))
    assert found.largest == pytest.approx(0.003)
    assert found.mean == pytest.approx(0.001)
    assert found.num_tokens == 6


def test_one_token_too_far_is_refused_with_model_prompt_position_and_both_values() -> None:
    with (
        endpoint(echoing(None, -1.0, -2.5, -3.0)) as client,
        pytest.raises(TenureError) as caught,
    ):
        check_parity(client, "tuned-1", [EXPECTED], Tolerance(largest=0.01, mean=10.0))
    message = str(caught.value)
    for part in ("'tuned-1'", "probe 0", "'the prompt'", "token 2", "-2.5000", "-2.0000", "0.01 allowed"):
        assert part in message


def test_many_small_differences_are_refused_by_their_mean() -> None:
    with (
        endpoint(echoing(None, -1.005, -2.005, -3.005)) as client,
        pytest.raises(TenureError, match="on average"),
    ):
        check_parity(client, "m", [EXPECTED], TOLERANCE)


def test_a_value_that_is_not_a_number_is_refused() -> None:
    with (
        endpoint(echoing(None, -1.0, float("nan"), -3.0)) as client,
        pytest.raises(TenureError, match="token 2 is nan"),
    ):
        check_parity(client, "m", [EXPECTED], TOLERANCE)


@pytest.mark.parametrize("answer", [echoing(None, -1.0), lambda request: {"choices": [{"index": 0, "text": "x"}]}])
def test_an_endpoint_without_log_probabilities_of_the_prompt_is_refused(answer: Answer) -> None:
    with endpoint(answer) as client, pytest.raises(TenureError, match="of 4 prompt tokens"):
        check_parity(client, "m", [EXPECTED], TOLERANCE)


def test_nothing_to_compare_is_refused() -> None:
    with endpoint(echoing()) as client, pytest.raises(TenureError, match="holds no probes for 'm'"):
        check_parity(client, "m", [], TOLERANCE)


def test_a_refusal_tells_the_exception_and_not_the_traceback() -> None:
    error = {"message": "Traceback:\n  File ...\nValueError: no such tensor\n"}
    with endpoint(lambda request: {"status": 500, "error": error}) as client, pytest.raises(TenureError) as caught:
        check_parity(client, "m", [EXPECTED], TOLERANCE)
    assert "the endpoint refused (HTTP 500): ValueError: no such tensor" in str(caught.value)
    assert "Traceback" not in str(caught.value)
