"""The endpoint end to end: an adapter beside its base model on vLLM, on the CPU."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai_suite import CASES
from openai_suite import Case as SuiteCase
from peft import PeftModel
from probing import PROMPTS, free_port, teacher_forced
from tiny import make_tiny_adapter, make_tiny_model
from transformers import AutoModelForCausalLM

from serving.app import ServedModels, build_application
from serving.client import ask, connect
from serving.endpoint import TOLERANCES, Endpoint, Probes, check_port, deploy
from serving.files import ServingFolder
from serving.parity import check_parity
from serving.spec import Access
from training.errors import TenureError
from training.evaluation.scorecard import Probe
from training.workspace import read_json


@dataclass(frozen=True)
class Case:
    endpoint: Endpoint
    served: ServedModels
    base: tuple[Probe, ...]
    tuned: tuple[Probe, ...]
    other: tuple[Probe, ...]
    progress: tuple[str, ...]
    folder: ServingFolder
    other_adapter: Path

    def admin(self) -> httpx.Client:
        """A client with the endpoint's own key of administration."""
        told = read_json(self.folder.endpoint)
        headers = {"authorization": f"Bearer {told['key']}"}
        root = self.endpoint.base_url.removesuffix("/v1")
        return httpx.Client(base_url=root, headers=headers, timeout=60, trust_env=False)


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
    home = folder / "serving"
    with deploy(served, probes, port=free_port(), folder=home, on_progress=told.append) as endpoint:
        yield Case(endpoint, served, bare, tuned, other, tuple(told), ServingFolder(home), adapters[1])
    with pytest.raises(TenureError, match="cannot be reached"):
        ask("Still there?", endpoint.base_url, None, 1)


@pytest.fixture
def client(case: Case) -> Iterator[openai.OpenAI]:
    with connect(case.endpoint.base_url) as client:
        yield client


def test_both_models_are_listed_under_plain_names(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny", "tiny-tuned-1"}


@pytest.mark.parametrize("name", ["tiny", "tiny-tuned-1"])
@pytest.mark.parametrize("suite_case", CASES, ids=lambda found: found.__name__)
def test_the_official_client_gets_what_it_expects(client: openai.OpenAI, suite_case: SuiteCase, name: str) -> None:
    suite_case(client, name)


def test_the_two_models_answer_differently(case: Case) -> None:
    answers = ask("What is it?", case.endpoint.base_url, None, max_tokens=16)
    assert set(answers) == {"tiny", "tiny-tuned-1"}
    assert answers["tiny"] != answers["tiny-tuned-1"]


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


def running(case: Case, admin: httpx.Client) -> float:
    """Requests that the engine is working on, by its own metrics."""
    text = admin.get("/metrics").text
    return sum(float(found) for found in re.findall(r"^vllm:num_requests_running\{[^}]*\} (\S+)", text, re.MULTILINE))


def leave_midway(url: str, request: dict[str, Any], after_s: float = 1.0) -> None:
    """Ask, and go away before the answer is complete."""
    began = time.monotonic()
    asked = partial(httpx.stream, "POST", url, json=request, timeout=after_s, trust_env=False)
    with suppress(httpx.TimeoutException), asked() as reply:
        for _ in reply.iter_raw():
            if time.monotonic() - began > after_s:
                return
        pytest.fail("the answer was complete too soon")


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_stops_when_the_client_goes_away(case: Case, stream: bool) -> None:
    request = {"model": "tiny", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    with case.admin() as admin:
        leave_midway(f"{case.endpoint.base_url}/completions", request)
        left = time.monotonic()
        while running(case, admin):
            assert time.monotonic() - left < 5, "the engine still generates"
            time.sleep(0.05)
        assert 'tenure_clients_left_total{key="-",model="tiny"}' in admin.get("/metrics").text


def test_an_adapter_joins_takes_over_an_alias_and_goes_back(case: Case) -> None:
    with case.admin() as admin, connect(case.endpoint.base_url) as client:
        added = {"model": {"name": "tiny-other", "path": str(case.other_adapter), "base": "tiny"}}
        assert admin.post("/admin/models", json=added).status_code == 200
        found = check_parity(client, "tiny-other", case.other, TOLERANCES["float32"])
        assert found.largest < TOLERANCES["float32"].largest
        for model in ("tiny-tuned-1", "tiny-other"):
            at_once = {"alias": "production", "model": model, "steps": []}
            assert admin.post("/admin/rollouts", json=at_once).status_code == 200
        assert ask("Hi", case.endpoint.base_url, ["production"], 4) == {
            "production": ask("Hi", case.endpoint.base_url, ["tiny-other"], 4)["tiny-other"]
        }
        assert admin.post("/admin/rollback", json={"alias": "production"}).json()["current"] == "tiny-tuned-1"


def test_the_endpoint_is_well_and_counts(case: Case) -> None:
    with case.admin() as admin:
        assert admin.get("/ready").status_code == 200
        text = admin.get("/metrics").text
    assert 'tenure_time_to_first_token_seconds_count{model="tiny"}' in text
    assert "vllm:kv_cache_usage_perc" in text
    assert case.folder.endpoint.stat().st_mode & 0o077 == 0


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
