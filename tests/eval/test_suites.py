"""Names of tasks: suites, commas, offline copies, and help for a wrong one."""

import pytest

from atom.eval.suites import SUITES, expand, primary_metric

KNOWN = [*SUITES["zero-shot"].tasks, "gsm8k", "piqa_local", "mmlu"]


def test_tasks_commas_and_suites() -> None:
    assert expand(["piqa, mmlu,", "gsm8k"], KNOWN) == {"piqa": None, "mmlu": None, "gsm8k": None}
    assert expand(["zero-shot"], KNOWN) == dict.fromkeys(SUITES["zero-shot"].tasks, 0)


def test_a_suite_takes_offline_copies_from_the_include_path() -> None:
    expanded = expand(["zero-shot"], KNOWN, preferred=["piqa_local"])
    assert [*expanded][:2] == ["piqa_local", "arc_easy"]
    assert [*expand(["piqa"], KNOWN, preferred=["piqa_local"])] == ["piqa"], "a name given is taken as it is"


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown task 'pika'; nearest are piqa; `lm_eval ls tasks`"):
        expand(["pika"], KNOWN)
    with pytest.raises(ValueError, match="the suites are zero-shot"):
        expand(["!"], KNOWN)
    with pytest.raises(ValueError, match="no task was named; give lm-eval tasks or suites"):
        expand([","], KNOWN)


def test_primary_metric() -> None:
    assert primary_metric("piqa_local", ["acc", "acc_norm"]) == "acc_norm"
    assert primary_metric("boolq", ["acc"]) == "acc"
    filters = ["exact_match,strict-match", "exact_match,flexible-extract"]
    assert primary_metric("gsm8k", filters) == filters[1]
    assert primary_metric("wikitext", ["word_perplexity", "bits_per_byte"]) == "word_perplexity"


def test_suites_name_tasks_that_lm_eval_has() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = tasks.__path__[0]
    from lm_eval.tasks import TaskManager

    folders = ("piqa", "arc", "super_glue/boolq", "hellaswag", "winogrande", "openbookqa", "sciq", "lambada")
    folders += ("truthfulqa", "gsm8k", "qasper")
    paths = [f"{folder}/{name}" for name in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = {task for suite in SUITES.values() for task in suite.tasks} - set(manager.all_tasks)
    assert not missing
