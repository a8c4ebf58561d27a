"""Measure serving: load a server over HTTP, run the engine in process, sweep schemes, print what the GPU allows,
or time the kernels.

Example: atom bench serve --url http://localhost:8000 --workload 512/256 --max-concurrency 32 --slo ttft:500,tpot:50
"""

import json
from typing import Annotated, Any

import tyro

from atom.errors import AtomError, UnsupportedError
from atom.kernels.bench_config import KernelsConfig
from atom.serving.bench.bounds import BoundsConfig
from atom.serving.bench.config import ServeBenchConfig
from atom.serving.bench.offline_config import LatencyConfig, ThroughputConfig
from atom.serving.bench.sweep import SweepConfig

from .console import console, progress_console

Options = (
    Annotated[ServeBenchConfig, tyro.conf.subcommand("serve")]
    | Annotated[ThroughputConfig, tyro.conf.subcommand("throughput")]
    | Annotated[LatencyConfig, tyro.conf.subcommand("latency")]
    | Annotated[SweepConfig, tyro.conf.subcommand("sweep")]
    | Annotated[BoundsConfig, tyro.conf.subcommand("bounds")]
    | Annotated[KernelsConfig, tyro.conf.subcommand("kernels")]
)


def run(options: Any) -> dict[str, Any]:
    """Print what was measured; return it as numbers."""
    runs = {
        ServeBenchConfig: _serve,
        ThroughputConfig: _throughput,
        LatencyConfig: _latency,
        SweepConfig: _sweep,
        BoundsConfig: _bounds,
        KernelsConfig: _kernels,
    }
    found: dict[str, Any] = runs[type(options)](options)
    return found


def _serve(config: ServeBenchConfig) -> dict[str, Any]:
    """KeyboardInterrupt after a stopped run's results were written."""
    try:
        from atom.serving.bench.serve import bench_serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"loading a server needs the package {error.name}; pip install 'atom-serving[serving]'"
        ) from None

    from .bench_progress import LoadProgress

    with LoadProgress() as progress:
        result = bench_serve(config, progress.watch)
    _print(result.table())
    if config.output is not None:
        result.write(config.output)
        _print(f"wrote {config.output}")
    if not result.is_complete:
        raise KeyboardInterrupt
    summary: dict[str, Any] = result.to_dict(with_samples=False)
    return summary


def _throughput(config: ThroughputConfig) -> dict[str, Any]:
    from atom.serving.bench.offline_tables import points_table
    from atom.serving.bench.throughput import bench_throughput

    with progress_console.status("starting") as status:
        points = bench_throughput(config, status.update)
    _print(points_table(config, points))
    return {"points": [point.to_dict() for point in points]}


def _latency(config: LatencyConfig) -> dict[str, Any]:
    from atom.serving.bench.latency import bench_latency, latency_rows
    from atom.serving.bench.offline_tables import latency_table

    with progress_console.status("starting") as status:
        found, facts = bench_latency(config, status.update)
    _print(latency_table(config, found, facts))
    rows = latency_rows(config, found, facts)
    if config.rows is not None:
        with config.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return {"rows": rows, "engine": facts}


def _sweep(config: SweepConfig) -> dict[str, Any]:
    from atom.records import write_record
    from atom.serving.bench.offline_tables import rows_table
    from atom.serving.bench.sweep import run_sweep, throughput_rows

    entries = run_sweep(config, lambda text: progress_console.print(text, highlight=False, markup=False))
    failures = [entry for entry in entries if "error" in entry]
    rows = throughput_rows(config, entries)
    _print(rows_table(rows))
    for failure in failures:
        _print(f"failed: {failure['model']} {failure['scheme']} {failure['memory_gb']:g} GiB:\n{failure['error']}")
    result = {"rows": rows, "failures": failures}
    if rows and config.machine is not None and not failures:
        _print(f"wrote {write_record('throughput', rows, config.machine)}")
    if rows:
        from atom.serving.bench.report_data import write_rows

        _print(f"wrote {write_rows(config.output / 'throughput.json', rows)}")
    if failures:
        raise RunFailedError(f"{len(failures)} engines failed; what they said is above; run the same command to go on")
    return result


class RunFailedError(AtomError):
    """A part of a sweep failed; the rest was kept."""


def _bounds(config: BoundsConfig) -> dict[str, Any]:
    from atom.serving.bench.bounds import bound_rows, bounds_table, goal_rows, goals_table, measured_rows

    measured = measured_rows(config.gpu)
    rows = bound_rows(config, measured)
    _print(f"{config.shape}, {config.workload}, {config.gpu}: what bytes and operations allow\n")
    _print(bounds_table(rows))
    goals = goal_rows(config.gpu, measured, config.reserve_gb) if config.goals else []
    if goals:
        _print("\n" + goals_table(goals))
    return {"shape": config.shape, "workload": config.workload, "gpu": config.gpu, "rows": rows, "goals": goals}


def _kernels(config: KernelsConfig) -> dict[str, Any]:
    from atom.kernels.bench import bench_kernels, records, table
    from atom.records import write_record

    with progress_console.status("starting") as status:
        rows = bench_kernels(config, status.update)
    _print(table(rows))
    if config.flashinfer_trace is not None:
        from atom.kernels.flashinfer_trace import write_trace

        _print(f"wrote {write_trace(config.flashinfer_trace, rows)} files to {config.flashinfer_trace}")
    for name, found in records(rows).items():
        if config.machine is not None and found:
            _print(f"wrote {write_record(name, found, config.machine)}")
    return {"gpu": config.gpu, "rows": rows}


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
