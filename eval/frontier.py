"""Loss against bits: what the accuracy records say of every model and scheme, as a table and a plot.

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

from atom.plots import load_matplotlib
from atom.records import Row, read_record

from .compare import Z95
from .table import format_table

PLOT = "loss_against_bits.png"
COLUMNS = 3  # of panels in the plot


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
    """The points of records accuracy-frontier and quality-presets, of the reference path and each model's first text.

    Raises ValueError if no row can be used.
    """
    points: list[Point] = []
    for path in paths:
        record = read_record(path.stem, path.absolute().parent.name, path.absolute().parent.parent)
        rows = [row for row in record.rows if row["path"] == "reference" and row.get("ppl_fp")]
        rows = [row for row in rows if row.get("dtype") in (None, "float32")]
        first: dict[str, str] = {}
        for row in rows:
            first.setdefault(row["model"], row["text"])
        rows = [row for row in rows if row["text"] == first[row["model"]]]
        full = {row["model"]: row for row in rows if is_full(row)}
        points += [_point(row, full.get(row["model"])) for row in rows if not is_full(row) and row["ppl"]]
    if not points:
        raise ValueError(
            "no row with a perplexity beside full precision's; name records accuracy-frontier.json or "
            "quality-presets.json"
        )
    return list({(point.model, point.way): point for point in points}.values())


def is_full(row: Row) -> bool:
    """Whether a row is full precision's own."""
    return {row[name] for name in ("bits_weight", "bits_activation", "bits_kv")} == {16}


def recovery_table(points: Sequence[Point]) -> str:
    """One line a way, one column a model: recovery of perplexity in percent, and of tasks where they ran."""
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
    return format_table(header, lines)


def draw_frontier(points: Sequence[Point], directory: Path) -> Path:
    """Write a plot of loss against bits, one panel a model, into `directory`; its path.

    The cache alone has no place on this axis: it is left out. Raises UnsupportedError where matplotlib is not there.
    """
    load_matplotlib()
    from matplotlib import pyplot

    points = [point for point in points if point.bits < 16] or list(points)
    models = list(dict.fromkeys(point.model for point in points))
    ways = list(dict.fromkeys(point.way for point in points))
    columns = min(len(models), COLUMNS)
    rows = -(-len(models) // columns)
    size = (4 * columns + 2, 3.6 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for axis in axes.flat[len(models) :]:
        axis.set_axis_off()
    for axis, model in zip(axes.flat, models, strict=False):
        for number, way in enumerate(ways):
            here = [point for point in points if point.model == model and point.way == way]
            marker = "osD^v<>PX*"[number // 10 % 10]
            axis.scatter(
                [p.bits for p in here], [max(p.loss, 1e-4) for p in here], label=way, c=f"C{number % 10}", marker=marker
            )
        axis.set(title=model, xlabel="bits, mean of weights and activations", yscale="log")
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("loss, nats a token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper right", fontsize=7)
    figure.tight_layout(rect=(0, 0, 1 - 2 / size[0], 1))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PLOT
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _point(row: Row, full: Row | None) -> Point:
    way = f"{row['method']} {row['scheme']}" if "method" in row else f"{row['scheme']}+{row['kv']}"
    if row.get("distill_steps") and "method" not in row:
        way += ", distilled"
    loss = math.log(row["ppl"] / row["ppl_fp"])
    bits = (row["bits_weight"] + row["bits_activation"]) / 2
    tasks = None if full is None else task_recovery(row, full)
    return Point(row["model"], way, bits, row["bits_kv"], loss, 100 * math.exp(-loss), tasks)


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
