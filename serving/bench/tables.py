"""Tables of rows: for the terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any


def cell(value: Any, digits: int = 2) -> str:
    """A number as people write it; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def text_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns side by side; the first is aligned to the left, as are columns of words."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(titles), *cells]) for i in range(len(titles))]
    is_left = [i == 0 or any(isinstance(row[i], str) for row in rows) for i in range(len(titles))]

    def line(parts: Sequence[str]) -> str:
        joined = (p.ljust(w) if left else p.rjust(w) for p, w, left in zip(parts, widths, is_left, strict=True))
        return "  ".join(joined).rstrip()

    return "\n".join([line(titles), "  ".join("-" * width for width in widths), *(line(row) for row in cells)])


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same as a Markdown table."""
    lines = [list(titles), ["---"] * len(titles), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
