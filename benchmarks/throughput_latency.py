"""Decode latency of static batches, scheme by scheme, as the record `engine-latency`; batch 1 of 8B and 70B first.

    python benchmarks/throughput_latency.py --output build/latency             # go on with the same command if stopped
    python benchmarks/throughput_latency.py --output build/latency --record    # also write the record

Each engine runs in a process of its own; the file rows.jsonl in the folder keeps what is done. `sol_ms` in a row is the
step's floor (docs/benchmarks.md, Bounds). Weights are random: speed is that of real ones.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from atom.commands.console import console, progress_console
from atom.quant.presets import get_scheme, kv_name
from atom.records import write_record
from atom.serving.bench.report_data import machine_name
from atom.serving.bench.sweep import read_points
from atom.serving.bench.tables import text_table

KEYS = ("shape", "scheme", "kv", "batch", "context", "ms", "sol_ms")


@dataclass(frozen=True)
class Options:
    """Measure what is missing, print all, and write the record if asked to."""

    output: Path
    """Folder for what was measured."""

    shapes: tuple[str, ...] = ("llama-3-8b", "llama-3-70b")
    """Shapes; one whose weights do not fit under a scheme fails alone."""

    schemes: tuple[str, ...] = ("bf16", "fp8", "w8a8", "w4a16", "w4a8", "w4a4")
    """Presets, with +kv4, +kv8, +kvfp8 or +kv16 for another cache."""

    batch: tuple[int, ...] = (1, 16, 64)
    """Sequences that decode together."""

    context: tuple[int, ...] = (1024,)
    """Tokens of each."""

    steps: int = 64
    """Decode steps to measure."""

    engine_args: str = ""
    """More options for each engine, as one text: --engine-args="--kv-cache-bytes 4GiB"."""

    record: bool = False
    """Write benchmarks/results/<machine>/engine-latency.json."""


def missing(options: Options, rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(shape, scheme) of which not every batch and context is in `rows`."""
    have = {tuple(row[key] for key in KEYS[:5]) for row in rows}
    found = []
    for shape in options.shapes:
        for scheme in options.schemes:
            spec = get_scheme(scheme)
            wanted = {(shape, spec.name, kv_name(spec), b, c) for b in options.batch for c in options.context}
            if wanted - have:
                found.append((shape, scheme))
    return found


def main(options: Options) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.jsonl"
    for shape, scheme in missing(options, read_points(file)):
        progress_console.print(f"{shape} {scheme}", highlight=False)
        command = [sys.executable, "-m", "atom", "bench", "latency", shape, "--load-format", "dummy"]
        command += ["--scheme", scheme, "--steps", str(options.steps), "--rows", str(file)]
        command += ["--batch", *map(str, options.batch), "--context", *map(str, options.context)]
        done = subprocess.run([*command, *options.engine_args.split()], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            console.print(f"failed: {shape} {scheme}", highlight=False)
    rows = [row for row in read_points(file) if "shape" in row]
    body = [[*(row[key] for key in KEYS), row["sol_ms"] and row["sol_ms"] / row["ms"]] for row in rows]
    console.print(text_table([*KEYS, "of floor"], body), highlight=False, markup=False, soft_wrap=True)
    if options.record and rows:
        console.print(f"wrote {write_record('engine-latency', rows, machine_name())}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
