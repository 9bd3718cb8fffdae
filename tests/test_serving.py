"""The endpoint end to end: an adapter beside its base model on vLLM, on the CPU."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from peft import PeftModel
from probing import PROMPTS, free_port, teacher_forced
from tiny import make_tiny_adapter, make_tiny_model
from transformers import AutoModelForCausalLM

from serving.app import ServedModels, build_application
from serving.client import ask, connect
from serving.endpoint import TOLERANCES, Endpoint, Probes, check_port, deploy
from serving.parity import check_parity
from serving.spec import Access
from training.errors import TenureError
from training.evaluation.scorecard import Probe


@dataclass(frozen=True)
class Case:
    endpoint: Endpoint
    served: ServedModels
    base: tuple[Probe, ...]
    tuned: tuple[Probe, ...]
    other: tuple[Probe, ...]
    progress: tuple[str, ...]


@pytest.fixture(scope="module")
def case(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """An adapter beside its base, with the probes of both and those of another adapter."""
    folder = tmp_path_factory.mktemp("served")
    base = make_tiny_model(folder / "base")
    adapters = [make_tiny_adapter(base, folder / f"adapter-{seed}", seed) for seed in (1, 2)]
    bare = teacher_forced(AutoModelForCausalLM.from_pretrained(base))
    tuned, other = (
        teacher_forced(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)))
        for adapter in adapters
    )
    served = ServedModels("tiny", base, "tiny-tuned-1", adapters[0], adapter_rank=8)
    told: list[str] = []
    probes: Probes = {"base": bare, "tuned": tuned}
    with deploy(served, probes, port=free_port(), on_progress=told.append) as endpoint:
        yield Case(endpoint, served, bare, tuned, other, tuple(told))
    with pytest.raises(TenureError, match="cannot be reached"):
        ask("Still there?", endpoint.base_url, None, 1)


@pytest.fixture
def client(case: Case) -> Iterator[openai.OpenAI]:
    with connect(case.endpoint.base_url) as client:
        yield client


def test_both_models_are_listed_under_plain_names(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny", "tiny-tuned-1"}


@pytest.mark.parametrize("name", ["tiny", "tiny-tuned-1"])
def test_chat_and_streamed_chat_give_the_same_answer(client: openai.OpenAI, name: str) -> None:
    request: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**request)
    pieces = list(client.chat.completions.create(**request, stream=True))
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole.model == name
    assert whole.choices[0].message.content
    assert streamed == whole.choices[0].message.content
    assert len(pieces) > 2


@pytest.mark.parametrize("name", ["tiny", "tiny-tuned-1"])
def test_completions_and_streamed_completions_give_the_same_answer(client: openai.OpenAI, name: str) -> None:
    request: dict[str, Any] = {"model": name, "prompt": "Once upon", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    streamed = "".join(piece.choices[0].text for piece in client.completions.create(**request, stream=True))
    assert whole
    assert streamed == whole


def test_the_two_models_answer_differently(case: Case) -> None:
    answers = ask("What is it?", case.endpoint.base_url, None, max_tokens=16)
    assert set(answers) == {"tiny", "tiny-tuned-1"}
    assert answers["tiny"] != answers["tiny-tuned-1"]


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="Hi", max_tokens=1)


def test_an_unknown_adapter_of_a_known_base_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tiny:nobody", prompt="Hi", max_tokens=1)


def test_ask_names_an_unknown_model(case: Case) -> None:
    with pytest.raises(TenureError, match="nobody"):
        ask("Hi", case.endpoint.base_url, ["nobody"], max_tokens=1)


def test_ready_means_that_both_models_match_their_probes(case: Case) -> None:
    assert set(case.endpoint.parity) == {"tiny", "tiny-tuned-1"}
    for found in case.endpoint.parity.values():
        assert found.num_tokens == sum(len(prompt) - 1 for prompt in PROMPTS)
        assert 0 < found.mean <= found.largest < TOLERANCES["float32"].largest
    assert any("token by token" in message for message in case.progress)


def test_the_probes_of_the_base_are_refused_under_the_tuned_name(case: Case, client: openai.OpenAI) -> None:
    with pytest.raises(TenureError, match="'tiny-tuned-1' as served is not the model that was scored"):
        check_parity(client, "tiny-tuned-1", case.base, TOLERANCES["float32"])


def test_another_adapter_is_refused(case: Case, client: openai.OpenAI) -> None:
    with pytest.raises(TenureError, match="log-probability of token"):
        check_parity(client, "tiny-tuned-1", case.other, TOLERANCES["float32"])


def test_a_second_endpoint_on_the_same_ray_is_refused(case: Case) -> None:
    with (
        pytest.raises(TenureError, match="already runs"),
        deploy(case.served, {}, port=free_port(), on_progress=print),
    ):
        pass


def test_the_endpoint_listens_on_the_loopback_only(case: Case) -> None:
    port = int(case.endpoint.base_url.split(":")[2].split("/")[0])
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)


def test_a_port_in_use_is_named_with_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TenureError) as caught:
            check_port("127.0.0.1", port)
    (problem,) = caught.value.problems
    assert f"port {port}" in problem.what
    free = int("".join(filter(str.isdigit, problem.instead)))
    assert free != port
    check_port("127.0.0.1", free)


def test_a_port_in_use_stops_the_deployment_at_once(tmp_path: Path) -> None:
    served = ServedModels("a", tmp_path, "b", tmp_path, None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TenureError, match=f"port {port}"), deploy(served, {}, port=port, on_progress=print):
            pass


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.77", 8000)])
def test_an_address_that_cannot_be_listened_on_is_refused(host: str, port: int) -> None:
    with pytest.raises(TenureError, match="cannot listen on"):
        check_port(host, port)


def test_asking_a_dead_port_says_so() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(TenureError, match="cannot be reached") as caught:
        ask("Hi", url, None, max_tokens=1)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("base", "tuned", "rank", "message"),
    [
        ("a:b", "c", 8, "cannot name"),
        ("a", "a", 8, "both called"),
        ("a", "b", 513, "rank 513"),
        ("a", "b", 8, "no model"),
        ("a", "b", None, "no model"),
    ],
)
def test_what_ray_or_vllm_cannot_serve_is_refused(
    tmp_path: Path, base: str, tuned: str, rank: int | None, message: str
) -> None:
    with pytest.raises(TenureError, match=message):
        build_application(ServedModels(base, tmp_path, tuned, tmp_path, rank).fleet, Access(folder=tmp_path))
