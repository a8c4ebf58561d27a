"""The throughput experiments of the project, each one command; they write the record `throughput`.

    python benchmarks/throughput.py run paper --output build/paper          # go on with the same command if stopped
    python benchmarks/throughput.py run today --output build/today
    python benchmarks/throughput.py run traces --output build/traces --data DIR
    python benchmarks/throughput.py join build/paper build/today build/traces
    atom report bench benchmarks/results/h200/throughput.json benchmarks/results/h200/quality-presets.json

paper   the Atom paper's: Llama-2-7B's shape, 24 GiB for everything, targets of 100 ms and 5 ms for a token, its length
        distribution and one like ShareGPT's; equal batches beside, those that 24 GiB do not hold on the whole GPU
today   Llama-3-8B's shape: 512 requests of 512/256 in 24 GiB and on the whole GPU, there 128/128 to 20000/2000 too
traces  the same shape under the Azure 2023 traces' lengths, in the order of the traces, all at once
Weights are random: speed is that of real ones, text is not. The 512 requests and the traces run to their ends, start
and tail included; of all else a steady state is measured for some seconds (serving/bench/window.py).
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from atom.commands.console import console, progress_console
from atom.records import write_record
from atom.serving.bench.offline_tables import rows_table
from atom.serving.bench.report_data import machine_name, read_bench, write_rows
from atom.serving.bench.sweep import SweepConfig, run_sweep, throughput_rows
from atom.serving.bench.window import WINDOW_S

PAPER_SCHEMES = ("bf16", "w8a8+kv16", "w8a8", "fp8", "w4a16", "w4a8", "w4a4")
TODAY_SCHEMES = ("bf16", "fp8", "w8a8", "w4a16", "w4a8", "w4a4")
PAPER_BATCHES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
EQUAL_BATCHES = (32, 64, 128)  # on the whole GPU: what some scheme cannot hold in 24 GiB
LENGTHS = ("512/256", *(f"steady:{x}" for x in ("1000/1000", "20000/2000", "128/128", "2048/2048", "500/2000")))


@dataclass(frozen=True)
class Run:
    """Run an experiment, or what is missing of it."""

    experiment: Annotated[Literal["paper", "today", "traces"], tyro.conf.Positional]
    """Which one."""

    output: Path
    """Folder for what was measured."""

    schemes: tuple[str, ...] = ()
    """Only these; default: the experiment's own."""

    workload: tuple[str, ...] = ()
    """Only these lengths; default: the experiment's own."""

    memory_gb: tuple[int, ...] = ()
    """Only in these budgets, 0 for the whole GPU; default: the experiment's own."""

    window_s: float = WINDOW_S
    """Seconds of a steady state, where the experiment measures one."""

    engine_args: str = ""
    """More options for each engine, as one text: --engine-args="--admission-interval 8"."""

    data: Path | None = None
    """Folder that holds conv.csv.gz and code.csv.gz of the Azure traces; for `traces`."""

    quick: bool = False
    """A tiny shape and few requests, to try the command anywhere."""


@dataclass(frozen=True)
class Join:
    """Write the record from the folders of finished experiments."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `run` filled."""


def sweeps(options: Run) -> list[SweepConfig]:
    """The sweeps of an experiment, each in a folder of its own below options.output."""
    if options.quick:
        lengths = {"paper": ("steady:paper:64",), "today": ("16/8", "steady:9/30"), "traces": ("sharegpt",)}
        small: dict[str, Any] = {"memory_gb": (0.05,), "concurrency": (2, 0), "num_requests": 8, "window_s": 0.3}
        schemes = options.schemes or ("bf16", "w4a8")
        work = options.workload or lengths[options.experiment]
        return [SweepConfig(("tiny",), options.output / "quick", schemes, workload=work, **small)]
    found = _paper(options) if options.experiment == "paper" else _today(options)
    return [sweep for sweep in found if not options.memory_gb or sweep.memory_gb[0] in options.memory_gb]


def _paper(options: Run) -> list[SweepConfig]:
    shape, out, schemes = ("llama-2-7b",), options.output, options.schemes or PAPER_SCHEMES
    work, steady, targets = options.workload or ("steady:paper", "steady:sharegpt"), options.window_s, (100.0, 5.0)
    return [
        SweepConfig(
            shape,
            out / "24",
            schemes,
            (24.0,),
            PAPER_BATCHES,
            workload=work,
            window_s=steady,
            tpot_ms=targets,
            engine_args=options.engine_args,
        ),
        SweepConfig(
            shape,
            out / "whole",
            schemes,
            (0.0,),
            EQUAL_BATCHES,
            workload=work[:1],
            window_s=steady,
            engine_args=options.engine_args,
        ),
    ]


def _today(options: Run) -> list[SweepConfig]:
    """All requests at once: the engine takes as many as memory holds, 512 at most."""
    shape, out, schemes = ("llama-3-8b",), options.output, options.schemes or TODAY_SCHEMES
    most: dict[str, Any] = {"concurrency": (0,), "engine_args": f"--max-num-seqs 512 {options.engine_args}"}
    if options.experiment == "today":
        most |= {"num_requests": 512, "window_s": options.window_s}
        small, work = options.workload or LENGTHS[:1], options.workload or LENGTHS
        return [
            SweepConfig(shape, out / "24", schemes, (24.0,), workload=small, **most),
            SweepConfig(shape, out / "whole", schemes, (0.0,), workload=work, **most),
        ]
    if options.data is None:
        raise ValueError("the traces lie outside the repository; name their folder with --data")
    files = tuple(f"trace:{options.data / name}.csv.gz" for name in ("conv", "code"))
    return [SweepConfig(shape, out / "whole", schemes, (0.0,), workload=options.workload or files, **most)]


def run(options: Run) -> None:
    """Measure, print, and leave a throughput.json in each sweep's folder."""
    for sweep in sweeps(options):
        entries = run_sweep(
            sweep,
            lambda text: progress_console.print(text, highlight=False, markup=False),
            partial(keep_rows, sweep),
        )
        rows = throughput_rows(sweep, entries)
        console.print(rows_table(rows), highlight=False, markup=False, soft_wrap=True)
        for entry in entries:
            if "error" in entry:
                console.print(f"failed: {entry['scheme']}: {entry['error']}", highlight=False, markup=False)
        keep_rows(sweep, entries)


def keep_rows(sweep: SweepConfig, entries: list[dict[str, Any]]) -> None:
    """Write what was measured so far."""
    if rows := throughput_rows(sweep, entries):
        write_rows(sweep.output / "throughput.json", rows)


def join(options: Join) -> None:
    """Write benchmarks/results/<machine>/throughput.json, with the circumstances of the last part."""
    files = sorted(file for folder in options.folders for file in folder.glob("*/throughput.json"))
    if not files:
        raise ValueError("the folders hold no throughput.json; run the experiments first")
    rows = read_bench(files).rows
    last = max((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda found: found["date"])
    names = {json.loads(file.read_text(encoding="utf-8"))["machine"]["name"] for file in files}
    if len(names) > 1:
        raise ValueError(f"the parts come from {', '.join(sorted(names))}; a record is of one machine")
    where = {key: last[key] for key in ("date", "command", "machine", "versions")}
    machine = last["machine"].get("name", machine_name())
    console.print(f"wrote {write_record('throughput', rows, machine, where=where, commit=last['commit'])}")


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Join, tyro.conf.subcommand("join")],  # type: ignore[arg-type]
        description=__doc__,
    )
    run(chosen) if isinstance(chosen, Run) else join(chosen)
