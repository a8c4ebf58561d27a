"""Each scheme against its own floor, for `atom report bench`.

A baseline that stood farther below what the GPU allows of it than our schemes stand below theirs would be a strawman.
"""

from collections.abc import Sequence
from typing import Any

from .plots import in_order, label_of, memory_text
from .report_data import workload_of

Row = dict[str, Any]


def shares_table(rows: Sequence[Row], latency: Sequence[Row]) -> tuple[Sequence[str], list[list[Any]]]:
    """A line for each scheme: what it reached of its bound, in decode steps and at its best batches end to end.

    rows     of record `throughput`
    latency  of records `engine-latency` and `latency`
    """
    steps = [row for row in latency if row["sol_ms"] and row.get("head", "full") == "full"]
    best = [row for row in rows if row["batch_mode"] == "best" and row["out_tok_s"] and row.get("bound_tok_s")]
    body: list[list[Any]] = []
    for label in in_order([*steps, *best]):
        decode = {_step_text(row): row["sol_ms"] / row["ms"] for row in steps if label_of(row) == label}
        whole = {_run_text(row): row["out_tok_s"] / row["bound_tok_s"] for row in best if label_of(row) == label}
        body.append([label, *_spread(decode), *_spread(whole)])
    titles = ["scheme", "decode steps", "least of the floor", "most", "least in"]
    return (*titles, "best batches", "least of the bound", "most ", "least in "), body


def _spread(shares: dict[str, float]) -> list[Any]:
    """How many, the least and the most, and where the least is."""
    if not shares:
        return [None] * 4
    least = min(shares, key=lambda name: shares[name])
    return [len(shares), f"{100 * shares[least]:.0f} %", f"{100 * max(shares.values()):.0f} %", least]


def _step_text(row: Row) -> str:
    return f"{row['shape']}, batch {row['batch']}, context {row['context']}"


def _run_text(row: Row) -> str:
    target = "" if row["tpot_target_ms"] is None else f", TPOT {row['tpot_target_ms']:g} ms"
    return f"{row['shape']}, {workload_of(row)}, {memory_text(row['memory_gb'])}{target}"
