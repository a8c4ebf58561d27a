"""Draw a quantization report, compare evaluations, or report accuracy over schemes, or throughput.

Example: atom report quant smollm2-w4a4        atom report eval fp.json w4a4.json        atom report bench sweep/
         atom report accuracy benchmarks/results/h200/accuracy-frontier.json
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
    """Evaluations beside a baseline: recovery in percent, with 95 % intervals."""

    baseline: Annotated[Path, tyro.conf.Positional]
    """Result of atom eval --output, full precision say."""

    others: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Results to compare with it, of one checkpoint or several."""


@dataclass(frozen=True)
class Accuracy:
    """Recovery, perplexities, divergences, tasks and retrieval by model and scheme; loss against bits as a plot."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Records accuracy-frontier.json, quality-presets.json, cache-quality.json, quality-budget.json."""

    output: Path = Path("accuracy-report")
    """Folder for report.md and the plot."""

    plots: bool = True
    """Draw the plot; it needs matplotlib."""


@dataclass(frozen=True)
class Bench:
    """Throughput measurements as Markdown, JSON, plots, and one HTML file that holds them all."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of atom bench sweep, records throughput.json and quality-presets.json, results of atom bench serve."""

    output: Path = Path("bench-report")
    """Folder for report.md, report.json, report.html and the plots."""

    title: str = "Serving throughput"
    """Heading."""

    plots: bool = True
    """Draw plots; they need matplotlib."""


Options = (
    Annotated[Quant, tyro.conf.subcommand("quant")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Accuracy, tyro.conf.subcommand("accuracy")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def run(options: Quant | Eval | Accuracy | Bench) -> dict[str, Any]:
    """Print the report; return it as numbers."""
    if isinstance(options, Bench):
        return _bench(options)
    if isinstance(options, Accuracy):
        return _accuracy(options)
    return _quant(options) if isinstance(options, Quant) else _eval(options)


def _accuracy(options: Accuracy) -> dict[str, Any]:
    from dataclasses import asdict

    from atom.eval.accuracy_report import write_report
    from atom.eval.frontier import read_points, recovery_table
    from atom.eval.frontier_plot import draw_frontier

    if not options.files:
        raise ValueError("no file to report on; name accuracy-frontier.json, quality-presets.json or both")
    points = read_points(options.files)
    console.print(recovery_table(points), highlight=False, markup=False, soft_wrap=True)
    files = [draw_frontier(points, options.output)] if options.plots else []
    files.insert(0, write_report(options.files, points, options.output, *files))
    for path in files:
        console.print(f"wrote {path}")
    return {"points": [asdict(point) for point in points], "files": [str(path) for path in files]}


def _bench(options: Bench) -> dict[str, Any]:
    from atom.serving.bench.report import write_report
    from atom.serving.bench.report_data import read_bench

    if not options.files:
        raise ValueError("no file to report on; name what atom bench sweep or atom bench serve --output wrote")
    data = read_bench(options.files)
    paths = write_report(data, options.output, options.title, options.plots)
    console.print(paths[0].read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    for path in paths:
        console.print(f"wrote {path}")
    return {"rows": data.rows, "loads": data.loads, "files": [str(path) for path in paths]}


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

    from atom.eval.compare import compare, compare_table, recovery_table
    from atom.eval.results import EvalResult

    if not options.others:
        raise ValueError("nothing to compare with the baseline; name a second result of atom eval --output")
    baseline = EvalResult.read(options.baseline)
    read = [EvalResult.read(path) for path in options.others]
    found = [(other, compare(baseline, other)) for other in read]
    table = recovery_table(baseline, found) if len(found) > 1 else compare_table(baseline, *found[0])
    console.print(table, highlight=False, markup=False, soft_wrap=True)
    rows = [{"other": other.model, **asdict(row)} for other, rows in found for row in rows]
    return {"baseline": baseline.model, "others": [other.model for other in read], "rows": rows}
