"""Quality, speed and memory of each scheme in one line, for `atom report bench`.

Speed is that of one setting for all schemes, so that lines compare: random weights of a shape are as fast as real ones,
but a model of another shape than the one whose quality stands beside them is not. Both names are told.
"""

from collections.abc import Sequence
from typing import Any

from .plots import in_order, label_of, memory_text
from .report_data import BenchData, workload_of

Row = dict[str, Any]
Table = tuple[Sequence[str], list[list[Any]]]
Setting = tuple[str, str, float, float | None]  # shape, workload, memory, target of the time per output token


def quality_tables(data: BenchData) -> list[tuple[str, Table]]:
    """For each model and text whose quality is known a table: a scheme's perplexity beside its speed and memory."""
    whole = _widest(data.rows, True)
    chosen = [rows for rows in (whole, _widest(data.rows, False, next(iter(whole.values()), None))) if rows]
    where = [next(iter(rows.values())) for rows in chosen]
    titles = ["scheme", "made by", "weight bits", "KV bits", "perplexity", "through kernels", "full precision", "loss"]
    titles += [f"output tok/s, {memory_text(row['memory_gb'])}" for row in where]
    titles += ["weights GB", *(f"KV tokens, {memory_text(row['memory_gb'])}" for row in where)]
    settings = " and ".join(dict.fromkeys(_setting_text(row) for row in where))
    setting = f"; speed and memory of {settings}" if settings else ""
    found: list[tuple[str, Table]] = []
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in data.quality):
        rows = [row for row in data.quality if (row["model"], row["text"]) == (model, text)]
        order = in_order(rows)
        lines: dict[tuple[str, str], dict[str, Row]] = {}
        for row in sorted(rows, key=lambda r: order.index(label_of(r))):
            lines.setdefault((label_of(row), _made_by(row)), {})[row["path"]] = row
        body = [_line(label, made, paths, chosen) for (label, made), paths in lines.items()]
        found.append((f"{model} on {text}{setting}", (titles, body)))
    return found


def _line(label: str, made: str, paths: dict[str, Row], chosen: Sequence[dict[str, Row]]) -> list[Any]:
    """A scheme's line. Loss is by the kernels where they were asked, since they are what serves."""
    kernels, reference = paths.get("kernels"), paths.get("reference")
    row = kernels or reference or {}
    ppl, full = row["ppl"], row["ppl_fp"]
    loss = None if not ppl or not full else f"{100 * (ppl / full - 1):.1f} %"
    ppls = [None if each is None else each["ppl"] for each in (reference, kernels)]
    speeds = [rows.get(label, {}) for rows in chosen]
    weights = next((speed["weight_gb"] for speed in speeds if speed), None)
    rates = [speed.get("out_tok_s") for speed in speeds]
    held = [speed.get("kv_tokens") for speed in speeds]
    return [label, made, row["bits_weight"], row["bits_kv"], *ppls, full, loss, *rates, weights, *held]


def _made_by(row: Row) -> str:
    """How the checkpoint was made: the method of a comparison, or the last step of its calibration."""
    if row.get("method"):
        return str(row["method"])
    if row["scheme"] == "bf16":
        return ""
    if row.get("distill_steps"):
        return "training"
    kind = str(row.get("calibration") or "")
    return "GPTQ" if "GPTQ" in kind else "rounding" if "rounded" in kind else ""


def _widest(rows: Sequence[Row], is_whole: bool, like: Row | None = None) -> dict[str, Row]:
    """Label -> its best row, in the setting that most schemes were run in; of several the first.

    is_whole  of the whole GPU; else of a memory budget
    like      where there are rows of its shape and lengths, of those
    """
    found: dict[Setting, dict[str, Row]] = {}
    for row in rows:
        if row["batch_mode"] == "best" and row["out_tok_s"] and is_whole == (not row["memory_gb"]):
            setting = (row["shape"], workload_of(row), row["memory_gb"], row["tpot_target_ms"])
            found.setdefault(setting, {})[label_of(row)] = row
    alike = {} if like is None else {s: r for s, r in found.items() if s[:2] == (like["shape"], workload_of(like))}
    return max((alike or found).values(), key=len, default={})


def _setting_text(row: Row) -> str:
    target = "" if row["tpot_target_ms"] is None else f", TPOT at most {row['tpot_target_ms']:g} ms"
    return f"{row['shape']}, {workload_of(row)}{target}"
