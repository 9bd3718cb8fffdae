"""Tasks of lm-evaluation-harness as suites, scored as the harness itself scores them.

A group or tag of tasks is one suite, whose items say which task they are of. A task brings its own prompts, which reach
the model as the harness encodes them: so the figures are those of its own command line. Names and files are looked up,
and their data loaded, before anything is trained.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.items import Answered
from training.errors import TenureError, fail
from training.suite_spec import Harness

if TYPE_CHECKING:
    from training.evaluation.harness import HarnessModel

_FEW_SHOT_SEED = 1234  # the harness's own
_OWN_SUITE = "write the items to a JSONL file, as a suite with a metric of Tenure's"
_ONE_BY_ONE = "its tasks share no such metric: list them as suites of their own"


@dataclass(frozen=True)
class HarnessTasks:
    """What a suite of the harness is made of: one task, or those of a group or tag, with their data.

    `by_size` says how a group's tasks are averaged: every item alike, or every task alike.
    """

    tasks: dict[str, Any]
    metric: str
    by_size: bool = True

    @property
    def is_group(self) -> bool:
        return len(self.tasks) > 1


def load_tasks(suite: Harness) -> HarnessTasks:
    """The task of the harness that a suite names, or all of its group or tag.

    Raises:
        TenureError: there is no such task, the data of one is not on this machine, or the asked-for metric is no mean
            over items in all of them.
    """
    found = _loaded(suite)
    tasks, group = dict(found["tasks"]), found["groups"].get(_group_name(found))
    for task in tasks.values():
        if suite.few_shot is not None:
            task.set_config(key="num_fewshot", value=suite.few_shot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    aggregated = list(group.aggregate_metric_list or ()) if group else []
    metric = score_of(suite, tasks, [config.metric for config in aggregated])
    by_size = next((config.weight_by_size for config in aggregated if config.metric == metric), True)
    return HarnessTasks(tasks, metric, by_size)


def _group_name(found: dict[str, Any]) -> str | None:
    """The group that was asked for: the one that is part of no other."""
    inner = {child for children in found["group_map"].values() for child in children}
    return next((name for name in found["groups"] if name not in inner), None)


def _loaded(suite: Harness) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        found = _found(suite)
    except (OSError, DatasetsError, ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unloadable(suite, error) from None
    if not found["tasks"]:
        raise fail(f"'{suite.harness}' is a group without tasks", suite.name, "name a group with tasks, or a task")
    return found


def _found(suite: Harness) -> dict[str, Any]:
    """What a name or file stands for. A group's file may name the tasks of other files in its folder."""
    if suite.harness.endswith((".yaml", ".yml")):
        path = Path(suite.harness)
        group = _group_in(path)
        return dict(_of_folder(path.parent, group) if group else _manager(with_names=False).load([suite.harness]))
    manager = _manager(with_names=True)
    if suite.harness not in manager.task_index:
        close = difflib.get_close_matches(suite.harness, manager.all_tasks, n=3, cutoff=0.6)
        instead = f"did you mean {', '.join(close)}?" if close else "give a task's name, or the path of its YAML file"
        raise fail(f"lm-evaluation-harness has no task '{suite.harness}'", suite.name, instead)
    return dict(manager.load([suite.harness]))


def _group_in(path: Path) -> dict[str, Any] | None:
    """What the file says where it describes a group. A task's file may name Python functions, so it is left alone."""
    import yaml

    class Tolerant(yaml.SafeLoader):
        pass

    Tolerant.add_multi_constructor("!", lambda *_: None)
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=Tolerant)
    return config if isinstance(config, dict) and "group" in config else None


def _of_folder(folder: Path, group: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    beside = TaskManager(include_path=folder, include_defaults=False)
    named = [child for child in group.get("task", []) if isinstance(child, str)]
    whole = all(name in beside.task_index for name in named)
    return (beside if whole else TaskManager(include_path=folder)).load([group["group"]])


def _unloadable(suite: Harness, error: Exception) -> TenureError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"the task '{suite.harness}' cannot be loaded: {type(error).__name__}: {reason}"
    instead = "its data must lie on this machine: in the Hugging Face cache, or as data_files of the task's own YAML"
    return fail(what, suite.name, instead)


@lru_cache(maxsize=2)
def _manager(*, with_names: bool) -> Any:
    """The harness's index of tasks; a task's file needs none of the thousands that it takes seconds to look through."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=with_names)


def score_of(suite: Harness, tasks: Mapping[str, Any], aggregated: Sequence[str] = ()) -> str:
    """The name of the metric that a suite's tasks are scored by: its own, the group's, or the first that all have.

    Raises:
        TenureError: a task has none of that name, or it is no mean over items of which more is better.
    """
    fit = [_means(task) for task in tasks.values()]
    shared = [name for name in (*aggregated, *fit[0]) if all(name in names for names in fit)]
    chosen = suite.score or next(iter(shared), None)
    if chosen in shared:
        return str(chosen)
    lacking = next((name for name, names in zip(tasks, fit, strict=True) if chosen not in names), suite.harness)
    chosen = chosen or next(iter(tasks[lacking].aggregation()))
    instead = f"set score: {shared[0]}" if shared else _OWN_SUITE if len(tasks) == 1 else _ONE_BY_ONE
    if chosen not in tasks[lacking].aggregation():
        raise fail(f"the task '{lacking}' has no metric '{chosen}'", suite.name, instead)
    what = f"the metric '{chosen}' of the task '{lacking}' is no mean over items of which more is better"
    raise fail(what, suite.name, instead)


def _means(task: Any) -> list[str]:
    """The metrics of a task that are means over items of which more is better."""
    from lm_eval.api.metrics import mean

    better = task.higher_is_better()
    return [name for name, how in task.aggregation().items() if how is mean and better.get(name, True)]


def hash_task(suite: Harness) -> str:
    """A hash of the settings of a suite's tasks and of the documents that are scored."""
    loaded = load_tasks(suite)
    digest = hashlib.sha256()
    for task in loaded.tasks.values():
        settings = {key: str(value) for key, value in task.dump_config().items() if not callable(value)}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for document in list(task.eval_docs)[: suite.limit]:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    if loaded.is_group:
        digest.update(json.dumps([loaded.metric, loaded.by_size]).encode())
    return digest.hexdigest()


def score_task(suite: Harness, language_model: HarnessModel) -> list[Answered]:
    """Every item's answer under the harness's own backend, task by task, in order. `limit` counts a task's items.

    Raises:
        TenureError: a score is no share between 0 and 1.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from training.evaluation.harness import CPU_ROWS, GPU_ROWS

    loaded = load_tasks(suite)
    rows = GPU_ROWS if language_model.device.type == "cuda" else CPU_ROWS
    plain = HFLM(pretrained=language_model.model, tokenizer=language_model.tokenizer, batch_size=rows)
    results = evaluate(
        plain,
        {"tasks": loaded.tasks, "groups": {}, "group_map": {}},
        limit=suite.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=suite.chat,
    )
    assert results is not None
    answers = {name: _of_task(suite, loaded, name, results["samples"][name]) for name in loaded.tasks}
    return _joined(answers, loaded) if loaded.is_group else next(iter(answers.values()))


def _of_task(suite: Harness, loaded: HarnessTasks, name: str, samples: list[dict[str, Any]]) -> list[Answered]:
    first_filter = samples[0]["filter"]
    chosen = sorted((s for s in samples if s["filter"] == first_filter), key=lambda s: int(s["doc_id"]))
    return [_answered(suite, loaded.tasks[name], loaded.metric, sample) for sample in chosen]


def _joined(answers: dict[str, list[Answered]], loaded: HarnessTasks) -> list[Answered]:
    """The items of all tasks, each with its task's name; where tasks count alike, those of a small one weigh more."""
    mean = sum(map(len, answers.values())) / len(answers)
    weights = {name: 1.0 if loaded.by_size else mean / len(items) for name, items in answers.items()}
    return [replace(item, part=name, weight=weights[name]) for name, items in answers.items() for item in items]


def _answered(suite: Harness, task: Any, name: str, sample: dict[str, Any]) -> Answered:
    score = sample[name]
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise fail(f"the metric '{name}' gave {score!r}, which is no share between 0 and 1", suite.name, "set score")
    prompt, expected = str(sample["arguments"][0][0]), str(sample["target"])
    if task.OUTPUT_TYPE != "multiple_choice":
        return Answered(prompt, expected, str(sample["filtered_resps"][0]), float(score), 1.0)
    choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    likelihoods = [float(response[0]) for response in sample["filtered_resps"][: len(choices)]]
    likeliest = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
    right = choices[sample["target"]] if isinstance(sample["target"], int) else expected
    return Answered(prompt, right, likeliest, float(score), 1.0, 1 / len(choices))
