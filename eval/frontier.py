"""Loss against bits: what the accuracy records say of every model and scheme, as points and a table of recovery.

Recovery is full precision's perplexity over the scheme's, and for tasks that of their mean, as the row says it, or
else the mean over tasks of the scheme's score over full precision's. In the second case the 95 % interval is that of
independent runs, since a record holds standard errors and no documents: too wide, never too narrow.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atom.records import Row, read_record

from .compare import Z95
from .table import format_table

FULL = "full precision"
OPTION = " --"  # in the name of a way between a base and the limit that formats were chosen under


@dataclass(frozen=True)
class Point:
    """One way to run one model.

    bits      mean of weights' and activations' effective bits
    loss      nats a token beyond full precision, of the same text
    recovery  of perplexity, in percent
    tasks     recovery of task scores in percent and its 95 % interval (low, high), or None
    """

    model: str
    way: str
    bits: float
    bits_kv: float
    loss: float
    recovery: float
    tasks: tuple[float, float, float] | None = None


def read_points(paths: Iterable[Path]) -> list[Point]:
    """The points of accuracy records, of the reference path and each model's first text; the last row of a way counts.

    Raises ValueError if no row can be used.
    """
    points: dict[tuple[str, str], Point] = {}
    for path in paths:
        rows = [row for row in read_rows(path) if row["path"] == "reference" and row.get("ppl_fp")]
        rows = [row for row in rows if row.get("dtype") in (None, "float32")]
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row["model"], row["text"])
        rows = [row for row in rows if row["text"] == first[row["model"]]]
        full = {row["model"]: row for row in rows if is_full(row)}
        found = [_point(row, full.get(row["model"])) for row in rows if not is_full(row) and row["ppl"]]
        new = {(point.model, point.way): point for point in found}
        points |= {key: point for key, point in new.items() if key not in points}  # the first record's stays
    if not points:
        raise ValueError(
            "no row with a perplexity beside full precision's; name records accuracy-frontier.json or "
            "quality-presets.json"
        )
    return list(points.values())


def read_rows(path: Path) -> list[Row]:
    """The rows of a record file, checked against its schema."""
    return read_record(path.stem, path.absolute().parent.name, path.absolute().parent.parent).rows


def name_way(row: Row) -> str:
    """How a row's model ran: a method and what it rounds, a preset and its cache, or what a budget chose."""
    if is_full(row):
        return FULL
    if "choice" in row:  # quality-budget
        if row["limit"] is None:
            return f"{row['choice']}+{row['kv']}, GPTQ alone"
        return f"{row['base']}{OPTION}{row['choice']} {row['limit']:g}"
    if "method" in row:
        recent = f" r{row['kv_recent']}" if row.get("kv_recent") else ""  # as schemes' names have it
        return f"{row['method']} {row['scheme']}{recent}" + (", an earlier run" if row.get("earlier") else "")
    way = f"{row['scheme']}+{row['kv']}" + (", distilled" if row.get("distill_steps") else "")
    return way if row.get("cache", row["kv"]) == row["kv"] else f"{way}, through a {row['cache']} cache"


def is_full(row: Row) -> bool:
    """Whether a row is full precision's own."""
    return {row[name] for name in ("bits_weight", "bits_activation", "bits_kv")} == {16}


def recovery_table(points: Sequence[Point]) -> str:
    """One line a way, one column a model: recovery of perplexity in percent, and of tasks where they ran."""
    return format_table(*recovery_rows(points))


def recovery_rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of that table."""
    models = list(dict.fromkeys(point.model for point in points))
    found = {(point.way, point.model): point for point in points}
    has_tasks = [model for model in models if any(p.tasks for p in points if p.model == model)]
    header = ["recovery, %", *models, *(f"{model}, tasks" for model in has_tasks)]
    lines = []
    for way in dict.fromkeys(point.way for point in points):
        known = [found.get((way, model)) for model in models]
        cells = ["" if point is None else f"{point.recovery:.1f}" for point in known]
        for model in has_tasks:
            scored = found.get((way, model))
            cells.append(
                "" if scored is None or scored.tasks is None else "{:.1f} [{:.1f}, {:.1f}]".format(*scored.tasks)
            )
        lines.append([way, *cells])
    return header, lines


def _point(row: Row, full: Row | None) -> Point:
    loss = math.log(row["ppl"] / row["ppl_fp"])
    bits = (row["bits_weight"] + row["bits_activation"]) / 2
    tasks = None if full is None else task_recovery(row, full)
    return Point(row["model"], name_way(row), bits, row["bits_kv"], loss, 100 * math.exp(-loss), tasks)


def task_recovery(row: Row, full: Row) -> tuple[float, float, float] | None:
    """What is kept of full precision's task scores, in percent, with its 95 % interval; None where no task ran.

    The row's own recovery, of the mean over tasks with the interval of paired documents; of rows without it the mean of
    score / full score over the tasks that both hold, with the interval of independent runs.
    """
    if row.get("recovery") is not None:
        spread = row.get("recovery:95") or 0.0
        return row["recovery"], row["recovery"] - spread, row["recovery"] + spread
    names = [key for key in row if key.startswith("task:") and not key.endswith(":stderr") and full.get(key)]
    if not names:
        return None
    ratios = [row[name] / full[name] for name in names]
    variances = [_ratio_variance(row, full, name) for name in names]
    mean, spread = statistics.fmean(ratios), Z95 * math.sqrt(sum(variances)) / len(names)
    return 100 * mean, 100 * (mean - spread), 100 * (mean + spread)


def _ratio_variance(row: Row, full: Row, name: str) -> float:
    """Of score / full score, to first order."""
    parts: list[float] = []
    for which in (row, full):
        error: Any = which.get(f"{name}:stderr") or 0.0
        parts.append((error / which[name]) ** 2 if which[name] else 0.0)
    return float((row[name] / full[name]) ** 2 * sum(parts))
