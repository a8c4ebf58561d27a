"""Draw a quantization report, or compare two evaluations.

Example: atom report quant smollm2-w4a4        atom report eval fp.json w4a4.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .console import console


@dataclass(frozen=True)
class Quant:
    """Errors, outliers and time by layer of a checkpoint, as a table and as PNG plots."""

    directory: Annotated[Path, tyro.conf.Positional]
    """The Atom checkpoint."""

    plots: Path | None = None
    """Folder for the plots; default DIRECTORY/plots."""


@dataclass(frozen=True)
class Eval:
    """Two evaluations side by side, with recovery percentages and 95 % intervals."""

    baseline: Annotated[Path, tyro.conf.Positional]
    """Result of atom eval --output, full precision say."""

    other: Annotated[Path, tyro.conf.Positional]
    """Result to compare with it."""


Options = Annotated[Quant, tyro.conf.subcommand("quant")] | Annotated[Eval, tyro.conf.subcommand("eval")]


def run(options: Quant | Eval) -> dict[str, Any]:
    """Print the report; return it as numbers."""
    return _quant(options) if isinstance(options, Quant) else _eval(options)


def _quant(options: Quant) -> dict[str, Any]:
    from atom.calibration.drawing import draw_plots, report_table
    from atom.calibration.report import Report

    report = Report.read(options.directory)
    console.print(report_table(report))
    plots = draw_plots(report, options.plots or options.directory / "plots")
    for path in plots:
        console.print(f"wrote {path}")
    return {"totals": report.totals, "plots": [str(path) for path in plots]}


def _eval(options: Eval) -> dict[str, Any]:
    from dataclasses import asdict

    from atom.eval.compare import compare, compare_table
    from atom.eval.results import EvalResult

    a, b = EvalResult.read(options.baseline), EvalResult.read(options.other)
    rows = compare(a, b)
    console.print(compare_table(a, b, rows))
    return {"baseline": a.model, "other": b.model, "rows": [asdict(row) for row in rows]}
