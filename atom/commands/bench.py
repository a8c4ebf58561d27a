"""Measure serving: load a server over HTTP, run the engine in process, sweep schemes, or print what the GPU allows.

Example: atom bench serve --url http://localhost:8000 --workload 512/256 --max-concurrency 32 --slo ttft:500,tpot:50
"""

from typing import Annotated, Any

import tyro

from atom.serving.bench.bounds import BoundsConfig
from atom.serving.bench.config import ServeBenchConfig

from .console import console

Options = (
    Annotated[ServeBenchConfig, tyro.conf.subcommand("serve")] | Annotated[BoundsConfig, tyro.conf.subcommand("bounds")]
)


def run(options: ServeBenchConfig | BoundsConfig) -> dict[str, Any]:
    """Print what was measured; return it as numbers."""
    if isinstance(options, ServeBenchConfig):
        return _serve(options)
    return _bounds(options)


def _serve(config: ServeBenchConfig) -> dict[str, Any]:
    """KeyboardInterrupt after a stopped run's results were written."""
    from atom.serving.bench.serve import bench_serve

    from .bench_progress import LoadProgress

    with LoadProgress() as progress:
        result = bench_serve(config, progress.watch)
    _print(result.table())
    if config.output is not None:
        result.write(config.output)
        _print(f"wrote {config.output}")
    if not result.is_complete:
        raise KeyboardInterrupt
    return result.to_dict(with_samples=False)


def _bounds(config: BoundsConfig) -> dict[str, Any]:
    from atom.serving.bench.bounds import bound_rows, bounds_table, goal_rows, goals_table, measured_rows

    measured = measured_rows(config.gpu)
    rows = bound_rows(config, measured)
    _print(f"{config.shape}, {config.workload}, {config.gpu}: what bytes and operations allow\n")
    _print(bounds_table(rows))
    goals = goal_rows(config.gpu, measured) if config.goals else []
    if goals:
        _print("\n" + goals_table(goals))
    return {"shape": config.shape, "workload": config.workload, "gpu": config.gpu, "rows": rows, "goals": goals}


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
