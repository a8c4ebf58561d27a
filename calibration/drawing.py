"""A calibration report for people: a table in the terminal, and plots as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atom.models.layout import layer_prefix
from atom.plots import load_matplotlib
from atom.quant.schemes import Scheme

from .clock import PHASES
from .report import Report

ERRORS_PLOT = "errors_by_layer.png"
ENERGIES_PLOT = "channel_energies.png"


def report_table(report: Report) -> Any:
    """What to print on a rich console: provenance, a line a layer in two tables, and where the time went.

    Where a budget chose formats, they stand in a third table.
    """
    from rich.console import Group

    if not report.layers:
        return Group(_headline(report), "No weight was quantized: the weights are copies.")
    scheme = Scheme.from_dict(report.scheme)
    formats = [_formats_table(report, scheme)] if scheme.is_mixed else []
    return Group(_headline(report), *formats, _weights_table(report), _layers_table(report), _time_line(report))


def draw_plots(report: Report, directory: Path) -> list[Path]:
    """Write the plots into `directory` and return their paths; none where no weight was quantized.

    Raises UnsupportedError where matplotlib is not installed.
    """
    if not report.layers:
        return []
    load_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    return [_plot_errors(report, directory / ERRORS_PLOT), _plot_energies(report, directory / ENERGIES_PLOT)]


def _headline(report: Report) -> str:
    calibration = report.provenance.get("calibration") or {}
    text = f"{report.provenance['source'].get('source', '?')} -> {report.scheme['name']}"
    if calibration:
        text += f", {calibration['windows']} x {calibration['window_length']} tokens of {calibration['data']}"
        text += f" (sha256 {calibration['tokens_sha256'][:12]}), " + ("GPTQ" if report.config["gptq"] else "RTN")
    return f"{text}: {report.totals.get('bytes', 0) / 2**20:,.1f} MiB in {report.totals.get('seconds', 0):,.1f} s"


def _layers_table(report: Report) -> Any:
    """Errors of the outputs and what a layer took; it fits 80 columns."""
    names = list(report.layers[0]["inputs"])
    has_gpu = any(layer["peak_gpu_bytes"] for layer in report.layers)
    more = ("layer output", "energy in outliers", "s", "GPU GiB" if has_gpu else "host GiB")
    table = _table("relative error of outputs", report, more)
    for layer in report.layers:
        share = max(layer["inputs"][name]["outlier_share"] for name in names)
        peak = layer["peak_gpu_bytes" if has_gpu else "peak_host_bytes"] / 2**30
        took = (f"{layer['output_error']:.3f}", f"{share:.0%}", f"{layer['seconds']['total']:.1f}", f"{peak:.1f}")
        table.add_row(*_errors(layer, "output_error"), *took)
    return table


def _formats_table(report: Report, scheme: Scheme) -> Any:
    table = _table("formats of weights and activations (+64: outlier channels; h64: Hadamard blocks)", report, ("KV",))
    for layer in report.layers:
        prefix, kv = layer_prefix(layer["layer"]), scheme.kv_of(layer["layer"])
        formats = [scheme.for_linear(f"{prefix}.{name}").label for name in layer["linears"]]
        table.add_row(str(layer["layer"]), *formats, "bf16" if kv is None else kv.format)
    return table


def _weights_table(report: Report) -> Any:
    table = _table("relative error of weights", report)
    for layer in report.layers:
        table.add_row(*_errors(layer, "weight_error"))
    return table


def _table(title: str, report: Report, more: Sequence[str] = ()) -> Any:
    """A table without rows: the layer, its linears, and `more`."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    linears = (name.split(".")[-1].removesuffix("_proj") for name in report.layers[0]["linears"])
    for name in ("layer", *linears, *more):
        table.add_column(name, justify="right")
    return table


def _errors(layer: dict[str, Any], what: str) -> list[str]:
    return [str(layer["layer"]), *(f"{errors[what]:.3f}" for errors in layer["linears"].values())]


def _time_line(report: Report) -> str:
    phases = report.totals["seconds_by_phase"]
    return "seconds: " + ", ".join(f"{name} {phases[name]:,.1f}" for name in PHASES)


def _plot_errors(report: Report, path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4), sharex=True)
    for axis, what in zip(axes, ("weight_error", "output_error"), strict=True):
        for name, values in report.errors(what).items():
            axis.plot(values, marker=".", label=name)
        axis.set(title=f"relative {what.replace('_', ' ')}", xlabel="layer", ylim=(0, None))
    axes[1].plot([layer["output_error"] for layer in report.layers], "k--", label="layer")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside, not over the curves
    figure.suptitle(f"{report.provenance['source'].get('source', '?')} in {report.scheme['name']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _plot_energies(report: Report, path: Path) -> Path:
    """Inputs in columns, a few layers in rows; the order of the model in grey, that of the checkpoint in colour."""
    from matplotlib import pyplot

    chosen = sorted({0, len(report.layers) // 2, len(report.layers) - 1})
    inputs = list(report.layers[0]["inputs"])
    size = (3.2 * len(inputs), 2.4 * len(chosen))
    figure, axes = pyplot.subplots(len(chosen), len(inputs), figsize=size, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        for axis, name in zip(row, inputs, strict=True):
            entry = report.layers[index]["inputs"][name]
            places = [(i + 0.5) * entry["channels"] / len(entry["energy"]) for i in range(len(entry["energy"]))]
            axis.semilogy(places, entry["energy"], color="0.7", label="before")
            axis.semilogy(places, entry["energy_ordered"], label="after")
            if entry["outliers"]:
                axis.axvspan(entry["channels"] - entry["outliers"], entry["channels"], alpha=0.15, color="C3")
            axis.set_title(f"layer {index} {name}", fontsize="small")
            axis.tick_params(which="both", labelsize="x-small")
    axes[0][0].legend(fontsize="small")
    figure.suptitle("energy of input channels before and after the permutation (outlier channels shaded)")
    figure.supxlabel("channel", fontsize="small")
    figure.supylabel("mean square", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
