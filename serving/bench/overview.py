"""One figure over many workloads: the output tokens a second of each scheme at its best, bars by length or trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import COLOURS, file_stem, in_order, label_of, memory_text, new_panels, save_figure, set_legend
from .report_data import workload_of

Row = dict[str, Any]


def overview_groups(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, dict[str, Row]]]:
    """(shape, memory) -> workload -> label -> its best row without a target; settings of one workload are left out."""
    found: dict[tuple[str, float], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["batch_mode"] == "best" and row["tpot_target_ms"] is None and row["out_tok_s"]:
            workload = workload_of(row)
            found.setdefault((row["shape"], row["memory_gb"]), {}).setdefault(workload, {})[label_of(row)] = row
    return {setting: workloads for setting, workloads in found.items() if len(workloads) > 1}


def draw_overviews(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A PNG file for each setting; returns their paths."""
    paths = []
    for (shape, memory), workloads in overview_groups(rows).items():
        labels = in_order([row for found in workloads.values() for row in found.values()])
        title = f"Best of each scheme: {shape}, {memory_text(memory)}"
        figure, (axis,) = new_panels(1, title, 2.5 + 1.35 * len(workloads))
        width = 0.84 / len(labels)
        for index, label in enumerate(labels):
            held = [(place, found[label]) for place, found in enumerate(workloads.values()) if label in found]
            places = [place + (index - (len(labels) - 1) / 2) * width for place, _ in held]
            rates = [float(row["out_tok_s"]) for _, row in held]
            bars = axis.bar(
                places, rates, width * 0.92, color=COLOURS.get(label.partition("+")[0], "black"), label=label
            )
            axis.bar_label(bars, [f"{rate / 1e3:.{1 if rate >= 3e3 else 2}f}" for rate in rates], fontsize=6, padding=1)
        axis.set_xticks(range(len(workloads)), [name.removeprefix("trace:") for name in workloads])
        axis.set(ylabel="output tokens/s", xlabel="prompt/output tokens, or trace; above the bars thousands")
        axis.grid(False, axis="x")
        set_legend([axis])
        path = folder / f"overview-{file_stem(f'{shape}-{memory_text(memory)}')}.png"
        save_figure(figure, path)
        paths.append(path)
    return paths
