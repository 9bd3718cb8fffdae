"""The serving spec: read from YAML, every fault with its line; engines that share a base; the examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fake_engine import Endpoint, chat
from one_command import ROOT
from test_gate import ask, get

from cluster.serving import fleet_of, read_serving_spec
from serving.app import check_fleet
from serving.endpoint import check_keys
from serving.fleet import Engine, Fleet
from serving.keys import KeyStore
from serving.spec import Access, Autoscaling
from training.errors import TenureError
from training.workspace import Workspace

EXAMPLES = ROOT / "examples" / "serving"


def read(folder: Path, text: str) -> TenureError:
    (folder / "endpoint.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(TenureError) as caught:
        read_serving_spec(str(folder / "endpoint.yaml"), Workspace.at(folder), None, None)
    return caught.value


def test_the_example_is_a_serving_spec() -> None:
    spec = read_serving_spec(str(EXAMPLES / "endpoint.yaml"), Workspace.at(ROOT), None, 8123)
    assert (spec.models, spec.port, spec.keys) == (("production",), 8123, "required")
    assert spec.replicas == Autoscaling(min_replicas=1, max_replicas=2, target_requests=16)
    assert [found.type for found in spec.moderation] == ["private", "length"]


def test_one_name_is_a_spec_of_its_own(tmp_path: Path) -> None:
    spec = read_serving_spec("my-first-1", Workspace.at(tmp_path), "127.0.0.1", None)
    assert (spec.models, spec.host, spec.port) == (("my-first-1",), "127.0.0.1", 8000)


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    text = "models: [a-1]\nport: 70000\nlimit: {}\nlimits: {max_runing: 3}\nreplicas: {min_replicas: 3}\n"
    problems = read(tmp_path, text + "moderation:\n  - {type: patterns, patterns: ['(']}\n").problems
    told = {problem.where.rpartition(": ")[2]: problem for problem in problems}
    assert set(told) >= {"port", "limit", "limits.max_runing", "replicas.min_replicas"}
    assert "limits" in told["limit"].instead
    assert "max_running" in told["limits.max_runing"].instead
    assert any("regular expression" in problem.what for problem in problems)


def test_files_of_tls_that_are_missing_are_told(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, "models: [a-1]\ntls: {certificate: no.pem, key: no.key}\n").problems[:1]
    assert "no.pem" in problem.what


def test_neither_run_nor_release_is_told(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path)
    with pytest.raises(TenureError, match="there is no run 'nobody'"):
        fleet_of(read_serving_spec("nobody", workspace, None, None), workspace)


def test_an_endpoint_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    for access in (Access(folder=tmp_path, host="0.0.0.0"), Access(folder=tmp_path, keys="required")):
        with pytest.raises(TenureError, match="needs API keys, and there is none"):
            check_keys(access, store)
    check_keys(Access(folder=tmp_path), store)
    store.create("k")
    check_keys(Access(folder=tmp_path, host="0.0.0.0"), store)


def test_what_cannot_be_served_is_told_all_at_once(tmp_path: Path) -> None:
    engines = (Engine("a", tmp_path / "x", {"b": tmp_path / "y"}, 8), Engine("c", tmp_path / "z"))
    with pytest.raises(TenureError) as caught:
        check_fleet(Fleet(engines))
    assert len(caught.value.problems) == 3
    with pytest.raises(TenureError, match="both called 'b'"):
        check_fleet(Fleet(engines, aliases={"b": "a"}))


def test_the_dashboard_shows_metrics_that_there_are(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    ask(endpoint, chat("one two", stream=True))
    ask(endpoint, chat("hi", model="nobody"))
    named = re.findall(r"\btenure_\w+", (EXAMPLES / "grafana.json").read_text())
    shown = {name.removesuffix("_bucket") for name in named}
    there = set(re.findall(r"^# TYPE (tenure_\w+)", get(endpoint, "/metrics").text, re.MULTILINE))
    assert len(shown) > 10
    assert shown - there == set()
    assert json.loads((EXAMPLES / "grafana.json").read_text())["panels"]
