"""The promise that 4 bits are never slower, checked: decode at equal batches, and each scheme at its best.

A comparison is two measurements of one setting; `ratio` above 1 means that 4 bits were faster.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import label_of, memory_text, origin
from .report_data import workload_of

Row = dict[str, Any]

LOW = ("w4a4", "w4a8", "w4a16", "nvint4", "nvfp4", "mxfp4", "w3a3")
BASELINES = ("bf16", "fp8")
TIE = 0.99  # what is within 1 % counts as equal: two runs of one engine differ by that


@dataclass(frozen=True)
class Comparison:
    """One setting: what was compared (`kind`), where, which schemes, how many times as fast the first was.

    is_across  the two were measured at different commits, for want of two of one
    """

    kind: str
    setting: str
    label: str
    over: str
    ratio: float
    is_across: bool = False

    @property
    def is_slower(self) -> bool:
        return self.ratio < TIE


def decode_comparisons(latency: Sequence[Row]) -> Iterator[Comparison]:
    """Rows of records `engine-latency` and `latency`: decode steps of equal batch and context."""

    def setting(row: Row) -> tuple[str, ...] | None:
        if row.get("head", "full") != "full":
            return None
        return (f"{row['shape']}, batch {row['batch']}, context {row['context']}",)

    yield from _compare("decode step", latency, setting, lambda row: 1 / row["ms"], BASELINES)


def batch_comparisons(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Rows of record `throughput` at equal batches, whatever the memory: it decides what fits, not how fast it is."""

    def setting(row: Row) -> tuple[str, ...] | None:
        if row["batch_mode"] != "equal" or not row["out_tok_s"]:
            return None
        return (f"{row['shape']}, {workload_of(row)}, batch {row['batch']}",)

    yield from _compare("equal batch", rows, setting, lambda row: float(row["out_tok_s"]), BASELINES)


def best_comparisons(rows: Sequence[Row]) -> Iterator[Comparison]:
    """Rows of record `throughput`: each scheme at its best batch, in the same memory, under the same target."""

    def setting(row: Row) -> tuple[str, ...] | None:
        if row["batch_mode"] != "best" or not row["out_tok_s"]:
            return None
        target = "" if row["tpot_target_ms"] is None else f", TPOT {row['tpot_target_ms']:g} ms"
        return (f"{row['shape']}, {workload_of(row)}, {memory_text(row['memory_gb'])}{target}",)

    yield from _compare("end to end", rows, setting, lambda row: float(row["out_tok_s"]), BASELINES)


def compare_all(rows: Sequence[Row], latency: Sequence[Row]) -> list[Comparison]:
    """Everything that the rows allow."""
    return [*decode_comparisons(latency), *batch_comparisons(rows), *best_comparisons(rows)]


def comparison_table(found: Sequence[Comparison]) -> tuple[Sequence[str], list[list[Any]]]:
    """A line for each kind and pair of schemes: settings compared, how many were slower, and the least ratio."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for each in found:
        groups.setdefault((each.kind, each.label, each.over), []).append(each)
    body: list[list[Any]] = []
    for (kind, label, over), group in groups.items():
        least = min(group, key=lambda each: each.ratio)
        slower = sum(each.is_slower for each in group)
        across = sum(each.is_across for each in group)
        ratios = (least.ratio, max(each.ratio for each in group))
        numbers = (len(group), across, slower, *(f"{r:.2f}" for r in ratios))
        body.append([f"{label} over {over}", kind, *numbers, least.setting])
    return ("", "compared by", "settings", "across commits", "slower in", "least", "most", "least in"), body


def _compare(
    kind: str,
    rows: Sequence[Row],
    setting: Callable[[Row], tuple[str, ...] | None],
    speed: Callable[[Row], float],
    baselines: Sequence[str],
) -> Iterator[Comparison]:
    """Each 4-bit row against the fastest of each baseline in the same setting, of its own commit if there is one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if (key := setting(row)) is not None:
            groups.setdefault(key, []).append(row)
    pairs = []
    for (name,), group in groups.items():
        for mine in (row for row in group if row["scheme"] in LOW):
            for base in baselines:
                theirs = [row for row in group if row["scheme"] == base]
                same = [row for row in theirs if origin(row) == origin(mine)]
                if theirs:
                    best = max(same or theirs, key=speed)
                    labels = label_of(mine), label_of(best)
                    pairs.append(Comparison(kind, name, *labels, speed(mine) / speed(best), not same))
    yield from sorted(pairs, key=lambda each: (LOW.index(each.label.partition("+")[0]), each.over))
