"""The project's goals in a report: which are met, by how much the others are missed, and what profiles say of those.

A ratio of two schemes in one memory is taken apart: how many more requests fit, how much longer a token takes.
"""

from collections.abc import Sequence
from typing import Any

from atom.kernels.bounds import Gpu
from atom.quant.presets import get_scheme, kv_name

from .goals import GOALS, Goal
from .plots import label_of

Row = dict[str, Any]
PARTS = ("gemm", "decode_attention", "prefill_attention", "append", "producers", "sampling", "torch", "copies", "other")
LEAST_SHARE = 0.02  # of the GPU's time, to be named


def goals_table(rows: Sequence[Row], gpu: Gpu) -> tuple[Sequence[str], list[list[Any]]]:
    """A line for each goal that these rows answer."""
    body: list[list[Any]] = []
    for goal in GOALS:
        found = goal.measured(rows)
        if found is None:
            continue
        allowed = goal.allowed(gpu)
        verdict = "met"
        if found < goal.wanted:
            verdict = _missed(found, goal)
            if allowed is not None and allowed < goal.wanted:
                verdict += "; beyond both at their bounds" if goal.over else "; beyond the GPU"
        shares = [_share(goal.case.row_of(scheme, rows)) for scheme in (goal.scheme, goal.over) if scheme]
        body.append([goal.text, float(goal.wanted), allowed, found, verdict, *shares, *([None] * (2 - len(shares)))])
    return ("goal", "wanted", "GPU allows", "measured", "", "of its own bound", "the other of its own"), body


def missed_goals(rows: Sequence[Row], profiles: Sequence[Row], gpu: Gpu) -> list[str]:
    """A sentence or two for each goal that is missed."""
    found = []
    for goal in GOALS:
        value = goal.measured(rows)
        if value is None or value >= goal.wanted:
            continue
        words = [f"{goal.text}: {value:.2f} of {goal.wanted:g}, {_missed(value, goal)}"]
        words += _taken_apart(goal, rows, gpu)
        words += _profiled(goal, profiles)
        found.append("; ".join(words) + ".")
    return found


def _taken_apart(goal: Goal, rows: Sequence[Row], gpu: Gpu) -> list[str]:
    """The ratio as that of requests times that of the rate of each, and where both stand below their bounds."""
    mine = goal.case.row_of(goal.scheme, rows)
    theirs = None if goal.over is None else goal.case.row_of(goal.over, rows)
    if mine is None:
        return []
    words = []
    if theirs is not None:
        requests = mine["batch"] / theirs["batch"]
        each = (mine["out_tok_s"] / mine["batch"]) / (theirs["out_tok_s"] / theirs["batch"])
        words.append(
            f"{mine['batch']} requests for {theirs['batch']} ({requests:.2f} times), each at {each:.2f} of the rate "
            f"(a token takes {mine['tpot_ms_p50']:.2f} ms for {theirs['tpot_ms_p50']:.2f})"
        )
    allowed = goal.allowed(gpu)
    shares = " and ".join(
        f"{label_of(row)} at {_share(row)}" for row in (mine, theirs) if row is not None and row.get("bound_tok_s")
    )
    if allowed is not None and shares:
        words.append(f"the bounds allow {allowed:,.2f}: {shares} of its own")
    return words


def _profiled(goal: Goal, profiles: Sequence[Row]) -> list[str]:
    """What the loaded engines' GPU time was, largest part first."""
    words = []
    for name in (goal.scheme, goal.over):
        if name is None:
            continue
        scheme = get_scheme(name)
        wanted = (goal.case.shape, scheme.name, kv_name(scheme), goal.case.memory_gb)
        lengths = goal.case.workload.partition(":")[0]
        for row in profiles:
            same = (row["shape"], row["scheme"], row["kv"], row["memory_gb"]) == wanted
            if same and row["workload"].partition(":")[0] == lengths:
                shares = sorted(((row[part], part) for part in PARTS), reverse=True)
                named = [f"{part.replace('_', ' ')} {100 * x:.0f} %" for x, part in shares if x >= LEAST_SHARE]
                step = "" if row["decode_ms"] is None else f", a decode step {row['decode_ms']:.2f} ms"
                words.append(
                    f"profile of {label_of(row)} with {row['batch']} requests: {', '.join(named)}, nothing runs "
                    f"{100 * row['idle']:.1f} %{step}"
                )
    return words


def _missed(found: float, goal: Goal) -> str:
    return f"missed by {100 * (1 - found / goal.wanted):.0f} %"


def _share(row: Row | None) -> str | None:
    if row is None or not row.get("bound_tok_s"):
        return None
    return f"{100 * row['out_tok_s'] / row['bound_tok_s']:.0f} %"
