"""Named lists of tasks, and the metric that speaks for a task where one number is wanted."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LOCAL = "_local"  # an offline copy of a task carries the upstream name with this ending


@dataclass(frozen=True)
class Suite:
    """Tasks that are run together; `num_fewshot` None leaves each task's own default."""

    tasks: tuple[str, ...]
    about: str
    num_fewshot: int | None = None


SUITES: dict[str, Suite] = {
    "zero-shot": Suite(
        ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande"),
        "the six tasks of most quantization papers, without examples",
        num_fewshot=0,
    ),
    "zero-shot-more": Suite(
        ("openbookqa", "sciq", "lambada_openai", "truthfulqa_mc1", "truthfulqa_mc2"),
        "five more, cheap ones",
        num_fewshot=0,
    ),
    "generative": Suite(
        ("gsm8k",), "reasoning over many generated tokens, which short tasks do not see; five examples"
    ),
    "long-context": Suite(("qasper_bool",), "yes/no questions on whole papers", num_fewshot=0),
}

# lm-eval reports several metrics for a task; published tables quote one.
PRIMARY = {
    **dict.fromkeys(("piqa", "arc_easy", "arc_challenge", "hellaswag", "openbookqa", "sciq"), "acc_norm"),
    "gsm8k": "exact_match,flexible-extract",
}


def primary_metric(task: str, metrics: Collection[str]) -> str:
    """The one metric of `metrics` (not empty) to quote for `task`: the published one, else acc, else the first."""
    for name in (PRIMARY.get(task.removesuffix(LOCAL), "acc"), "acc", "exact_match", "f1"):
        if name in metrics:
            return name
    return next(iter(metrics))


def expand(names: Sequence[str], available: Collection[str], preferred: Collection[str] = ()) -> dict[str, int | None]:
    """Tasks to run, in order, each with its few-shot count (None: the task's default).

    names      tasks, groups or suites, also several in one string with commas between
    available  all names that lm-eval knows
    preferred  names from the include path: a suite takes `<task>_local` from there where it lies there
    Raises ValueError for a name that is neither, with the closest known ones.
    """
    known, tasks = set(available), dict[str, int | None]()
    for name in (part.strip() for entry in names for part in entry.split(",")):
        if not name:
            continue
        if name in SUITES and name not in known:
            suite = SUITES[name]
            wanted = {t + LOCAL if t + LOCAL in preferred else t: suite.num_fewshot for t in suite.tasks}
        else:
            wanted = {name: None}
        for task, num_fewshot in wanted.items():
            if task not in known:
                raise ValueError(_unknown(task, known))
            tasks[task] = num_fewshot
    if not tasks:
        raise ValueError(f"no task was named; give lm-eval tasks or suites ({', '.join(SUITES)})")
    return tasks


def _unknown(task: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(task, [*known, *SUITES], n=4, cutoff=0.6)
    nearest = f"nearest are {', '.join(close)}" if close else f"the suites are {', '.join(SUITES)}"
    return f"unknown task {task!r}; {nearest}; `lm_eval ls tasks` lists all, --include-path DIR adds your own"
