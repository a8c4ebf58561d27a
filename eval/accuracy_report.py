"""What the accuracy records hold, as one Markdown page: recovery, the plot, and every measure of every model.

A line is one way to run one model; its rows (of other texts, other tasks) are put together. Measures that nobody took
of a model have no column there.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from atom.records import Row

from .frontier import FULL, Point, name_way, read_rows, recovery_rows

REPORT = "report.md"
BITS = ("bits_weight", "bits_activation", "bits_kv")
PREFIXES = ("task:", "retrieval:")


def write_report(paths: Iterable[Path], points: Sequence[Point], directory: Path, plot: Path | None = None) -> Path:
    """Write REPORT into `directory`; its path. `plot` lies in there too."""
    parts = ["# Accuracy", "Recovery of full precision in percent, of perplexity and of tasks [95 % interval]."]
    parts.append(_markdown(*recovery_rows(points)))
    if plot is not None:
        parts.append(f"![Loss against bits]({plot.name})")
    for path in paths:
        rows = read_rows(path)
        for model in dict.fromkeys(row["model"] for row in rows):
            parts.append(f"## {model}, {path.stem}")
            parts.append(_model_table([row for row in rows if row["model"] == model]))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / REPORT
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _model_table(rows: Sequence[Row]) -> str:
    """One line a way and path; perplexities, then divergence from full precision, then scores with standard errors."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        through = " ".join(filter(None, (row["path"], row.get("dtype"))))
        line = lines.setdefault((name_way(row), through), {})
        for title, cell in _cells(row).items():
            line.setdefault(title, cell)
    known = list(dict.fromkeys(title for line in lines.values() for title in line))
    order = ("W / A / KV bits", "ppl", "KL", *PREFIXES, "recovery")
    titles = sorted(known, key=lambda title: next(i for i, start in enumerate(order) if title.startswith(start)))
    shown = [title.removeprefix("task:") for title in titles]
    table = [[way, through, *(line.get(title, "") for title in titles)] for (way, through), line in lines.items()]
    return _markdown(["", "path", *shown], table)


def _cells(row: Row) -> dict[str, str]:
    """What a row holds, by column; measures that were not taken are left out."""
    cells = {"W / A / KV bits": " / ".join(f"{row[name]:.2f}" for name in BITS)}
    if row["ppl"] is not None:
        over = (
            ""
            if not row.get("ppl_fp") or name_way(row) == FULL
            else f" ({100 * (row['ppl'] / row['ppl_fp'] - 1):+.1f} %)"
        )
        cells[f"ppl {row['text']}"] = f"{row['ppl']:.2f}{over}"
    if row.get("kl") is not None:
        cells[f"KL {row['text']}, nats"] = f"{row['kl']:.4f}"
    for key, value in row.items():
        if key.startswith(PREFIXES) and not key.endswith(":stderr") and value is not None:
            error = row.get(f"{key}:stderr")
            cells[key] = f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
    if row.get("recovery") is not None:
        cells["recovery of tasks, %"] = f"{row['recovery']:.1f} ± {row.get('recovery:95') or 0:.1f}"
    return cells


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)
