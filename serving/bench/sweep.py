"""`atom bench sweep`: schemes x memory x concurrency (or rate), each engine in a process of its own, into one record.

A process of its own, because a GPU's memory is then free again for the next engine, and because one that fails leaves
the others standing. Every run is kept in a file of JSON lines as soon as it is done; a sweep that is started again
does what that file lacks.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from atom.models.dummy import SHAPES
from atom.quant.presets import get_scheme, kv_name

from ..engine_config import EngineConfig
from .bounds import SCHEMES
from .engine_process import EngineProcesses
from .lengths import parse_workload
from .window import STEADY, WINDOW_S

Say = Callable[[str], None]
RUNNING = "running.jsonl"
DEFAULT_SEQS = EngineConfig().max_num_seqs
TAIL = 2000  # characters of a failed process' messages that are kept


@dataclass(frozen=True)
class SweepConfig:
    """Throughput of several schemes at several batches in several memory budgets.

    Example: atom bench sweep llama-3-8b --schemes bf16 fp8 w4a8 --memory-gb 24 --concurrency 8 32 128 --output sweep
    """

    model: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A shape by name (random weights, under each of --schemes), or checkpoints, each with its own scheme."""

    output: Path
    """Folder for what was measured; a sweep that was stopped goes on from there."""

    schemes: tuple[str, ...] = SCHEMES
    """For a shape: presets, with +kv4, +kv8, +kvfp8 or +kv16 for another cache."""

    memory_gb: tuple[float, ...] = (24.0,)
    """GiB for weights, KV cache and working memory; 0: what gpu_memory_utilization allows."""

    concurrency: tuple[int, ...] = (8, 32, 64, 128, 0)
    """Requests under way at once; 0: all, and the engine chooses."""

    rate: tuple[float, ...] = ()
    """Instead: Poisson arrivals of so many requests a second."""

    workload: tuple[str, ...] = ("512/256",)
    """Lengths, as for atom bench throughput; all of them for each engine."""

    num_requests: int | None = None
    """Of each run; default as for atom bench throughput."""

    window_s: float = WINDOW_S
    """Seconds of the window that a steady: workload measures."""

    tpot_ms: tuple[float, ...] = ()
    """Targets of the median time per output token: the best batch under each is reported."""

    experiment: str | None = None
    """paper, offline or trace:NAME; default by the workload."""

    engine_args: str = ""
    """More options for each engine, as one text: --engine-args="--max-num-seqs 512 --kernels reference"."""

    machine: str | None = None
    """Also write the record benchmarks/results/MACHINE/throughput.json."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("name a shape or at least one checkpoint")
        for scheme in self.schemes:
            get_scheme(scheme)
        for workload in self.workload:
            if not workload.removeprefix(STEADY).startswith(("trace:", "turns:")):
                parse_workload(workload.removeprefix(STEADY))
        if self.experiment not in (None, "paper", "offline") and not str(self.experiment).startswith("trace:"):
            raise ValueError(f"--experiment is paper, offline or trace:NAME, got {self.experiment!r}")

    @property
    def points_file(self) -> Path:
        return self.output / "points.jsonl"


@dataclass(frozen=True)
class Job:
    """The runs of one engine: a process."""

    model: str
    scheme: str | None
    memory_gb: float
    workload: tuple[str, ...]
    concurrency: tuple[int, ...]
    rate: tuple[float, ...]

    @property
    def name(self) -> str:
        memory = f"{self.memory_gb:g} GiB" if self.memory_gb else "all memory"
        return f"{self.model} {self.scheme or ''} in {memory}, {', '.join(self.workload)}".replace("  ", " ")

    def key(self, workload: str, concurrency: int, rate: float | None) -> tuple[Any, ...]:
        return (self.model, self.scheme, float(self.memory_gb), workload, concurrency, rate)


def pending_jobs(config: SweepConfig, done: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """What is still to be run, without the runs in `done`: a job for each engine and its workloads.

    Workloads of which other runs are missing go to a job of their own.
    """
    have = {_key(entry) for entry in done if "error" not in entry}
    for model in config.model:
        schemes: tuple[str | None, ...] = config.schemes if model in SHAPES else (None,)
        for scheme in schemes:
            for memory in config.memory_gb:
                missing: dict[tuple[Any, ...], list[str]] = {}
                for workload in config.workload:
                    key = Job(model, scheme, memory, (), (), ()).key
                    rates = tuple(r for r in config.rate if key(workload, 0, r) not in have)
                    counts = tuple(c for c in config.concurrency if key(workload, c, None) not in have)
                    runs = ((), rates) if config.rate else (counts, ())
                    if any(runs):
                        missing.setdefault(runs, []).append(workload)
                for (counts, rates), workloads in missing.items():
                    yield Job(model, scheme, memory, tuple(workloads), counts, rates)


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "asked_scheme", "asked_memory_gb", "asked_workload", "concurrency", "rate")
    return tuple(entry.get(name) for name in names)


def read_points(file: Path) -> list[dict[str, Any]]:
    """What a sweep has measured so far; a line that a stopped process left half written is not there."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_sweep(
    config: SweepConfig,
    say: Say = lambda text: None,
    kept: Callable[[list[dict[str, Any]]], None] = lambda entries: None,
    processes: EngineProcesses | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing and return all entries, failures (entries with `error`) of this call included.

    kept       called after each engine with what there is by then, so that a run which is stopped leaves its results
    processes  for the engines, where they go on to serve another sweep
    """
    if processes is None:
        with EngineProcesses() as own:
            return run_sweep(config, say, kept, own)
    config.output.mkdir(parents=True, exist_ok=True)
    _absorb(config)  # what a sweep that was killed had measured last
    jobs = list(pending_jobs(config, read_points(config.points_file)))
    failures = []
    for number, job in enumerate(jobs, 1):
        say(f"engine {number} of {len(jobs)}: {job.name}")
        error = _run_job(config, job, processes)
        if error is not None:
            failures.append({"model": job.model, "scheme": job.scheme, "memory_gb": job.memory_gb, "error": error})
            say(f"failed: {job.name}")
        kept(read_points(config.points_file))
    return [*read_points(config.points_file), *failures]


def _run_job(config: SweepConfig, job: Job, processes: EngineProcesses) -> str | None:
    """Run one engine in a process; returns the last of what it said if it failed."""
    fresh = config.output / RUNNING
    asked = {"model": job.model, "asked_scheme": job.scheme, "asked_memory_gb": float(job.memory_gb)}
    fresh.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    command = ["bench", "throughput", job.model, "--workload", *job.workload]
    command += ["--points", str(fresh)]
    if job.scheme is not None:
        command += ["--load-format", "dummy", "--scheme", job.scheme]
    if job.memory_gb:
        command += ["--memory-gb", f"{job.memory_gb:g}"]
    if any(workload.startswith(STEADY) for workload in job.workload):
        command += ["--window-s", f"{config.window_s:g}"]
    if config.num_requests is not None:
        command += ["--num-requests", str(config.num_requests)]
    command += ["--rate", *(f"{r:g}" for r in job.rate)] if job.rate else []
    command += ["--concurrency", *(str(c) for c in job.concurrency)] if job.concurrency else []
    if "--max-num-seqs" not in config.engine_args and max(job.concurrency, default=0) > DEFAULT_SEQS:
        command += ["--max-num-seqs", str(max(job.concurrency))]
    command += config.engine_args.split()
    try:
        code, said = processes.run(command)
    finally:  # what was measured before a failure or Ctrl-C counts
        _absorb(config)
    return None if code == 0 else said.strip()[-TAIL:] or f"exit code {code}"


def _absorb(config: SweepConfig) -> None:
    """Move the runs of the process that ran last, if any, to the points; the file's first line says what was asked."""
    fresh = config.output / RUNNING
    asked, *entries = read_points(fresh) or [{}]
    with config.points_file.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asked | entry) + "\n" for entry in entries)
    fresh.unlink(missing_ok=True)


def throughput_rows(config: SweepConfig, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of record `throughput`: every run as an equal-batch row, then the best run under each TPOT target.

    In the paper's experiment out_tok_s is the rate while the batch was full, where a run has one: long outputs end
    one by one, and a run of finite length would else be judged by its end. Elsewhere it is all tokens over all time.
    """
    runs = [point for point in points if "error" not in point and "skipped" not in point]
    rows = [_row(config, point, "equal", None) for point in runs]
    return rows + best_rows(rows, config.tpot_ms)


def best_rows(rows: Sequence[dict[str, Any]], tpot_ms: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Of equal-batch rows the fastest under each target, in each experiment, shape, scheme, cache, memory, workload."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("experiment", "shape", "scheme", "kv", "memory_gb", "workload"))
        groups.setdefault(key, []).append(row)
    found = []
    for target in tpot_ms or (None,):
        for group in groups.values():
            fit = [r for r in group if target is None or (r["tpot_ms_p50"] is not None and r["tpot_ms_p50"] <= target)]
            if fit:
                best = max(fit, key=lambda row: row["out_tok_s"])
                found.append({**best, "batch_mode": "best", "tpot_target_ms": target})
    return found


def _row(config: SweepConfig, point: dict[str, Any], mode: str, target: float | None) -> dict[str, Any]:
    summary, workload = point["summary"], str(point["workload"])
    experiment = config.experiment or default_experiment(workload)
    overall, steady = round(summary["out_tok_s"], 1), point["steady_tok_s"]
    reserved = point["engine"].get("reserved_bytes") or {}
    shape = point["model"] if point["model"] in SHAPES else Path(point["model"]).name
    return {
        "experiment": experiment,
        "shape": shape,
        "scheme": get_scheme(point["scheme"]).name,
        "kv": point["kv"] if point["asked_scheme"] is None else kv_name(get_scheme(point["asked_scheme"])),
        "memory_gb": int(point["memory_gb"]) if float(point["memory_gb"]).is_integer() else point["memory_gb"],
        "batch_mode": mode,
        "batch": point["batch"] if point["is_memory_bound"] else point["concurrency"] or _under_way(point),
        "input": _whole(point["input"]),
        "output": _whole(point["output"]),
        "out_tok_s": steady if experiment == "paper" and steady is not None else overall,
        "tpot_target_ms": target,
        "tpot_ms_p50": _of(summary, "tpot", "p50"),
        "tpot_ms_p99": _of(summary, "tpot", "p99"),
        "ttft_ms_p50": _of(summary, "ttft", "p50"),
        "ttft_ms_p99": _of(summary, "ttft", "p99"),
        "workload": "paper:2048" if workload == "paper" else workload,
        "requests": point["requests"],
        "rate": point["rate"],
        "steady_tok_s": steady,
        "overall_tok_s": overall,
        "bound_tok_s": point["bound_tok_s"],
        "errors": sum(summary["errors"].values()),
        "weight_gb": round(point["weight_bytes"] / 1e9, 3),
        "kv_gb": round(point["engine"]["kv_cache_bytes"] / 1e9, 3),
        "kv_tokens": point["engine"]["kv_cache_tokens"],
        **{f"{name}_gb": _gigabytes(reserved.get(name)) for name in ("step", "graphs", "others")},
        "seconds": point["seconds"],
    }


def _under_way(point: dict[str, Any]) -> int:
    """Requests of a run that had all at once: what the engine takes, if the largest step lacked but one in a hundred.

    The others' prompts ran meanwhile; runs of 510 and 511 of 512 are of equal batches.
    """
    largest, most = int(point["batch"]), int(point["engine"].get("max_num_seqs", 0))
    return most if 0.99 * most <= largest < most else largest


def default_experiment(workload: str) -> str:
    """paper and sharegpt lengths are the paper's experiment, traces their own, all else is offline."""
    if workload.startswith("trace:"):
        return workload
    return "paper" if workload.startswith(("paper", "sharegpt")) else "offline"


def _of(summary: dict[str, Any], measure: str, name: str) -> float | None:
    spread = summary[measure]
    return None if spread is None else round(spread[name], 3)


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else round(size / 1e9, 3)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
