"""Tasks of lm-evaluation-harness as suites, scored as the harness itself scores them.

A task brings its own prompts, which reach the model as the harness encodes them: so the figures are those of its own
command line. Names and files are looked up, and their data loaded, before anything is trained.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from training.data.items import Answered
from training.errors import TenureError, fail
from training.suite_spec import Harness

if TYPE_CHECKING:
    from training.evaluation.harness import HarnessModel

_FEW_SHOT_SEED = 1234  # the harness's own


def load_task(suite: Harness) -> Any:
    """The harness's task, with its data.

    Raises:
        TenureError: there is no such task, it is a group of tasks, its data is not on this machine, or the asked-for
            metric is no mean over items.
    """
    tasks = _loaded(suite)
    if len(tasks) != 1:
        names = ", ".join(list(tasks)[:8])
        raise fail(f"'{suite.harness}' is a group of {len(tasks)} tasks", suite.name, f"name one of them: {names}")
    task = next(iter(tasks.values()))
    if suite.few_shot is not None:
        task.set_config(key="num_fewshot", value=suite.few_shot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    score_of(suite, task)
    return task


def _loaded(suite: Harness) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    from_file = suite.harness.endswith((".yaml", ".yml"))
    manager = _manager(with_names=not from_file)
    if not from_file and suite.harness not in manager.task_index:
        close = difflib.get_close_matches(suite.harness, manager.all_tasks, n=3, cutoff=0.6)
        instead = f"did you mean {', '.join(close)}?" if close else "give a task's name, or the path of its YAML file"
        raise fail(f"lm-evaluation-harness has no task '{suite.harness}'", suite.name, instead)
    try:
        return dict(manager.load([suite.harness])["tasks"])
    except (OSError, DatasetsError, ImportError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _unloadable(suite, error) from None


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


def score_of(suite: Harness, task: Any) -> str:
    """The name of the task's metric that the suite is scored by.

    Raises:
        TenureError: the task has none of that name, or it is no mean over items of which more is better.
    """
    from lm_eval.api.metrics import mean

    aggregations, better = task.aggregation(), task.higher_is_better()
    fit = [name for name, how in aggregations.items() if how is mean and better.get(name, True)]
    chosen = suite.score or next(iter(fit), next(iter(aggregations)))
    if chosen in fit:
        return str(chosen)
    instead = f"set score: {fit[0]}" if fit else "write the items to a JSONL file, as a suite with a metric of Tenure's"
    if chosen not in aggregations:
        raise fail(f"the task '{suite.harness}' has no metric '{chosen}'", suite.name, instead)
    what = f"the metric '{chosen}' of the task '{suite.harness}' is no mean over items of which more is better"
    raise fail(what, suite.name, instead)


def hash_task(suite: Harness) -> str:
    """A hash of the task's settings and of the documents that are scored."""
    task = load_task(suite)
    settings = {key: str(value) for key, value in task.dump_config().items() if not callable(value)}
    documents = list(task.eval_docs)[: suite.limit]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def score_task(suite: Harness, language_model: HarnessModel) -> list[Answered]:
    """Every item's answer under the harness's own backend, in order.

    Raises:
        TenureError: a score is no share between 0 and 1.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from training.evaluation.harness import CPU_ROWS, GPU_ROWS

    task = load_task(suite)
    name = score_of(suite, task)
    rows = GPU_ROWS if language_model.device.type == "cuda" else CPU_ROWS
    plain = HFLM(pretrained=language_model.model, tokenizer=language_model.tokenizer, batch_size=rows)
    results = evaluate(
        plain,
        {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}},
        limit=suite.limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=suite.chat,
    )
    assert results is not None
    samples = results["samples"][task.task_name]
    first_filter = samples[0]["filter"]
    chosen = sorted((s for s in samples if s["filter"] == first_filter), key=lambda s: int(s["doc_id"]))
    return [_answered(suite, task, name, sample) for sample in chosen]


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
