"""Manifests say what the spec says, and are what Kubernetes, bash and Ray's launcher take."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from tiny_spec import write_tiny_spec

from cluster.cli import cli
from cluster.manifests.make import KINDS, make_manifest
from cluster.manifests.settings import Settings
from training.errors import TenureError

SCHEMAS = Path(__file__).parent / "data" / "kuberay"
SHARED = "/mnt/tenure"
PLAIN = Settings(workspace=SHARED, image="registry/tenure:1", claim="tenure", memory="64Gi")
KUEUE = replace(PLAIN, queue="research", priority="high", env_secret="s3", redis="redis:6379")
AWS = replace(PLAIN, image="ami-1", region="eu-west-1", machine="p5.48xlarge")
GCP = replace(PLAIN, image="projects/x/global/images/y", region="europe-west4", machine="a3-highgpu-8g", project="x")
ONPREM = replace(PLAIN, hosts=("10.0.0.1", "10.0.0.2", "10.0.0.3"))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    scaling = {"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 6, "zero_stage": 2}
    return write_tiny_spec(tmp_path, Path("/models/tiny"), scaling=scaling)


def documents(kind: str, spec: Path, settings: Settings, run_id: str | None = None) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(make_manifest(kind, spec, settings, run_id)))


@cache
def validator(kind: str) -> Draft202012Validator:
    """KubeRay's own schema of a kind, closed: an unknown field is a fault, as in strict validation."""
    schema = closed(json.loads((SCHEMAS / f"{kind.lower()}.json").read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(part) for key, part in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = bool(made.get("x-kubernetes-preserve-unknown-fields"))
    return made


def faults(document: dict[str, Any]) -> list[str]:
    return [error.message for error in validator(document["kind"]).iter_errors(document)]


@pytest.mark.parametrize("settings", [PLAIN, KUEUE, replace(PLAIN, claim=None)], ids=["plain", "kueue", "no volume"])
@pytest.mark.parametrize("kind", ["rayjob", "rayservice", "raycluster"])
def test_kuberay_takes_them(spec: Path, kind: str, settings: Settings) -> None:
    made = documents(kind, spec, settings)[-1]
    assert made["kind"].lower() == kind
    assert faults(made) == []


def test_the_check_by_the_schema_can_fail(spec: Path) -> None:
    made = documents("rayjob", spec, PLAIN)[-1]
    made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = "eight"
    assert faults(made) == ["Additional properties are not allowed ('replica' was unexpected)"]


def test_a_rayjob_asks_for_what_the_spec_asks_for(spec: Path) -> None:
    config, job = documents("rayjob", spec, replace(KUEUE, workers_per_node=4), "far")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]["containers"][0]
    assert (group["replicas"], pod["resources"]["limits"]) == (
        2,
        {"cpu": "24", "memory": "64Gi", "nvidia.com/gpu": "4"},
    )
    assert {"name": "workspace", "mountPath": SHARED} in pod["volumeMounts"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert job["spec"]["suspend"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379"}
    assert job["spec"]["entrypoint"].endswith("python -m cluster.entry /mnt/tenure far --verdicts-succeed'")
    assert config["data"]["files__train.jsonl"] == (spec.parent / "train.jsonl").read_text()
    items = cluster["headGroupSpec"]["template"]["spec"]["volumes"][-1]["configMap"]["items"]
    assert {"key": "files__train.jsonl", "path": "files/train.jsonl"} in items
    assert json.loads(config["data"]["job.json"]) == {"id": "far", "command": "train", "subject": "files/spec.yaml"}


def test_a_rayservice_serves_the_run(spec: Path) -> None:
    (made,) = documents("rayservice", spec, PLAIN, "tiny-3")
    (application,) = yaml.safe_load(made["spec"]["serveConfigV2"])["applications"]
    assert application["args"] == {"workspace": SHARED, "run": "tiny-3"}
    module, name = application["import_path"].split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_data_that_no_manifest_holds_are_refused(spec: Path) -> None:
    with (spec.parent / "train.jsonl").open("r+b") as stream:
        stream.truncate(2 * 2**20)
    with pytest.raises(TenureError, match=r"take 2\.0 MiB, and a manifest holds none such"):
        make_manifest("rayjob", spec, PLAIN)


def test_a_cluster_launched_by_ray_is_what_its_schema_takes(spec: Path) -> None:
    import ray.autoscaler

    schema = json.loads((Path(str(ray.autoscaler.__file__)).parent / "ray-schema.json").read_text())
    for kind, settings in (("aws", AWS), ("gcp", GCP), ("onprem", ONPREM)):
        (made,) = documents(kind, spec, settings)
        assert list(Draft202012Validator(schema).iter_errors(made)) == [], kind
        assert "RAY_AUTH_MODE=token" in made["head_start_ray_commands"][1]
    nodes = documents("aws", spec, replace(AWS, workers_per_node=8))[0]["available_node_types"]["workers"]
    assert (nodes["min_workers"], nodes["resources"]) == (1, {"CPU": 48, "GPU": 8})
    assert documents("onprem", spec, ONPREM)[0]["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]


@pytest.mark.parametrize("command", ["train", "sequence", "sweep"])
def test_bash_takes_the_script_for_slurm(spec: Path, command: str, tmp_path: Path) -> None:
    from cluster.manifests.make import read
    from cluster.manifests.slurm import sbatch

    text = sbatch(command, spec, "far", read(spec)[2], replace(PLAIN, partition="gpu", workers_per_node=8))
    script = tmp_path / "job.sh"
    script.write_text(text, encoding="utf-8")
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    for line in ("--nodes=1", "--gpus-per-node=8", "--cpus-per-task=48", "--partition=gpu", "--mem=64G", "--requeue"):
        assert f"#SBATCH {line}\n" in text


@pytest.mark.parametrize("begun", [False, True])
def test_the_script_for_slurm_begins_a_run_or_goes_on_with_it(spec: Path, tmp_path: Path, begun: bool) -> None:
    """Run with every command replaced by one that writes its arguments down."""
    shared = tmp_path / "shared"
    if begun:
        (shared / "runs" / "far").mkdir(parents=True)
        (shared / "runs" / "far" / "spec.json").write_text("{}")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "python", "sleep", "awk"):
        (tools / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\n[ {name} = awk ] && echo 10.0.0.1\n:'
        )
        (tools / name).chmod(0o755)
    (tools / "scontrol").write_text("#!/bin/bash\nprintf 'n1\\nn2\\n'")
    script = tmp_path / "job.sh"
    script.write_text(make_manifest("slurm", spec, replace(PLAIN, workspace=str(shared), workers_per_node=4), "far"))
    variables = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    ways = {False: f"train {spec} --id far", True: "resume far"}
    assert f"python -m cluster --workspace {shared} {ways[begun]} --address 10.0.0.1:20007" in calls
    assert "--nodelist=n1 --overlap ray start --head" in calls
    assert "--nodelist=n2 --overlap ray start --address=10.0.0.1:20007" in calls


def test_an_unknown_kind_is_refused_with_the_nearest(spec: Path) -> None:
    with pytest.raises(TenureError, match="did you mean 'rayjob'"):
        make_manifest("rayjobs", spec, PLAIN)


def test_all_faults_of_the_settings_are_told_at_once(spec: Path) -> None:
    with pytest.raises(TenureError) as caught:
        make_manifest("rayjob", spec, Settings(workspace="here", memory="much", claim="Not_A_Name"))
    assert [problem.where for problem in caught.value.problems] == ["--workspace", "--memory", "--claim"]


@pytest.mark.parametrize(("kind", "flag"), [("aws", "--region"), ("gcp", "--region"), ("onprem", "--host")])
def test_what_a_launcher_needs_is_asked_for(spec: Path, kind: str, flag: str) -> None:
    with pytest.raises(TenureError) as caught:
        make_manifest(kind, spec, PLAIN)
    assert caught.value.problems[0].where == flag


def test_the_command_writes_every_kind(spec: Path, tmp_path: Path) -> None:
    more = ["--region", "r", "--machine", "m", "--project", "p", "--host", "a", "--host", "b", "--claim", "c"]
    for kind in KINDS:
        out = tmp_path / f"{kind}.out"
        root = ["--workspace", SHARED, "cluster", "manifest", str(spec), "--for", kind, "--out", str(out)]
        ended = CliRunner().invoke(cli, [*root, *more])
        assert ended.exit_code == 0, ended.output
        assert out.stat().st_size > 300
