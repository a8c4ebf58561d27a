"""Decode latency of one request in an idle engine, beside what the GPU allows; the record `latency`.

    python benchmarks/latency.py run --output build/latency.json
    python benchmarks/latency.py run --output build/bf16.json --shapes llama-3-70b --schemes bf16
    python benchmarks/latency.py join build/latency.json build/bf16.json

Weights are random. An engine that does not fit the GPU is reported and left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from atom.commands.console import console
from atom.serving.bench.engine_process import EngineProcesses
from atom.serving.bench.joining import latest, read_parts, rows_of, write_joined
from atom.serving.bench.report_data import write_rows
from atom.serving.bench.sweep import read_points
from atom.serving.bench.tables import text_table

# A cache of a few sequences, and steps of few tokens: 16-bit weights of 70B leave an H200 no more.
ENGINE = ("--kv-cache-bytes", "1GiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048")


@dataclass(frozen=True)
class Run:
    """Measure, an engine in a process of its own for each shape and scheme."""

    output: Path
    """File for the rows; rewritten after each engine."""

    shapes: tuple[str, ...] = ("llama-3-8b", "llama-3-70b")
    """Names of shapes, or directories with a config.json."""

    schemes: tuple[str, ...] = ("w4a8", "w4a4", "fp8", "w8a8", "w4a16", "bf16")
    """Presets."""

    batch: tuple[int, ...] = (1,)
    """Sequences that decode together."""

    context: tuple[int, ...] = (1024,)
    """Tokens of each before the first measured step."""


@dataclass(frozen=True)
class Join:
    """Write the record from what runs left."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files that `run` wrote."""


def run(options: Run) -> None:
    """Measure and print; the output file holds what there is after each engine."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.with_suffix(".jsonl")
    with EngineProcesses() as processes:
        for shape in options.shapes:
            for scheme in options.schemes:
                command = ["bench", "latency", shape, "--load-format", "dummy", "--scheme", scheme, *ENGINE]
                command += ["--batch", *map(str, options.batch), "--context", *map(str, options.context)]
                code, said = processes.run([*command, "--rows", str(lines)])
                if code:
                    console.print(f"failed: {shape} {scheme}: {ends(said.strip())}", highlight=False, markup=False)
                if rows := read_points(lines):
                    write_rows(options.output, rows, "latency")
    keys = ("shape", "scheme", "kv", "batch", "context", "ms", "ms_p99", "sol_ms", "prefill_ms")
    table = text_table(keys, [[row[key] for key in keys] for row in read_points(lines)])
    console.print(table, highlight=False, markup=False, soft_wrap=True)


def ends(text: str, each: int = 2000) -> str:
    """A failed engine's words: what it said first, which tells the cause, and last."""
    return text if len(text) <= 2 * each else f"{text[:each]}\n...\n{text[-each:]}"


def join(options: Join) -> None:
    """Write benchmarks/results/<machine>/latency.json; of two measurements of one thing the later counts."""
    parts = read_parts(options.parts)
    rows = latest(rows_of(parts), ("shape", "scheme", "kv", "batch", "context"))
    console.print(f"wrote {write_joined('latency', parts, rows)}")


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Join, tyro.conf.subcommand("join")],  # type: ignore[arg-type]
        description=__doc__,
    )
    run(chosen) if isinstance(chosen, Run) else join(chosen)
