"""Plots of measured throughput: one figure a question, each from rows of record `throughput`.

A group is what compares: one experiment, shape and workload. Within it a scheme keeps its colour in every figure.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atom.plots import load_matplotlib

from .report_data import workload_of

Row = dict[str, Any]

ORDER = ("bf16", "w8a8", "fp8", "w4a16", "w4a8", "w4a4", "nvint4", "nvfp4", "mxfp4", "w3a3")
ACROSS = "*: across commits"
COLOURS = {
    "bf16": "#7f7f7f",
    "w8a8": "#1f77b4",
    "fp8": "#17becf",
    "w4a16": "#bcbd22",
    "w4a8": "#ff7f0e",
    "w4a4": "#d62728",
    "nvint4": "#9467bd",
    "nvfp4": "#8c564b",
    "mxfp4": "#e377c2",
    "w3a3": "#2ca02c",
}


def group_rows(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """(experiment, shape, workload) -> its rows, in the order of their first appearance."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["experiment"], row["shape"], workload_of(row)), []).append(row)
    return groups


def label_of(row: Row) -> str:
    """Scheme and cache, w4a8+kv4 say; a 16-bit scheme's 16-bit cache goes without saying."""
    if row["scheme"] in ("bf16", "w4a16") and row["kv"] == "bf16":
        return str(row["scheme"])
    kv = {"int4": "kv4", "int8": "kv8", "fp8": "kvfp8", "bf16": "kv16"}[row["kv"]]
    return f"{row['scheme']}+{kv}"


def in_order(rows: Sequence[Row]) -> list[str]:
    """Labels of the rows, by scheme, then by cache from wide to narrow."""
    caches = ("bf16", "fp8", "int8", "int4")
    keys = {(_rank(row["scheme"]), caches.index(row["kv"]), label_of(row)) for row in rows}
    return [label for _, _, label in sorted(keys)]


def _rank(scheme: str) -> int:
    return ORDER.index(scheme) if scheme in ORDER else len(ORDER)


def memory_text(memory_gb: float) -> str:
    return f"{memory_gb:g} GiB" if memory_gb else "whole GPU"


def _style(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Colour by scheme; where one scheme stands there with several caches, the wider ones are dashed."""
    scheme = label.partition("+")[0]
    siblings = [other for other in in_order(rows) if other.partition("+")[0] == scheme]
    dashes = ("-", "--", ":", "-.")
    place = len(siblings) - 1 - siblings.index(label)
    return {"color": COLOURS.get(scheme, "black"), "linestyle": dashes[place % len(dashes)]}


def draw_group(rows: Sequence[Row], title: str, folder: Path, stem: str) -> list[Path]:
    """All figures that a group's rows allow, as PNG files; returns their paths.

    Raises UnsupportedError where matplotlib is not installed.
    """
    load_matplotlib("or use --no-plots")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"batch": _by_batch, "frontier": _frontier, "speedup": _speedups, "equal": _equal, "memory": _memory}
    found = []
    for name, draw in figures.items():
        path = folder / f"{stem}-{name}.png"
        if draw(rows, title, path):
            found.append(path)
    return found


def draw_loads(loads: Sequence[Row], folder: Path) -> list[Path]:
    """For each workload with several load runs: output tokens/s against TPOT, a curve for each label."""
    groups: dict[str, list[Row]] = {}
    for load in loads:
        if load["summary"]["tpot"] is not None:
            groups.setdefault(load["config"]["workload"], []).append(load)
    found = []
    for workload, mine in groups.items():
        if len(mine) < 2:
            continue
        load_matplotlib("or use --no-plots")
        figure, (axis,) = new_panels(1, f"Over HTTP: {workload}")
        for label in dict.fromkeys(load_label(load) for load in mine):
            points = [(x["summary"]["tpot"]["p50"], x["summary"]["out_tok_s"]) for x in mine if load_label(x) == label]
            axis.plot(*zip(*sorted(points, key=lambda p: p[1]), strict=True), marker="o", markersize=4, label=label)
        axis.set(xlabel="time per output token, median (ms)", ylabel="output tokens/s", xlim=(0, None), ylim=(0, None))
        set_legend([axis])
        path = folder / f"http-{file_stem(workload)}.png"
        save_figure(figure, path)
        found.append(path)
    return found


def load_label(load: Row) -> str:
    """What a load run's server is called."""
    return str(load["config"].get("label") or load["config"]["model"])


def file_stem(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _curves(rows: Sequence[Row]) -> dict[float, dict[str, list[Row]]]:
    """memory -> label -> its equal-batch rows by batch; labels of one point only are kept, as a dot."""
    found: dict[float, dict[str, list[Row]]] = {}
    for memory in dict.fromkeys(row["memory_gb"] for row in rows):
        mine = [r for r in rows if r["memory_gb"] == memory and r["batch_mode"] == "equal" and r["out_tok_s"]]
        curves = {x: sorted((r for r in mine if label_of(r) == x), key=lambda r: r["batch"]) for x in in_order(mine)}
        if curves:
            found[memory] = curves
    return found


def new_panels(count: int, title: str, width: float = 6.4, sharey: bool = True) -> tuple[Any, list[Any]]:
    """A figure of `count` axes side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width * count, 4.4), squeeze=False, sharey=sharey)
    figure.suptitle(title, fontsize=11)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def save_figure(figure: Any, path: Path) -> bool:
    """Write it as a file and forget it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
    return True


def _line(axis: Any, points: Sequence[Row], key: str, label: str, style: dict[str, Any]) -> None:
    """Output tokens a second over `key`; points of different commits are not joined, those of a second are hollow."""
    for index, source in enumerate(dict.fromkeys(origin(p) for p in points)):
        mine = [p for p in points if origin(p) == source]
        fill = {} if index == 0 else {"markerfacecolor": "white"}
        x, y = [p[key] for p in mine], [p["out_tok_s"] for p in mine]
        axis.plot(x, y, marker="o", markersize=4, label="_" * bool(index) + label, **style, **fill)


def _hollow(panels: dict[float, dict[str, list[Row]]]) -> list[str]:
    """The legend's word on hollow points, if there are any."""
    curves = [points for found in panels.values() for points in found.values()]
    return ["hollow: of another commit"] * any(len({origin(p) for p in points}) > 1 for points in curves)


def _by_batch(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Output tokens a second against the batch; what the GPU allows, where known, as thin lines of the same colour."""
    panels = _curves(rows)
    if not panels or max(len(points) for curves in panels.values() for points in curves.values()) < 2:
        return False
    figure, axes = new_panels(len(panels), f"Throughput by batch: {title}")
    for axis, (memory, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            style = _style(label, rows)
            _line(axis, points, "batch", label, style)
            bounds = [(p["batch"], p["bound_tok_s"]) for p in points if p.get("bound_tok_s")]
            if len(bounds) > 1:
                axis.plot(*zip(*bounds, strict=True), color=style["color"], linewidth=0.7, alpha=0.6)
        axis.set_xscale("log", base=2)
        ticks = sorted({p["batch"] for points in curves.values() for p in points})
        axis.set_xticks(_spaced(ticks), [str(t) for t in _spaced(ticks)])
        axis.minorticks_off()
        axis.set(xlabel="requests under way", title=memory_text(memory))
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("output tokens/s")
    has_bounds = any(row.get("bound_tok_s") for row in rows)
    set_legend(axes, "\n".join((["thin: what the GPU allows"] if has_bounds else []) + _hollow(panels)) or None)
    return save_figure(figure, path)


def _frontier(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Output tokens a second against the time per output token that clients saw; up and to the left is better."""
    panels = {
        memory: {label: [p for p in points if p["tpot_ms_p50"]] for label, points in curves.items()}
        for memory, curves in _curves(rows).items()
    }
    if max((len(points) for curves in panels.values() for points in curves.values()), default=0) < 2:
        return False
    figure, axes = new_panels(len(panels), f"Throughput against latency: {title}")
    targets = sorted({row["tpot_target_ms"] for row in rows if row["tpot_target_ms"] is not None})
    for axis, (memory, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            _line(axis, points, "tpot_ms_p50", label, _style(label, rows))
        longest = max((p["tpot_ms_p50"] for points in curves.values() for p in points), default=0)
        for target in targets:
            if target <= 1.5 * longest:  # one far beyond all that was measured would squeeze it into a corner
                axis.axvline(target, color="0.4", linewidth=0.8, linestyle=(0, (2, 2)))
                axis.text(target, 1.0, f" {target:g} ms", transform=axis.get_xaxis_transform(), fontsize=8, va="bottom")
        axis.set(xlabel="time per output token, median (ms)", xlim=(0, None))
        axis.set_title(memory_text(memory), pad=14)
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("output tokens/s")
    set_legend(axes, "".join(_hollow(panels)) or None)
    return save_figure(figure, path)


def _speedups(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Each scheme's best against that of the first, in the same memory under the same target."""
    best = [row for row in rows if row["batch_mode"] == "best" and row["out_tok_s"]]
    labels = in_order(best)
    settings = list(dict.fromkeys((row["memory_gb"], row["tpot_target_ms"]) for row in best))
    if len(labels) < 2:
        return False
    figure, (axis,) = new_panels(1, f"Speed-up over {labels[0]} at the best batch: {title}", 2.2 + 1.15 * len(labels))
    groups = {s: {label_of(r): r for r in best if (r["memory_gb"], r["tpot_target_ms"]) == s} for s in settings}
    with_base = [setting for setting in settings if labels[0] in groups[setting]]
    width, is_across = 0.8 / max(1, len(with_base)), False
    for setting in settings:
        memory, target = setting
        text = memory_text(memory) + ("" if target is None else f", TPOT at most {target:g} ms")
        if setting not in with_base:
            axis.bar([0], [0], color="none", label=f"{text}: {labels[0]} meets it at no batch")
            continue
        index, rates, base = with_base.index(setting), groups[setting], groups[setting][labels[0]]
        places = [i + (index - (len(with_base) - 1) / 2) * width for i, label in enumerate(labels) if label in rates]
        ratios = [ratio_of(rates[label], base) for label in labels if label in rates]
        heights = [ratio.value for ratio in ratios]
        shades = [COLOURS.get(label.partition("+")[0], "black") for label in labels if label in rates]
        alpha = 1.0 - 0.6 * index / max(1, len(with_base) - 1)
        bars = axis.bar(places, heights, width * 0.92, color=shades, alpha=alpha)
        axis.bar_label(bars, [ratio.text() for ratio in ratios], fontsize=8, padding=2)
        is_across = is_across or any(ratio.is_across for ratio in ratios)
        axis.bar([0], [0], color="0.3", alpha=alpha, label=text)  # the legend's key, in grey
    axis.axhline(1, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(labels)), labels)
    axis.set(ylabel="times as many output tokens/s")
    axis.margins(y=0.12)
    axis.grid(False, axis="x")
    across = ACROSS if is_across else None
    axis.legend(fontsize=8, frameon=False, loc="upper left", title=across, title_fontsize=7, alignment="left")
    return save_figure(figure, path)


@dataclass(frozen=True)
class Ratio:
    """Times as fast; is_across: of two commits, whose differences are in it."""

    value: float
    is_across: bool = False

    def text(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f}{'*' if self.is_across else ''}"


def origin(row: Row) -> str | None:
    """Where a row says that it is from, if not from its record's commit."""
    return row.get("source") or row.get("commit")


def ratio_of(row: Row, base: Row) -> Ratio:
    """Output tokens a second of one row over those of another."""
    return Ratio(row["out_tok_s"] / base["out_tok_s"], origin(row) != origin(base))


def equal_ratios(rows: Sequence[Row]) -> dict[int, dict[str, Ratio]]:
    """batch -> label -> times as fast as the first scheme at the same batch, in whatever memory each was fastest."""
    equal = [row for row in rows if row["batch_mode"] == "equal" and row["out_tok_s"] and row.get("rate") is None]
    labels = in_order(equal)
    found: dict[int, dict[str, Ratio]] = {}
    for batch in sorted({row["batch"] for row in equal}):
        best: dict[str, Row] = {}
        for row in equal:
            if row["batch"] == batch:
                best[label_of(row)] = max(best.get(label_of(row), row), row, key=lambda r: float(r["out_tok_s"]))
        if labels[0] in best and len(best) > 1:
            found[batch] = {label: ratio_of(best[label], best[labels[0]]) for label in labels if label in best}
    return found


def _equal(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Each scheme against the first at equal batches; for one batch alone there is no figure."""
    ratios = equal_ratios(rows)
    if len(ratios) < 2:
        return False
    labels = [label for label in in_order(rows) if any(label in found for found in ratios.values())]
    figure, (axis,) = new_panels(1, f"Speed-up over {labels[0]} at equal batches: {title}", 2.2 + 1.3 * len(ratios))
    width = 0.84 / len(labels)
    for index, label in enumerate(labels):
        places = [
            i + (index - (len(labels) - 1) / 2) * width for i, found in enumerate(ratios.values()) if label in found
        ]
        held = [found[label] for found in ratios.values() if label in found]
        style = _style(label, rows)
        hatch = "//" if style["linestyle"] != "-" else None
        heights = [ratio.value for ratio in held]
        bars = axis.bar(
            places, heights, width * 0.92, color=style["color"], label=label, hatch=hatch, edgecolor="white"
        )
        axis.bar_label(bars, [ratio.text(1) for ratio in held], fontsize=7, padding=2)
    axis.axhline(1, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(ratios)), [str(batch) for batch in ratios])
    axis.set(xlabel="requests under way", ylabel="times as many output tokens/s")
    axis.margins(y=0.12)
    axis.grid(False, axis="x")
    is_across = any(ratio.is_across for found in ratios.values() for ratio in found.values())
    set_legend([axis], ACROSS if is_across else None)
    return save_figure(figure, path)


_WORKING = (  # row key, grey, name of what is neither weights nor cache
    ("step_gb", "0.45", "a step's activations"),
    ("graphs_gb", "0.6", "kept for graphs"),
    ("others_gb", "0.75", "CUDA, kernels"),
)


def _memory(rows: Sequence[Row], title: str, path: Path) -> bool:
    """What the memory holds: weights, the KV cache with the tokens that it holds, and what steps need to work in."""
    known = [row for row in rows if row.get("weight_gb") and row.get("kv_gb")]
    panels = {}
    for memory in dict.fromkeys(row["memory_gb"] for row in known):
        mine = {label_of(row): row for row in known if row["memory_gb"] == memory}
        panels[memory] = [(label, mine[label]) for label in in_order(list(mine.values()))]
    if not panels:
        return False
    figure, axes = new_panels(len(panels), f"Memory: {title}", 5.6, sharey=False)
    for axis, (memory, bars) in zip(axes, panels.items(), strict=True):
        names = [label for label, _ in bars]
        weights, caches = ([row[key] / 1.073741824 for _, row in bars] for key in ("weight_gb", "kv_gb"))
        axis.bar(names, weights, color="#4c72b0", label="weights")
        axis.bar(names, caches, bottom=weights, color="#dd8452", label="KV cache")
        if memory:
            bottoms = [w + c for w, c in zip(weights, caches, strict=True)]
            for key, shade, name in _WORKING if all(row.get("step_gb") is not None for _, row in bars) else ():
                parts = [row[key] / 1.073741824 for _, row in bars]
                axis.bar(names, parts, bottom=bottoms, color=shade, label=name)
                bottoms = [b + p for b, p in zip(bottoms, parts, strict=True)]
            rest = [max(0.0, memory - b) for b in bottoms]
            if max(rest) > 0.005 * memory:
                axis.bar(names, rest, bottom=bottoms, color="0.85", label="activations, graphs, CUDA")
            axis.axhline(memory, color="0.3", linewidth=0.9, linestyle="--", label="budget")
        for place, (w, c) in enumerate(zip(weights, caches, strict=True)):
            share = max(w + c, 1e-9)
            tokens = bars[place][1].get("kv_tokens")
            held = f"\n{_thousands(tokens)}\ntokens" if tokens else ""
            for height, middle, text in ((w, w / 2, f"{w:.3g}"), (c, w + c / 2, f"{c:.3g}{held}")):
                if height > 0.05 * share:
                    axis.text(place, middle, text, ha="center", va="center", fontsize=8, color="white")
        axis.set_title(memory_text(memory))
        axis.margins(y=0.1)
        axis.tick_params(axis="x", rotation=30)
        axis.grid(False, axis="x")
    axes[0].set_ylabel("GiB")
    set_legend(axes)
    return save_figure(figure, path)


def _thousands(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 999_500 else f"{count / 1e3:.0f}k"


def _spaced(ticks: list[int]) -> list[int]:
    """Those of ascending ticks that do not run into each other on a logarithmic axis."""
    kept: list[int] = []
    for tick in ticks:
        if not kept or tick >= 1.35 * kept[-1]:
            kept.append(tick)
    return kept


def set_legend(axes: Sequence[Any], title: str | None = None) -> None:
    """Beside the last panel, not over the curves; with what is drawn in any of them."""
    drawn = dict(pair for axis in axes for pair in zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = sorted(drawn, key=lambda label: _rank(label.partition("+")[0]))
    axes[-1].legend(
        [drawn[label] for label in labels],
        labels,
        fontsize=8,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        title=title,
        title_fontsize=7,
    )
