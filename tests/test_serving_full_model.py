"""A fully tuned model beside its base: two engines behind one endpoint, on the CPU."""

from __future__ import annotations

from pathlib import Path

from probing import free_port, teacher_forced
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from serving.app import ServedModels
from serving.client import ask
from serving.endpoint import TOLERANCES, Probes, deploy


def test_a_full_model_gets_its_own_engine(ray_cluster: None, tmp_path: Path) -> None:
    base, tuned = (make_tiny_model(tmp_path / f"model-{seed}", seed) for seed in (0, 1))
    probes: Probes = {
        "base": teacher_forced(AutoModelForCausalLM.from_pretrained(base)),
        "tuned": teacher_forced(AutoModelForCausalLM.from_pretrained(tuned)),
    }
    served = ServedModels("tiny", base, "tiny-full-1", tuned, adapter_rank=None)
    with deploy(served, probes, port=free_port(), on_progress=print) as endpoint:
        answers = ask("What is it?", endpoint.base_url, None, max_tokens=16)
        assert set(answers) == {"tiny", "tiny-full-1"}
        assert answers["tiny"] != answers["tiny-full-1"]
        assert endpoint.parity["tiny-full-1"].largest < TOLERANCES["float32"].largest
