"""What prompts cost the decodes beside them: steps that mix both, as rows of a decode bucket, in pieces, in two parts,
and whole.

    python -m benchmarks.mixed_steps llama-3-8b --scheme w4a8
    python -m benchmarks.mixed_steps llama-2-7b --scheme w4a4 --loaded steady:paper --batch 192 --memory-gb 24

A way to run them is taken even where the engine would take another. Milliseconds, of random weights:

alone   from the call that schedules a mixed step to its tokens, with an idle GPU before it; the same of a decode step,
        and of the first mixed step of its kind, which loads kernels
adds    what a mixed step takes more than a decode step, two steps under way as in the engine
host    until the mixed step is launched
gpu     what its kernels add to those of a decode step, and `idle` of the time in which none runs beside it

With --loaded, output tokens a second of a loaded engine, each way by turns.
"""

import argparse
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from atom.quant.presets import get_scheme, kv_name
from atom.records import write_record
from atom.serving import runner as runner_module
from atom.serving.bench.engine_run import running
from atom.serving.bench.lengths import parse_workload
from atom.serving.bench.offline_config import ModelChoice
from atom.serving.bench.summary import summarize
from atom.serving.bench.throughput import steady_rate
from atom.serving.bench.window import STEADY, full_window, mid_life, within
from atom.serving.engine_config import EngineConfig
from atom.serving.prompt_pieces import SIZES
from atom.serving.request import Request
from atom.serving.rows import MOST_TOKENS
from atom.serving.runner import Launched, Runner
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.startup import start_up

from .bench_engine import fill_cache, find_prompts, prompts
from .profile_steps import busy_times, part_of
from .timeline import record
from .timing import keep

WAYS = ("engine", "rows", "pieces", "parts", "whole")  # engine: as it chooses
STEPS, LOAD = "mixed-steps", "mixed-load"  # records
PAIRS = 8  # of a decode step and a mixed step that are measured
PROFILED = ((1, 25), (1, 512), (1, 1000))
PROMPTS = ((1, 1), (1, 25), (8, 25), (1, 100), (1, 256), (1, 512), (4, 512), (1, 1000), (4, 1000), (15, 512))


@contextmanager
def way(name: str) -> Iterator[None]:
    """Have every runner take mixed steps that way."""
    fits_rows, is_split, has_pieces = runner_module.fits_rows, runner_module.is_split, Runner._has_pieces
    try:
        if name == "rows":
            runner_module.fits_rows = lambda batch, rows, samples, size: batch.num_tokens <= rows
        elif name != "engine":
            runner_module.fits_rows = lambda *args: False
        if name in ("parts", "whole"):
            Runner._has_pieces = lambda self, batch: False  # type: ignore[method-assign]
        if name == "whole":
            runner_module.is_split = lambda batch: False
        yield
    finally:
        runner_module.fits_rows, runner_module.is_split = fits_rows, is_split
        Runner._has_pieces = has_pieces  # type: ignore[method-assign]


class Loop:
    """Decoding sequences in a cache of random contents, and steps by hand, two under way."""

    def __init__(self, runner: Runner, limits: Any, decodes: int, context: int) -> None:
        self.runner, self.limits = runner, limits
        self.scheduler = Scheduler(limits)
        allocate = self.scheduler.blocks.allocate
        find_prompts(self.scheduler)
        params = SamplingParams(max_tokens=256, temperature=0, ignore_eos=True)
        for index, prompt in enumerate(prompts(decodes, context, limits.vocab_size, decodes)):
            self.scheduler.add(Request(f"decode-{index}", prompt, params))
        self.under_way: deque[tuple[Any, Launched]] = deque()
        self.count = 0
        self.host = 0.0  # seconds of the last launch
        while decodes and self.scheduler.stats().running != decodes:
            self.step()
        for _ in range(4):
            if decodes:
                self.step()
        self.scheduler.blocks.allocate = allocate  # type: ignore[method-assign]

    def step(self) -> None:
        """Launch a step; take the results of the one before."""
        started = time.perf_counter()
        step = self.scheduler.schedule()
        assert step is not None
        launched = self.runner.launch(step)
        self.host = time.perf_counter() - started
        self.under_way.append((step, launched))
        while len(self.under_way) > 1:
            self.take()

    def take(self) -> None:
        step, launched = self.under_way.popleft()
        self.scheduler.update(step, launched.result())

    def drain(self) -> None:
        while self.under_way:
            self.take()

    def end(self) -> None:
        """Abort what runs."""
        self.drain()
        for request in {entry.request.request_id for entry in self.scheduler._running}:
            self.scheduler.abort(request)

    def ask(self, count: int, tokens: int) -> None:
        """Prompts that end with their first token."""
        for prompt in prompts(count, tokens, self.limits.vocab_size, self.count):
            self.count += 1
            self.scheduler.add(Request(f"prompt-{self.count}", prompt, SamplingParams(max_tokens=1, temperature=0)))

    def pairs(self, count: int, tokens: int) -> float:
        """Milliseconds of a decode step and a step with these prompts (none: another decode step)."""
        self.drain()
        started = time.perf_counter()
        for _ in range(PAIRS):
            self.step()
            self.ask(count, tokens)
            self.step()
        self.drain()
        return 1e3 * (time.perf_counter() - started) / PAIRS

    def alone(self, count: int, tokens: int) -> tuple[float, float, float]:
        """Milliseconds of a step from its schedule to its tokens, and of its launch, medians; and of the first such."""
        times: list[float] = []
        hosts: list[float] = []
        for _ in range(5):
            self.drain()
            self.ask(count, tokens)
            started = time.perf_counter()
            self.step()
            hosts.append(1e3 * self.host)
            self.drain()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times), statistics.median(hosts), times[0]

    def gpu(self, count: int, tokens: int) -> tuple[dict[str, float], float]:
        """Milliseconds of the GPU by part, and those in which it idles, of a decode step and a mixed one."""
        spans = record(lambda: self.pairs(count, tokens))
        times, idle = busy_times(spans)
        parts: dict[str, float] = {"kernels": len(spans) / PAIRS}
        for kernel, us in times.items():
            parts[part_of(kernel)] = parts.get(part_of(kernel), 0.0) + us / 1e3 / PAIRS
        return parts, idle / 1e3 / PAIRS


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    options = EngineConfig(
        load_format="dummy",
        scheme=args.scheme,
        max_num_seqs=max(args.decodes) + max(count for count, _ in PROMPTS),
        enable_prefix_caching=False,
        admission_interval=1,
        max_model_len=args.longest,
        gpu_memory_utilization=0.5,
        seed=0,
    )
    started = time.perf_counter()
    ready = start_up(args.model, options)
    fill_cache(ready.runner.kv.pool)
    print(f"ready after {time.perf_counter() - started:.1f} s: {json.dumps(ready.facts)}", flush=True)
    found = []
    for decodes in args.decodes:
        loop = Loop(ready.runner, ready.limits, decodes, args.context)
        alone_ms = loop.alone(0, 0)[0] if decodes else 0.0
        decode_ms = loop.pairs(0, 0) / 2 if decodes else 0.0
        plain = loop.gpu(0, 0)[0] if args.profile and decodes else {}
        loop.end()
        for (count, tokens), name in product(PROMPTS, args.ways):
            most = {"rows": ready.limits.max_num_seqs + MOST_TOKENS, "pieces": SIZES[-1]}
            if count * tokens + decodes > most.get(name, ready.limits.max_num_batched_tokens):
                continue
            loop = Loop(ready.runner, ready.limits, decodes, args.context)
            with way(name):
                first_ms = loop.alone(count, tokens)[2]  # with what is loaded or grown once
                row = {"decodes": decodes, "prompts": count, "tokens": tokens, "way": name, "decode_ms": decode_ms}
                row |= {"decode_alone_ms": alone_ms, "first_ms": first_ms}
                row["alone_ms"], row["host_ms"], _ = loop.alone(count, tokens)
                row["adds_ms"] = loop.pairs(count, tokens) - 2 * decode_ms if decodes else None
                if args.profile and decodes and (count, tokens) in PROFILED:
                    parts, row["idle_ms"] = loop.gpu(count, tokens)
                    row["gpu"] = {part: round(ms - plain.get(part, 0.0), 2) for part, ms in parts.items()}
            loop.end()
            row = {key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def loaded_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of a loaded engine: each workload under all limits, each way, by turns."""
    engine = EngineConfig(load_format="dummy", scheme=args.scheme, max_num_seqs=args.batch, seed=0)
    found = []
    started = time.perf_counter()
    with running(ModelChoice(args.model, args.memory_gb, engine), lambda text: None) as (ready, driver):
        print(f"ready after {time.perf_counter() - started:.1f} s: {json.dumps(ready.facts, default=str)}", flush=True)
        scheduler = ready.engine._scheduler
        for asked, turn, both, name in product(args.loaded, range(args.turns), args.limits, args.ways):
            is_steady = asked.startswith(STEADY)
            fresh = parse_workload(asked.removeprefix(STEADY)).items(512, 0)
            limits = dict(zip(("max_num_batched_tokens", "admission_interval"), map(int, both.split("/")), strict=True))
            few = MOST_TOKENS if name in ("engine", "rows") else 1  # others are worth gathering for
            scheduler.config = replace(scheduler.config, admission_few=few, **limits)
            items = mid_life(fresh, args.batch, turn) + fresh if is_steady else fresh
            with way(name):
                samples = driver.run(items, len(found) + 1, args.batch, window_s=args.seconds if is_steady else None)
            if is_steady and (window := full_window(driver.steps)) is not None:
                samples = within(samples, *window)
            summary = summarize(samples)
            rate = steady_rate(driver.steps, 0.0) if is_steady else round(summary.out_tok_s, 1)
            row = {"memory_gb": args.memory_gb or 0, "workload": asked, "batch": args.batch, "turn": turn, "way": name}
            row |= {**limits, "out_tok_s": rate}
            for key, spread in (("ttft", summary.ttft), ("tpot", summary.tpot), ("itl", summary.itl)):
                row |= (
                    {} if spread is None else {f"{key}_p50": round(spread.p50, 2), f"{key}_p99": round(spread.p99, 2)}
                )
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="llama-3-8b")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--decodes", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--longest", type=int, default=8192, help="max_model_len")
    parser.add_argument("--ways", nargs="+", default=WAYS[1:4])
    parser.add_argument("--profile", action="store_true", help="parts of the GPU's time too")
    parser.add_argument("--loaded", metavar="WORKLOAD", nargs="+", help="a loaded engine instead of single steps")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument(
        "--limits", nargs="+", default=["8192/8"], help="max_num_batched_tokens/admission_interval, of a loaded engine"
    )
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--record", type=Path, nargs="+", metavar="FILE", help="write the records from what -o wrote")
    args = parser.parse_args()
    if args.record:
        for path in join(args.record):
            print(path)
        return
    rows = loaded_rows(args) if args.loaded else rows_of(args)
    if args.out is not None:
        scheme = get_scheme(args.scheme)
        what = {"shape": args.model, "scheme": scheme.name, "kv": kv_name(scheme)}
        keep(LOAD if args.loaded else STEPS, [{**what, **row} for row in rows], str(args.out))


def join(files: list[Path]) -> list[Path]:
    """Write the records of what such files hold."""
    found = [json.loads(file.read_text()) for file in files]
    paths = []
    for name, key in ((STEPS, "decodes"), (LOAD, "workload")):
        runs = [run for run in found if all(key in row for row in run["rows"])]
        if runs:
            rows = [row for run in runs for row in run["rows"]]
            paths.append(write_record(name, rows, "h200", where=runs[0]["where"], commit=runs[0]["commit"]))
    return paths


if __name__ == "__main__":
    main()
