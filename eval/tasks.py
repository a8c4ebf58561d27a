"""Tasks through lm-eval: find them, load their data, run them on an AtomLM, and read off metrics per task.

This file and lm.py are the only ones that import lm-eval, and both are imported when tasks are asked for.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from atom.errors import UnsupportedError

from .lm import AtomLM
from .results import Metric, TaskResult
from .suites import expand

BOOTSTRAP_ITERATIONS = 1000  # for the few metrics whose stderr has no formula; lm-eval's own 100,000 take minutes


@dataclass(frozen=True)
class Prepared:
    """Tasks with their data, ready to run: lm-eval's TaskDict, and the few-shot counts that suites ask for."""

    loaded: dict[str, Any]
    num_fewshot: dict[str, int | None]


def prepare_tasks(names: Sequence[str], include_path: str | None = None) -> Prepared:
    """Find tasks, groups and suites, and load their data.

    include_path  a folder of task files; the data files they name are looked for beside them and in the folders above
    Raises ValueError for an unknown task or a folder without task files, UnsupportedError if data cannot be loaded.
    """
    local = _local_manager(include_path)
    preferred = [] if local is None else local.all_tasks
    try:  # reading lm-eval's own 14,000 task files takes seconds; often the folder has all that is asked for
        wanted, manager = expand(names, preferred, preferred), local
    except ValueError:
        manager = TaskManager(include_path=include_path)
        wanted = expand(names, manager.all_tasks, preferred)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in wanted:
        for key, part in _load_one(manager, name, include_path).items():
            loaded[key].update(part)
    return Prepared(loaded, wanted)


def _local_manager(include_path: str | None) -> TaskManager | None:
    if include_path is None:
        return None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not manager.all_tasks:
        raise ValueError(f"--include-path {include_path} holds no task files; give a folder with lm-eval *.yaml files")
    return manager


def _load_one(manager: TaskManager, name: str, include_path: str | None) -> Any:
    entry = manager.task_index[name]
    spec: str | dict[str, Any] = name
    if include_path is not None and entry.kind is Kind.TASK and _lies_in(entry.yaml_path, include_path):
        spec = _with_absolute_data(entry.yaml_path)
    try:
        return manager.load([spec])
    except Exception as error:  # datasets raises whatever its transport or its readers do
        raise UnsupportedError(
            f"the data of task {name} could not be loaded ({type(error).__name__}: {error}); without a network give "
            "task files that name local data (--include-path DIR), or fill the Hugging Face cache first"
        ) from error


def _lies_in(path: Path | None, folder: str) -> bool:
    return path is not None and path.resolve().is_relative_to(Path(folder).resolve())


def _with_absolute_data(path: Path) -> dict[str, Any]:
    """The task file at `path`, the relative data files it names resolved, so that it runs from any folder."""
    config: dict[str, Any] = load_yaml(path, resolve_func=True)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if files:
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": _resolve(files, path.resolve())}
    return config


def _resolve(files: Any, task_file: Path) -> Any:
    """`files` (a name, a list, or split -> names): as given if it exists, else from the nearest folder above."""
    if isinstance(files, dict):
        return {split: _resolve(part, task_file) for split, part in files.items()}
    if isinstance(files, list):
        return [_resolve(part, task_file) for part in files]
    if Path(files).exists() or "://" in str(files):
        return files
    return next((str(folder / files) for folder in task_file.parents if (folder / files).exists()), files)


def run_tasks(
    lm: AtomLM,
    prepared: Prepared,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 1234,
    apply_chat_template: bool = False,
) -> tuple[TaskResult, ...]:
    """Run tasks; one result for each, and for each group whose scores lm-eval aggregates.

    limit        the first documents of each task
    num_fewshot  for all tasks; default: the suite's, or the task's own. A task that fixes 0 keeps 0, as in lm-eval
    seed         of Python, NumPy, torch and of the choice of examples; 1234 is lm-eval's own
    """
    for name, task in prepared.loaded["tasks"].items():
        shots = prepared.num_fewshot.get(name) if num_fewshot is None else num_fewshot
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
    outcome = lm_eval.simple_evaluate(
        model=lm,
        tasks=_top_level(prepared.loaded),
        task_manager=TaskManager(include_defaults=False),  # all tasks are loaded; its default reads the files again
        limit=limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=apply_chat_template,
    )
    assert outcome is not None, "one process, rank 0"
    results = (_task_result(outcome, name) for name in outcome["results"])
    return tuple(result for result in results if result.metrics)


def _top_level(loaded: dict[str, Any]) -> list[Any]:
    """Groups that no other group holds, and tasks that no group holds."""
    held = {child for children in loaded["group_map"].values() for child in children}
    both = {**loaded["groups"], **loaded["tasks"]}
    return [item for name, item in both.items() if name not in held]


def _task_result(outcome: Any, name: str) -> TaskResult:
    row: dict[str, Any] = outcome["results"][name]
    better = outcome["higher_is_better"].get(name, {})
    samples = outcome.get("samples", {}).get(name, [])
    metrics = {}
    for key, value in row.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{filter_name}")
        label = metric if filter_name == "none" else key
        metrics[label] = Metric(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            higher_is_better=bool(better.get(metric, True)),
            per_sample=_per_sample(samples, metric, filter_name),
        )
    return TaskResult(
        task=name,
        version=str(outcome["versions"].get(name)),
        num_fewshot=int(outcome["n-shot"].get(name) or 0),
        samples=int(outcome["n-samples"].get(name, {}).get("effective") or row.get("sample_len") or 0),
        fingerprint=_fingerprint(samples),
        metrics=metrics,
    )


def _per_sample(samples: Sequence[Any], metric: str, filter_name: str) -> tuple[float, ...] | None:
    """The metric of each document in order, or None where lm-eval has no number per document."""
    rows = sorted((s for s in samples if s["filter"] == filter_name), key=lambda s: s["doc_id"])
    values = [row.get(metric) for row in rows]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return tuple(float(value) for value in values)


def _fingerprint(samples: Sequence[Any]) -> str | None:
    """sha256 over the documents and prompts: two results are of the same questions where it is the same."""
    if not samples:
        return None
    digest = hashlib.sha256()
    for row in sorted(samples, key=lambda s: (s["doc_id"], s["filter"])):
        digest.update(f"{row['doc_hash']} {row['prompt_hash']} {row['target_hash']}\n".encode())
    return digest.hexdigest()[:16]
