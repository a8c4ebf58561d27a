"""Where the time of a loaded engine goes: GPU time by part of the model, and decode steps against steps that prefill.

    python -m benchmarks.profile_steps llama-3-8b --scheme w4a8 --workload 512/256
    python -m benchmarks.profile_steps llama-2-7b --scheme bf16 --workload paper --memory-gb 24 -o build/paper-bf16.json
    python -m benchmarks.profile_steps --join build/*.json    the record `profile`, of several such files

Weights are random. A second of a steady state is profiled (CUPTI sees the kernels of CUDA graphs too); steps are timed
over the whole run, the profiled part included.
"""

import argparse
import json
import re
import statistics
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from atom.quant.presets import get_scheme, kv_name
from atom.serving.bench.drive import Driver
from atom.serving.bench.engine_run import running
from atom.serving.bench.joining import latest, read_parts, rows_of, write_joined
from atom.serving.bench.lengths import parse_workload
from atom.serving.bench.offline_config import ModelChoice
from atom.serving.bench.report_data import write_rows
from atom.serving.bench.throughput import steady_rate
from atom.serving.bench.window import mid_life
from atom.serving.engine_config import EngineConfig

from .bench_engine import Timed, TimedRunner
from .timeline import Span, record

PARTS = (  # of a kernel's name, the first that matches
    ("decode attention", r"paged_decode|prefix_decode"),
    ("prefill attention", r"kv_gather|prefill|flash|fmha|sdpa|attention"),
    ("append", r"rope_append"),
    ("GEMM", r"gemm_sm90|gemm|cutlass_\d|nvjet|xmma|cublas|splitK"),
    ("producers", r"producers_sm90|producer"),
    ("sampling", r"greedy_sm90|draw_sm90"),
    ("torch", r"at::native|elementwise|reduce|index|softmax|sort|cat|vectorized"),
    ("copies", r"memcpy|memset|Memcpy|Memset"),
)


def part_of(kernel: str) -> str:
    """The part of a step that a kernel's name stands for."""
    return next((part for part, pattern in PARTS if re.search(pattern, kernel)), "other")


def busy_times(spans: list[Span]) -> tuple[Counter[str], float]:
    """Microseconds that each kernel adds to the time of the GPU, by name, and those in which nothing runs.

    Kernels overlap (programmatic dependent launch): one adds what it runs after all before it have ended.
    """
    found: Counter[str] = Counter()
    end, idle = spans[0].start, 0.0
    for span in spans:
        idle += max(0.0, span.start - end)
        found[span.name] += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return found, idle


def kinds(steps: list[Timed]) -> dict[str, dict[str, float]]:
    """Steps that only decode, and steps with prompts: how many, milliseconds between results, tokens, host time."""
    found: dict[str, dict[str, float]] = {}
    timed = [(later, later.ended - max(earlier.ended, 0.0)) for earlier, later in pairwise(steps) if later.ended]
    for name, group in (
        ("decode", [(s, t) for s, t in timed if s.num_decodes == s.num_tokens]),
        ("mixed", [(s, t) for s, t in timed if s.num_decodes != s.num_tokens]),
    ):
        if group:
            found[name] = {
                "steps": len(group),
                "seconds": round(sum(t for _, t in group), 3),
                "ms": round(1e3 * statistics.median(t for _, t in group), 3),
                "decodes": round(statistics.mean(s.num_decodes for s, _ in group), 1),
                "tokens": round(statistics.mean(s.num_tokens for s, _ in group), 1),
                "host_ms": round(1e3 * statistics.mean(t - s.waited for s, t in group), 3),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--join", type=Path, nargs="+", help="write the record from these files")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--workload", default="512/256")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256, help="requests under way")
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--after", type=float, default=1.0, help="seconds of the run before the profile")
    parser.add_argument("--seconds", type=float, default=1.0, help="that are profiled")
    parser.add_argument("--top", type=int, default=16, help="kernels to list")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.join:
        print(f"wrote {join(args.join)}")
        return
    if args.model is None:
        parser.error("name a shape to profile, or files to --join")
    engine = EngineConfig(load_format="dummy", scheme=args.scheme, max_num_seqs=args.batch, seed=0)
    started = time.perf_counter()
    with running(ModelChoice(args.model, args.memory_gb, engine), lambda text: None) as (ready, driver):
        print(f"ready after {time.perf_counter() - started:.1f} s: {json.dumps(ready.facts, default=str)}", flush=True)
        runner = TimedRunner(ready.runner)
        ready.engine._runner = runner
        found = profile_run(driver, runner, args)
    found = {"model": args.model, "scheme": args.scheme, "workload": args.workload, **found}
    if args.out is not None:
        write_rows(args.out, [row_of(args, found)], "profile")
    print(json.dumps(found), flush=True)


def row_of(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the record `profile`."""
    shares = {_key(part): share for part, share in found["shares"].items()}
    parts = [*(_key(part) for part, _ in PARTS), "other", "idle"]
    steps = found["steps"]
    seconds = sum(kind["seconds"] for kind in steps.values())
    decode, mixed = steps.get("decode", {}), steps.get("mixed", {})
    scheme = get_scheme(args.scheme)
    return {
        "shape": args.model,
        "scheme": scheme.name,
        "kv": kv_name(scheme),
        "workload": args.workload,
        "memory_gb": args.memory_gb or 0,
        "batch": args.batch,
        "out_tok_s": found["out_tok_s"],
        **{part: shares.get(part, 0.0) for part in parts},
        "decode_ms": decode.get("ms"),
        "mixed_ms": mixed.get("ms"),
        "mixed_time": round(mixed.get("seconds", 0.0) / seconds, 4) if seconds else None,
        "host_ms": decode.get("host_ms"),
        "mixed_tokens": mixed.get("tokens"),
    }


def _key(part: str) -> str:
    return "idle" if part == "nothing runs" else part.lower().replace(" ", "_")


def join(files: list[Path]) -> Path:
    """Write benchmarks/results/<machine>/profile.json; of two profiles of one thing the later counts."""
    parts = read_parts(files)
    keys = ("shape", "scheme", "kv", "workload", "memory_gb", "batch")
    rows = latest(rows_of(parts), keys)
    command = "python -m benchmarks.profile_steps SHAPE --scheme --workload --batch --memory-gb -o, --join"
    return write_joined("profile", parts, rows, command)


def profile_run(driver: Driver, runner: TimedRunner, args: argparse.Namespace) -> dict[str, Any]:
    fresh = parse_workload(args.workload).items(args.requests, 0)
    items = mid_life(fresh, args.batch, 0) + fresh
    window_s = args.after + args.seconds + 0.5
    record(lambda: None)  # the profiler's own start takes a second
    outcome: dict[str, Any] = {}
    thread = threading.Thread(
        target=lambda: outcome.update(samples=driver.run(items, 1, args.batch, window_s=window_s))
    )
    thread.start()
    time.sleep(args.after)
    spans = record(lambda: time.sleep(args.seconds))
    thread.join()
    times, idle = busy_times(spans)
    wall_us = sum(times.values()) + idle
    parts: Counter[str] = Counter({"nothing runs": idle})
    for kernel, us in times.items():
        parts[part_of(kernel)] += us
    print(f"{wall_us / 1e6:.2f} s of the GPU, kernels by what they add")
    for part, us in parts.most_common():
        print(f"  {us / wall_us:6.1%}  {part}")
    for kernel, us in times.most_common(args.top):
        print(f"    {us / wall_us:6.2%}  {kernel[:150]}")
    steps = runner.steps
    rate = steady_rate(driver.steps, 0.0)
    print(f"{rate} output tok/s at full batch, the profile's cost included")
    for name, row in kinds(steps).items():
        print(f"  {name}: {row}")
    shares = {part: round(us / wall_us, 4) for part, us in parts.items()}
    return {"shares": shares, "steps": kinds(steps), "out_tok_s": rate}


if __name__ == "__main__":
    main()
