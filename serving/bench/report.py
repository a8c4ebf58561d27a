"""`atom report bench`: measured throughput as Markdown, JSON, plots, and one HTML file that needs nothing beside it."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atom.kernels.bounds import GPUS, Gpu

from .comparison import compare_all, comparison_table
from .goal_report import PARTS, goals_table, missed_goals
from .overview import draw_overviews
from .plots import (
    ACROSS,
    Ratio,
    draw_group,
    draw_loads,
    equal_ratios,
    file_stem,
    group_rows,
    in_order,
    label_of,
    load_label,
    memory_text,
    ratio_of,
)
from .report_data import BenchData
from .shares import shares_table
from .side_by_side import quality_tables
from .tables import cell, markdown_table

Row = dict[str, Any]
Part = tuple[str, str, Any]  # (kind, heading or alt text, content): kinds are heading, text, table, plot


def write_report(data: BenchData, folder: Path, title: str, plots: bool = True) -> list[Path]:
    """Write report.md, report.json, report.html and the plots into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = report_parts(data, folder if plots else None)
    text, page, raw = folder / "report.md", folder / "report.html", folder / "report.json"
    text.write_text(to_markdown(title, parts), encoding="utf-8")
    page.write_text(to_html(title, parts), encoding="utf-8")
    found = {
        name: getattr(data, name) for name in ("rows", "quality", "latency", "profile", "served", "loads", "sources")
    } | {"title": title}
    found["speedups"] = [row for rows in group_rows(data.rows).values() for row in speedup_rows(rows)]
    raw.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [text, page, raw, *(content for kind, _, content in parts if kind == "plot")]


def report_parts(data: BenchData, plots: Path | None) -> list[Part]:
    """The report's content in order. Raises ValueError if there is none."""
    if not (data.rows or data.loads or data.quality or data.latency or data.profile or data.served):
        raise ValueError("the files hold no measurement; run atom bench sweep or atom bench serve --output first")
    parts: list[Part] = []
    for (experiment, shape, workload), rows in group_rows(data.rows).items():
        name = f"{shape}, {workload} ({experiment})"
        parts.append(("heading", name, None))
        if any(row["batch_mode"] == "best" for row in rows):
            parts.append(("table", "Best batch of each scheme", best_table(rows)))
        if any(row["batch_mode"] == "equal" for row in rows):
            parts.append(("table", "Equal batches: output tokens/s", batch_table(rows)))
        if ratios := equal_ratios(rows):
            parts.append(("table", "Equal batches: times the first scheme's", ratio_table(ratios)))
        if plots is not None:
            for path in draw_group(rows, f"{shape}, {workload}", plots, file_stem(f"{experiment}-{shape}-{workload}")):
                parts.append(("plot", path.stem, path))
        parts += [("text", "", f"{text}.") for text in remarks(rows)]
        bad = sum(row.get("errors") or 0 for row in rows if row["batch_mode"] == "equal")
        if bad:
            parts.append(("text", "", f"{bad} requests failed in these runs; they count as errors, not as answers."))
    if plots is not None and (overviews := draw_overviews(data.rows, plots)):
        parts.append(("heading", "All lengths", None))
        parts += [("plot", path.stem, path) for path in overviews]
    if data.latency:
        parts.append(("heading", "Decode steps", None))
        parts.append(
            ("table", "Milliseconds, beside what the GPU's memory and tensor cores allow", latency_table(data))
        )
    if (shares := shares_table(data.rows, data.latency))[1]:
        parts.append(("heading", "Each scheme against its own floor", None))
        parts.append(("table", "Of what bytes and operations allow; baselines as well as ours", shares))
    if compared := compare_all(data.rows, data.latency):
        parts.append(("heading", "4 bits against bf16 and FP8", None))
        parts.append(("table", "Times as fast; within 1 % is not slower", comparison_table(compared)))
    if (gpu := gpu_of(data)) is not None and (goals := goals_table(data.rows, gpu))[1]:
        parts.append(("heading", "Goals", None))
        parts.append(("table", "Output tokens a second, or times those of another scheme in the same setting", goals))
        parts += [("text", "", text) for text in missed_goals(data.rows, data.profile, gpu)]
    if data.profile:
        parts.append(("heading", "Where the time goes", None))
        parts.append(("table", "Shares of the GPU's time under load, and steps in milliseconds", profile_table(data)))
    if data.quality:
        parts.append(("heading", "Quality, speed and memory side by side", None))
        parts += [("table", name, table) for name, table in quality_tables(data)]
    if data.served:
        parts.append(("heading", "Served models", None))
        parts.append(("table", "Latencies in milliseconds, perplexity through the same server", served_table(data)))
    if data.loads:
        parts.append(("heading", "Over HTTP", None))
        parts.append(("table", "Latencies in milliseconds, as clients saw them", loads_table(data.loads)))
        if plots is not None:
            parts += [("plot", path.stem, path) for path in draw_loads(data.loads, plots)]
        parts += [("text", "", f"{x['file']}: {note}.") for x in data.loads for note in x["notes"]]
    parts.append(("heading", "Where the numbers come from", None))
    titles = ("file", "date", "commit", "machine", "command")
    body = [
        [s["file"], str(s["date"])[:10], s["commit"], _machine(s["machine"]), f"`{s['command']}`"] for s in data.sources
    ]
    parts.append(("table", "", (titles, body)))
    return parts


def gpu_of(data: BenchData) -> Gpu | None:
    """The GPU that the files name, if its rates are known and it is one."""
    names = {str(source["machine"].get("gpu") or "").lower() for source in data.sources}
    known = {key for key in GPUS for name in names if key in name}
    return GPUS[known.pop()] if len(known) == 1 else None


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of these rows: that several commits are in them, and the notes that some carry."""
    found = []
    sources = list(dict.fromkeys(row.get("source") or "the record's commit" for row in rows))
    if len(sources) > 1:
        found.append(f"Rows are of {', '.join(sources)}; {ACROSS}, whose differences are in such a ratio")
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.get("note"):
            notes.setdefault(row["note"], {})[label_of(row)] = None
    return found + [f"{', '.join(labels)}: {note}" for note, labels in notes.items()]


def speedup_rows(rows: Sequence[Row]) -> list[Row]:
    """Best-batch rows with `speedup` over the first scheme's, and `batch_ratio`, in the same memory and target."""
    best = [row for row in rows if row["batch_mode"] == "best"]
    labels = in_order(best)
    found = []
    for row in best:
        base = next((r for r in best if label_of(r) == labels[0] and _setting(r) == _setting(row)), None)
        ratio = None if base is None or not base["out_tok_s"] else ratio_of(row, base)
        speedup = None if ratio is None else round(ratio.value, 3)
        is_across = ratio is not None and ratio.is_across
        names = {"label": label_of(row), "over": labels[0]}
        found.append({**row, **names, "speedup": speedup, "is_across": is_across})
    order = {label: place for place, label in enumerate(labels)}
    return sorted(found, key=lambda r: (r["memory_gb"], -(r["tpot_target_ms"] or 1e9), order[r["label"]]))


def _setting(row: Row) -> tuple[Any, Any]:
    return row["memory_gb"], row["tpot_target_ms"]


Table = tuple[Sequence[str], list[list[Any]]]


def best_table(rows: Sequence[Row]) -> Table:
    found = speedup_rows(rows)
    titles = ["scheme", "memory", "TPOT target ms", "batch", "output tok/s", f"over {found[0]['over']}"]
    titles += ["TPOT p50 ms", "TPOT p99 ms", "TTFT p50 ms", "of what the GPU allows"]
    body = []
    for row in found:
        bound = row.get("bound_tok_s")
        share = f"{100 * row['out_tok_s'] / bound:.0f} %" if bound else None
        target = "none" if row["tpot_target_ms"] is None else f"{row['tpot_target_ms']:g}"
        times = (row["tpot_ms_p50"], row["tpot_ms_p99"], row["ttft_ms_p50"])
        start = (row["label"], memory_text(row["memory_gb"]), target, row["batch"], row["out_tok_s"])
        speedup = None if row["speedup"] is None else Ratio(row["speedup"], row["is_across"]).text()
        body.append([*start, speedup, *times, share])
    return titles, body


def batch_table(rows: Sequence[Row]) -> Table:
    """Schemes down, batches across."""
    equal = [row for row in rows if row["batch_mode"] == "equal"]
    batches = sorted({row["batch"] for row in equal})
    settings = list(dict.fromkeys((label_of(row), row["memory_gb"]) for row in equal))
    order = in_order(equal)
    body: list[list[Any]] = []
    for label, memory in sorted(settings, key=lambda s: (s[1], order.index(s[0]))):
        rates = {r["batch"]: r["out_tok_s"] for r in equal if (label_of(r), r["memory_gb"]) == (label, memory)}
        body.append([label, memory_text(memory), *(rates.get(batch) for batch in batches)])
    return ("scheme", "memory", *(str(batch) for batch in batches)), body


def ratio_table(ratios: dict[int, dict[str, Ratio]]) -> Table:
    """Schemes down, batches across; a star where two commits are compared."""
    labels = list(dict.fromkeys(label for found in ratios.values() for label in found))
    body: list[list[Any]] = []
    for label in labels:
        body.append([label, *(found[label].text() if label in found else None for found in ratios.values())])
    return ("scheme", *(str(batch) for batch in ratios)), body


def latency_table(data: BenchData) -> Table:
    """The largest shape last, each batch and context with all schemes together."""
    titles = ("shape", "batch", "context", "scheme", "ms", "floor ms", "of the floor", "tok/s")
    rows = [row for row in data.latency if row.get("head", "full") == "full"]
    order = in_order(rows)
    body: list[list[Any]] = []
    for row in sorted(rows, key=lambda r: (r["shape"], r["context"], r["batch"], order.index(label_of(r)))):
        share = None if row["sol_ms"] is None else f"{100 * row['sol_ms'] / row['ms']:.0f} %"
        times = (f"{row['ms']:.2f}", None if row["sol_ms"] is None else f"{row['sol_ms']:.2f}", share)
        body.append([row["shape"], row["batch"], row["context"], label_of(row), *times, row["batch"] / row["ms"] * 1e3])
    return titles, body


def profile_table(data: BenchData) -> Table:
    """An engine a line: shares by part of a step, then the two kinds of step, and the host."""
    titles = ["shape", "workload", "memory", "batch", "scheme", *(part.replace("_", " ") for part in PARTS), "nothing"]
    titles += ["decode ms", "with prompts ms", "their share", "host ms", "output tok/s"]
    body: list[list[Any]] = []
    for row in data.profile:
        shares = [f"{100 * row[part]:.1f} %" for part in (*PARTS, "idle")]
        start = (row["shape"], row["workload"], memory_text(row["memory_gb"]), row["batch"], label_of(row))
        mixed = None if row["mixed_time"] is None else f"{100 * row['mixed_time']:.0f} %"
        body.append([*start, *shares, row["decode_ms"], row["mixed_ms"], mixed, row["host_ms"], row["out_tok_s"]])
    return titles, body


def served_table(data: BenchData) -> Table:
    times = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99")
    keys = ("model", "workload", "load", "requests", "errors", "out_tok_s", "slo", "good", *times, "ppl", "text")
    titles = ["model", "scheme", "workload", "load", "requests", "errors", "output tok/s", "limits", "within them"]
    titles += ["TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "perplexity", "of"]
    body = [[row[keys[0]], label_of(row), *(row[key] for key in keys[1:])] for row in data.served]
    return titles, body


def loads_table(loads: Sequence[Row]) -> Table:
    titles = ["file", "server", "workload", "load", "requests", "errors", "output tok/s", "goodput/s"]
    titles += ["TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "perplexity", "complete"]
    body = []
    for load in loads:
        s, config = load["summary"], load["config"]
        times = [None if s[m] is None else s[m][p] for m in ("ttft", "tpot") for p in ("p50", "p99")]
        start = (load["file"], load_label(load), config["workload"], config["arrivals"], s["requests"])
        rest = (sum(s["errors"].values()), s["out_tok_s"], s["goodput_s"])
        quality = load["server"].get("perplexity")
        times.append(None if quality is None else round(quality["perplexity"], 3))
        body.append([*start, *rest, *times, "yes" if load["is_complete"] else "no, stopped"])
    return titles, body


def _machine(machine: dict[str, Any]) -> str:
    return str(machine.get("gpu") or machine.get("cpu") or machine.get("name") or "")


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    lines = [f"# {title}", ""]
    for kind, name, content in parts:
        if kind == "heading":
            lines += [f"## {name}", ""]
        elif kind == "text":
            lines += [content, ""]
        elif kind == "table":
            lines += ([f"{name}:", ""] if name else []) + [markdown_table(*content), ""]
        else:
            lines += [f"![{name}]({content.name})", ""]
    return "\n".join(lines)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1280px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0 1.5em; display: block; overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { background: #f5f5f5; }
td.words { text-align: left; } img { max-width: 100%; display: block; margin: 1em 0; }
h2 { border-bottom: 2px solid #eee; padding-bottom: .2em; margin-top: 2em; } code { white-space: pre-wrap; }
"""


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One page, its plots inside it."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for kind, name, content in parts:
        if kind == "heading":
            body.append(f"<h2>{html.escape(name)}</h2>")
        elif kind == "text":
            body.append(f"<p>{html.escape(content)}</p>")
        elif kind == "table":
            body.append((f"<p>{html.escape(name)}:</p>" if name else "") + _html_table(*content))
        else:
            data = base64.b64encode(content.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _html_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = "".join("<tr>" + "".join(_html_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _html_cell(value: Any) -> str:
    text = cell(value)
    if isinstance(value, str) and text.startswith("`"):
        return f'<td class="words"><code>{html.escape(text.strip("`"))}</code></td>'
    return f"<td>{html.escape(text)}</td>"
