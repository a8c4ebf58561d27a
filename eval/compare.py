"""Evaluations side by side: `atom report eval A.json B.json ...`, A the baseline (full precision), B what it became.

Recovery is 100 % where B is as good as A: B/A for a score, A/B for a perplexity. Where both ran the same documents or
windows the interval is that of the paired difference, which is far narrower than what the two standard errors suggest.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .perplexity import Perplexity
from .results import EvalResult, Metric, TaskResult
from .table import format_table

Z95 = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Comparison:
    """One measure. `recovery` is in percent, None where A is 0; `low` and `high` bound it (95 %), None if unknown."""

    measure: str
    a: float
    b: float
    recovery: float | None
    low: float | None
    high: float | None
    is_paired: bool


def compare(a: EvalResult, b: EvalResult) -> list[Comparison]:
    """Every text and every task's primary metric that both evaluations hold, texts first, the mean of the tasks last.

    Raises ValueError if nothing is common, or if a common text or task was measured in different ways.
    """
    rows = [_compare_text(p, q) for p in a.perplexity for q in b.perplexity if p.text == q.text]
    rows += [_compare_task(t, u) for t in a.tasks for u in b.tasks if t.task == u.task]
    if not rows:
        raise ValueError(
            f"the evaluations of {a.model} and {b.model} have no text or task in common; "
            "run both with the same --ppl and --tasks"
        )
    average = compare_average(a, b)
    return rows if average is None else [*rows, average]


def compare_average(a: EvalResult, b: EvalResult) -> Comparison | None:
    """The mean over all tasks that both hold and whose scores are better when higher.

    Its interval is that of the paired documents, unknown where the two ran different ones. None for fewer than two
    tasks, or where A has none right.
    """
    common = [(t, u) for t in a.tasks for u in b.tasks if t.task == u.task and t.primary[1].higher_is_better]
    if len(common) < 2:
        return None
    scores = [(t.primary[1].value, u.metrics[t.primary[0]].value) for t, u in common]
    mean_a, mean_b = (statistics.fmean(pair[side] for pair in scores) for side in (0, 1))
    if mean_a == 0:
        return None
    recovery, half = 100 * mean_b / mean_a, None
    is_paired = all(t.fingerprint is not None and t.fingerprint == u.fingerprint for t, u in common)
    if is_paired:
        recovery, half = average_recovery([t for t, _ in common], [u for _, u in common])
    low, high = (None, None) if half is None else (recovery - half, recovery + half)
    return Comparison(f"mean of {len(common)} tasks", mean_a, mean_b, recovery, low, high, is_paired)


def _refuse_unlike(what: str, a: Any, b: Any, names: Sequence[str]) -> None:
    for name in names:
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{what}: {name} is {getattr(a, name)!r} in the first evaluation, {getattr(b, name)!r} in the second; "
                "numbers compare only under one protocol: run both with the same options"
            )


def _compare_text(p: Perplexity, q: Perplexity) -> Comparison:
    _refuse_unlike(f"text {p.text}", p, q, ("sha256", "tokenizer", "window", "bos", "windows"))
    differences = [y - x for x, y in zip(p.window_nll, q.window_nll, strict=True)]
    mean = statistics.fmean(differences)  # log of the ratio of perplexities
    if len(differences) < 2:
        low = high = None
    else:
        half = Z95 * statistics.stdev(differences) / math.sqrt(len(differences))
        low, high = 100 * math.exp(-mean - half), 100 * math.exp(-mean + half)
    return Comparison(f"ppl {p.text}", p.perplexity, q.perplexity, 100 * math.exp(-mean), low, high, True)


def _compare_task(t: TaskResult, u: TaskResult) -> Comparison:
    _refuse_unlike(f"task {t.task}", t, u, ("version", "num_fewshot", "samples"))
    name, a = t.primary
    b = u.metrics[name]
    is_paired = (
        t.fingerprint is not None and t.fingerprint == u.fingerprint and None not in (a.per_sample, b.per_sample)
    )
    if not a.higher_is_better:
        a, b = b, a
    values = (a.value, b.value) if t.metrics[name].higher_is_better else (b.value, a.value)
    if a.value == 0:
        return Comparison(f"{t.task} {name}", *values, None, None, None, is_paired)
    recovery = 100 * b.value / a.value
    half = _paired(a, b) if is_paired else _unpaired(a, b)
    low, high = (None, None) if half is None else (recovery - half, recovery + half)
    return Comparison(f"{t.task} {name}", *values, recovery, low, high, is_paired)


def _paired(a: Metric, b: Metric) -> float | None:
    """Half the interval of 100 mean(b)/mean(a), by the delta method for a ratio of means over the same documents."""
    assert a.per_sample is not None and b.per_sample is not None
    if len(a.per_sample) < 2 or len(a.per_sample) != len(b.per_sample):
        return None
    ratio = b.value / a.value
    residuals = [(y - ratio * x) / a.value for x, y in zip(a.per_sample, b.per_sample, strict=True)]
    return 100 * Z95 * statistics.stdev(residuals) / math.sqrt(len(residuals))


def _unpaired(a: Metric, b: Metric) -> float | None:
    if a.stderr is None or b.stderr is None or b.value == 0:
        return None
    relative = math.hypot(a.stderr / a.value, b.stderr / b.value)
    return 100 * Z95 * (b.value / a.value) * relative


def average_recovery(a: Sequence[TaskResult], b: Sequence[TaskResult]) -> tuple[float, float | None]:
    """100 times B's mean over tasks by A's, and half of its 95 % interval from the paired documents (None: unknown).

    Raises ValueError if the two are not of the same tasks, documents and metrics.
    """
    if [task.fingerprint for task in a] != [task.fingerprint for task in b] or not a:
        raise ValueError("an average compares only over the same documents of the same tasks")
    pairs = [(t.primary[1], u.metrics[t.primary[0]]) for t, u in zip(a, b, strict=True)]
    mean_a, mean_b = (statistics.fmean(pair[side].value for pair in pairs) for side in (0, 1))
    if mean_a == 0:
        raise ValueError("nothing is kept of an average of 0")
    ratio, variance = mean_b / mean_a, 0.0
    for x, y in pairs:
        if x.per_sample is None or y.per_sample is None or len(x.per_sample) < 2:
            return 100 * ratio, None
        residuals = [q - ratio * p for p, q in zip(x.per_sample, y.per_sample, strict=True)]
        variance += statistics.variance(residuals) / len(residuals) / len(pairs) ** 2
    return 100 * ratio, 100 * Z95 * math.sqrt(variance) / mean_a


def compare_table(a: EvalResult, b: EvalResult, rows: Sequence[Comparison]) -> str:
    """The comparison for people."""
    lines = [[row.measure, f"{row.a:.4f}", f"{row.b:.4f}", _percent(row.recovery), _interval(row)] for row in rows]
    heading = f"A: {_title(a)}\nB: {_title(b)}"
    return heading + "\n\n" + format_table(["measure", "A", "B", "recovery", "95 % interval"], lines)


def recovery_table(a: EvalResult, others: Sequence[tuple[EvalResult, Sequence[Comparison]]]) -> str:
    """Several evaluations against the baseline `a`, each with its rows: one column each, with intervals."""
    names = [chr(ord("B") + number) for number in range(len(others))]
    heading = [f"A: {_title(a)}", *(f"{name}: {_title(b)}" for name, (b, _) in zip(names, others, strict=True))]
    found = [{row.measure: row for row in rows} for _, rows in others]
    measures = dict.fromkeys(measure for rows in found for measure in rows)
    lines = []
    for measure in measures:
        known = [rows.get(measure) for rows in found]
        baseline = next(row.a for row in known if row is not None)
        cells = ["" if row is None else f"{_percent(row.recovery)} {_interval(row)}".rstrip() for row in known]
        lines.append([measure, f"{baseline:.4f}", *cells])
    header = ["measure", "A", *(f"recovery of {name}, 95 % interval" for name in names)]
    return "\n".join(heading) + "\n\n" + format_table(header, lines)


def _title(result: EvalResult) -> str:
    return f"{result.model} ({result.scheme_name}, {result.path})"


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f} %"


def _interval(row: Comparison) -> str:
    if row.low is None or row.high is None:
        return ""
    return f"{row.low:.2f} to {row.high:.2f}" + ("" if row.is_paired else " (unpaired)")
