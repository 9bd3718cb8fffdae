"""Ten digits of 8 x 8 pixels learned in five tasks: what plain tuning forgets, and the protections keep."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual import Method, Setup, Task, batches, learn

SETUP = Setup(hidden=64, outputs=10, steps=100, batch_size=32, resets=True, learning_rate=5e-3)
SEEDS = (1, 2)
METHODS = {
    "none": Method(),
    "ewc": Method("ewc", 1e3, examples=60),
    "ewc proximal": Method("ewc", 1e5, examples=60, update="proximal"),
    "ewc batch": Method("ewc", 1e3, estimator="batch", examples=60),
    "si": Method("si", 5.0),
}


def digit_tasks() -> list[Task]:
    """Two digits a task, each with outputs of its own; every second example is for testing."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    tasks = []
    for first in range(0, 10, 2):
        rows = torch.nonzero(labels // 2 == first // 2)[:, 0]
        train, test = rows[::2], rows[1::2]
        outputs = slice(first, first + 2)
        tasks.append(Task(images[train], labels[train] - first, images[test], labels[test] - first, outputs))
    return tasks


@pytest.fixture(scope="module")
def averages() -> dict[str, float]:
    """Accuracy over all five tasks after the last, the mean over the seeds."""
    tasks = digit_tasks()
    return {
        name: sum(learn(tasks, method, SETUP, seed).average for seed in SEEDS) / len(SEEDS)
        for name, method in METHODS.items()
    }


def test_plain_tuning_forgets(averages: dict[str, float]) -> None:
    assert averages["none"] < 0.93


@pytest.mark.parametrize("name", ["ewc", "ewc proximal", "si"])
def test_a_protection_keeps_old_tasks(averages: dict[str, float], name: str) -> None:
    assert averages[name] > averages["none"] + 0.02, averages


def test_squares_of_batch_gradients_do_not_protect(averages: dict[str, float]) -> None:
    assert averages["ewc"] > averages["ewc batch"] + 0.03, averages


def test_batches_take_every_example_once_an_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    found = list(batches(10, 4, 5, generator))
    assert [len(rows) for rows in found] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat(found[:3]).tolist()) == list(range(10))
