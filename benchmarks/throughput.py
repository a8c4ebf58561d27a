"""The throughput experiments of the project, each one command; they write the record `throughput`.

    python benchmarks/throughput.py run paper --output build/paper          # go on with the same command if stopped
    python benchmarks/throughput.py run today --output build/today
    python benchmarks/throughput.py run traces --output build/traces --data DIR
    python benchmarks/throughput.py join build/paper build/today build/traces
    python benchmarks/throughput.py run all --output build/all --data DIR    # what most is asked of comes first
    atom report bench benchmarks/results/h200/throughput.json benchmarks/results/h200/quality-presets.json

paper   the Atom paper's: Llama-2-7B's shape, 24 GiB for everything, targets of 100 ms and 5 ms for a token, its length
        distribution and one like ShareGPT's; equal batches beside, those that 24 GiB do not hold on the whole GPU
today   Llama-3-8B's shape: 512 requests of 512/256 in 24 GiB and on the whole GPU, there 128/128 to 20000/2000 too
traces  the same shape under the Azure 2023 traces' lengths; of the code trace, mostly prompts, requests to their ends
all     these three in one go, an engine for all its lengths: about sixteen minutes of an H200 with compiled kernels, or
        nine and seven on each of two with --shapes llama-3-8b and --shapes llama-2-7b
Weights are random: speed is that of real ones, text is not. The 512 requests run to their ends, start and tail
included; of all else a steady state is measured for some seconds (serving/bench/window.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from atom.commands.console import console, progress_console
from atom.serving.bench.engine_process import EngineProcesses
from atom.serving.bench.joining import read_parts, write_joined
from atom.serving.bench.offline_tables import rows_table
from atom.serving.bench.plots import in_order, label_of
from atom.serving.bench.report_data import write_rows
from atom.serving.bench.sweep import SweepConfig, best_rows, run_sweep, throughput_rows
from atom.serving.bench.window import STEADY, WINDOW_S

PAPER_SCHEMES = ("bf16", "w8a8+kv16", "w8a8", "fp8", "w4a16", "w4a8", "w4a4")
TODAY_SCHEMES = ("bf16", "fp8", "w8a8", "w4a16", "w4a8", "w4a4")
PAPER_BATCHES = (4, 6, 8, 16, 24, 32, 40, 64, 80, 96, 128, 192, 384)
EQUAL_BATCHES = (32, 64, 128)  # on the whole GPU: what some scheme cannot hold in 24 GiB
LENGTHS = ("512/256", *(f"steady:{x}" for x in ("1000/1000", "20000/2000", "128/128", "2048/2048", "500/2000")))
CODE_REQUESTS = 512  # of Azure's code trace: a million prompt tokens
TARGETS_MS = (100.0, 5.0)  # for a token, in the paper's experiment
ROW_KEY = ("experiment", "shape", "scheme", "kv", "memory_gb", "batch", "workload", "rate")  # of one measurement


@dataclass(frozen=True)
class Run:
    """Run an experiment, or what is missing of it."""

    experiment: Annotated[Literal["paper", "today", "traces", "all"], tyro.conf.Positional]
    """Which one."""

    output: Path
    """Folder for what was measured."""

    schemes: tuple[str, ...] = ()
    """Only these; default: the experiment's own."""

    shapes: tuple[str, ...] = ()
    """Of `all` only these, to share it between two GPUs; no ratio is of two shapes."""

    parts: tuple[str, ...] = ()
    """Of `all` only these parts, by the names of their folders: 8b-long 8b-code."""

    workload: tuple[str, ...] = ()
    """Only these lengths; default: the experiment's own."""

    memory_gb: tuple[int, ...] = ()
    """Only in these budgets, 0 for the whole GPU; default: the experiment's own."""

    batches: tuple[int, ...] = ()
    """Requests under way at once, in the paper's experiment; default: the experiment's own."""

    window_s: float = WINDOW_S
    """Seconds of a steady state, where the experiment measures one."""

    engine_args: str = ""
    """More options for each engine, as one text: --engine-args="--admission-interval 8"."""

    data: Path | None = None
    """Folder that holds conv.csv.gz and code.csv.gz of the Azure traces; for `traces` and `all`."""

    quick: bool = False
    """A tiny shape and few requests, to try the command anywhere."""


@dataclass(frozen=True)
class Join:
    """Write the record from what experiments left; of two measurements of one thing the later counts."""

    parts: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that `run` filled, or records."""


def sweeps(options: Run) -> list[SweepConfig]:
    """The sweeps of an experiment, each in a folder of its own below options.output."""
    if options.experiment == "all" and not options.quick:
        return [
            sweep
            for sweep in _all(options)
            if (not options.shapes or sweep.model[0] in options.shapes)
            and (not options.parts or _part(options, sweep) in options.parts)
        ]
    if options.quick:
        lengths = {
            "paper": ("steady:paper:64",),
            "today": ("16/8", "steady:9/30"),
            "traces": ("sharegpt",),
            "all": ("steady:9/30",),
        }
        small: dict[str, Any] = {"memory_gb": (0.05,), "concurrency": (2, 0), "num_requests": 8, "window_s": 0.3}
        schemes = options.schemes or ("bf16", "w4a8")
        work = options.workload or lengths[options.experiment]
        return [SweepConfig(("tiny",), options.output / "quick", schemes, workload=work, **small)]
    found = _paper(options) if options.experiment == "paper" else _today(options)
    return [sweep for sweep in found if not options.memory_gb or sweep.memory_gb[0] in options.memory_gb]


def _part(options: Run, sweep: SweepConfig) -> str:
    """The name of a part of `all`: that of its folder below options.output."""
    return sweep.output.relative_to(options.output).parts[0]


def _paper(options: Run) -> list[SweepConfig]:
    shape, out, schemes = ("llama-2-7b",), options.output, options.schemes or PAPER_SCHEMES
    work, same = options.workload or ("steady:paper", "steady:sharegpt"), {"window_s": options.window_s}
    more: dict[str, Any] = {"engine_args": options.engine_args, **same}
    batches = options.batches or PAPER_BATCHES
    equal = tuple(batch for batch in EQUAL_BATCHES if not options.batches or batch in options.batches)
    return [
        SweepConfig(shape, out / "24", schemes, (24.0,), batches, workload=work, tpot_ms=TARGETS_MS, **more),
        SweepConfig(shape, out / "whole", schemes, (0.0,), equal, workload=work[:1], **more),
    ]


def _today(options: Run) -> list[SweepConfig]:
    """All requests at once: the engine takes as many as memory holds, 512 at most."""
    shape, out, schemes = ("llama-3-8b",), options.output, options.schemes or TODAY_SCHEMES
    most: dict[str, Any] = {"concurrency": (0,), "engine_args": f"--max-num-seqs 512 {options.engine_args}"}
    most |= {"num_requests": 512 if options.experiment == "today" else None, "window_s": options.window_s}
    if options.experiment == "today":
        small, work = options.workload or LENGTHS[:1], options.workload or LENGTHS
        return [
            SweepConfig(shape, out / "24", schemes, (24.0,), workload=small, **most),
            SweepConfig(shape, out / "whole", schemes, (0.0,), workload=work, **most),
        ]
    if options.workload:
        return [SweepConfig(shape, out / "whole", schemes, (0.0,), workload=options.workload, **most)]
    conversation, code = _traces(options)
    ended = most | {"num_requests": CODE_REQUESTS}
    return [
        SweepConfig(shape, out / "whole", schemes, (0.0,), workload=(conversation,), **most),
        SweepConfig(shape, out / "code", schemes, (0.0,), workload=(code,), **ended),
    ]


def _traces(options: Run) -> tuple[str, str]:
    """The conversation trace in a steady state, and the code trace, in which there is none."""
    if options.data is None:
        raise ValueError("the traces lie outside the repository; name their folder with --data")
    return f"{STEADY}trace:{options.data / 'conv'}.csv.gz", f"trace:{options.data / 'code'}.csv.gz"


def _all(options: Run) -> list[SweepConfig]:
    """Parts of the three experiments in the order of what is asked of them, the fewest engines for each."""
    conversation, code = _traces(options)
    long = ("steady:20000/2000",)  # takes a 16-bit cache a minute
    most = [name for name in LENGTHS if name not in long]

    def whole(
        schemes: tuple[str, ...], lengths: Sequence[str], out: str, gb: float = 0.0, requests: int | None = None
    ) -> SweepConfig:
        return SweepConfig(
            ("llama-3-8b",),
            options.output / out,
            schemes,
            (gb,),
            (0,),
            workload=tuple(lengths),
            num_requests=requests,
            window_s=options.window_s,
            engine_args=f"--max-num-seqs 512 {options.engine_args}",
        )

    def paper(schemes: tuple[str, ...], out: str) -> list[SweepConfig]:
        return _paper(replace(options, schemes=schemes, output=options.output / out, experiment="paper"))

    main, others = ("w4a4", "bf16", "w8a8", "w8a8+kv16"), ("w4a8", "fp8", "w4a16")
    return [
        whole(("w4a8", "fp8"), (*LENGTHS, conversation), "8b-main"),
        paper(main, "paper-main")[0],
        whole(("bf16", "w4a4"), (*most, conversation), "8b-more"),
        paper(others, "paper-rest")[0],
        whole(("w4a8", "fp8", "bf16", "w4a4", "w8a8", "w4a16"), LENGTHS[:1], "8b-24", 24.0),
        whole(("w8a8", "w4a16"), (*most, conversation), "8b-rest"),
        paper(main[1:], "paper-main")[1],
        whole(TODAY_SCHEMES, (code,), "8b-code", requests=CODE_REQUESTS),
        whole(("w4a4", "w8a8", "bf16", "w4a16"), long, "8b-long"),
    ]


def run(options: Run) -> None:
    """Measure, print, and leave a throughput.json in each sweep's folder."""
    with EngineProcesses() as processes:
        for sweep in sweeps(options):
            entries = run_sweep(
                sweep,
                lambda text: progress_console.print(text, highlight=False, markup=False),
                partial(keep_rows, sweep),
                processes,
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
    """Write benchmarks/results/<machine>/throughput.json, with the circumstances of the last part, all commands."""
    files = [file for part in options.parts for file in ([part] if part.is_file() else part.rglob("throughput.json"))]
    if not files:
        raise ValueError("there is no throughput.json in these folders; run the experiments first")
    parts = read_parts(files)
    console.print(f"wrote {write_joined('throughput', parts, joined(parts))}")


def joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of parts in order of time: of one measurement the latest, and the best batches of those.

    Of one part's runs that came to one batch, since memory held no more, the faster counts. A row from another commit
    than the last part's says so under `source`.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        source = {} if part["commit"] == parts[-1]["commit"] else {"source": f"commit {part['commit']}"}
        mine: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in part["rows"]:
            if row["batch_mode"] == "equal":
                key = tuple(row.get(name) for name in ROW_KEY)
                mine[key] = max(mine.get(key, row), row, key=lambda each: float(each["out_tok_s"]))
        found |= {key: source | row for key, row in mine.items()}
    schemes = in_order(list(found.values()))
    place = [name.removeprefix(STEADY) for name in (*LENGTHS, "paper:2048", "sharegpt")]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        lengths = place.index(row["workload"]) if row["workload"] in place else len(place)
        memory = -row["memory_gb"]  # the whole GPU, 0, last
        return (row["experiment"], row["shape"], lengths, memory, schemes.index(label_of(row)), row["batch"])

    rows = sorted(found.values(), key=order)
    paper = [row for row in rows if row["experiment"] == "paper"]
    others = [row for row in rows if row["experiment"] != "paper"]
    small = [row for row in paper if row["memory_gb"]]
    whole = [row for row in paper if not row["memory_gb"]]
    return [*rows, *best_rows(small, TARGETS_MS), *best_rows([*whole, *others])]


if __name__ == "__main__":
    chosen = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")] | Annotated[Join, tyro.conf.subcommand("join")],  # type: ignore[arg-type]
        description=__doc__,
    )
    run(chosen) if isinstance(chosen, Run) else join(chosen)
