"""Decode steps through the whole engine: milliseconds a step, host time, idle share of the GPU.

    python -m benchmarks.bench_engine --out engine.json     on the GPU: rows of the record engine-latency
    python -m benchmarks.bench_engine --record engine.json  writes benchmarks/results/h200/engine-latency.json from them
    python -m benchmarks.bench_engine --host                any machine: the record engine-host, without a device

Weights are dummies in the shape of Llama-3-8B; every sequence has a prompt of its own, so nothing is shared in a cache.
`--host` replaces model and sampling kernels by nothing and counts the processor time of the engine's thread.
"""

import argparse
import gc
import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from atom.kernels.bounds import GPUS
from atom.models.dummy import dummy_source
from atom.models.loader import load_source
from atom.quant.presets import get_scheme, kv_name
from atom.records import write_record
from atom.serving.batch import Step
from atom.serving.bench.floor import model_floor
from atom.serving.config import SchedulerConfig
from atom.serving.decode_buckets import bucket_sizes
from atom.serving.engine import Engine
from atom.serving.engine_config import EngineConfig
from atom.serving.kv_pool import KVPool
from atom.serving.request import Request
from atom.serving.result import StepResult
from atom.serving.runner import Launched, Runner
from atom.serving.sampler import Sampled, Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output
from atom.serving.startup import start_up

from .timing import keep, save

SCHEMES = ("bf16", "fp8", "w4a8", "w4a4")
BATCHES = (1, 16, 64, 128, 256)
CONTEXTS = (512, 4096)
STEPS = 64  # that are measured
WARM = 16  # decode steps before them


@dataclass
class Timed:
    """One step: when its launch began, when its result was there, seconds of waiting for it, GPU events around it."""

    num_decodes: int
    num_tokens: int
    begun: float
    ended: float = 0.0
    waited: float = 0.0
    events: list[Any] = field(default_factory=list)


class TimedRunner:
    """A runner with a stopwatch; the engine sees no difference."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.depth = runner.depth
        self.steps: list[Timed] = []

    def launch(self, step: Step) -> "TimedFlight":
        timed = Timed(step.batch.num_decodes, step.batch.num_tokens, time.perf_counter())
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launched = self.runner.launch(step)
        end.record()
        timed.events = [start, end]
        self.steps.append(timed)
        return TimedFlight(launched, timed)

    def reset(self) -> None:
        self.runner.reset()


class TimedFlight:
    def __init__(self, launched: Launched, timed: Timed) -> None:
        self.launched = launched
        self.timed = timed

    def result(self) -> StepResult:
        before = time.perf_counter()
        if self.launched._event is not None:
            self.launched._event.synchronize()
        self.timed.waited = time.perf_counter() - before
        result = self.launched.result()
        self.timed.ended = time.perf_counter()
        return result


def prompts(batch: int, context: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random ones of `context` tokens, all different."""
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, vocabulary, context).tolist()) for _ in range(batch)]


def output_length(batch: int, context: int, step_tokens: int) -> int:
    """Tokens for each: the first prompts decode while the last are still being computed."""
    return -(-batch * context // (step_tokens - batch)) + WARM + STEPS


def decode(engine: Engine, asked: list[tuple[int, ...]], tokens: int, done: threading.Event, tag: str) -> None:
    """Run the prompts until each has `tokens` tokens."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    done.clear()
    for index, prompt in enumerate(asked):
        engine.submit(Request(f"{tag}-{index}", prompt, params))
    if not done.wait(300):
        raise RuntimeError(f"{tag}: {engine.error or 'no end after 300 s'}; see the log.")


def measure(scheme: str, batches: tuple[int, ...], contexts: tuple[int, ...], shape: str) -> list[dict[str, Any]]:
    """Rows of one scheme."""
    options = EngineConfig(
        load_format="dummy",
        scheme=scheme,
        device="cuda",
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        seed=0,
    )
    started = time.perf_counter()
    ready = start_up(shape, options)
    print(f"{scheme}: ready after {time.perf_counter() - started:.1f} s, {ready.facts}", flush=True)
    runner = TimedRunner(ready.runner)
    engine = Engine(runner, Scheduler(ready.limits))
    done, open_ = threading.Event(), 0

    def listen(outputs: list[Output]) -> None:
        nonlocal open_
        open_ -= sum(output.finish_reason is not None for output in outputs)
        if not open_:
            done.set()

    engine.start(listen)
    rows = []
    bare, kv = get_scheme(scheme).name, kv_name(get_scheme(scheme))
    floor = model_floor(shape, scheme, GPUS["h200"])
    for context in contexts:
        for batch in batches:
            row = {"shape": shape, "scheme": bare, "kv": kv, "batch": batch, "context": context}
            row["sol_ms"] = round(floor.step_us(batch, context) / 1e3, 3)
            tokens = output_length(batch, context, ready.limits.max_num_batched_tokens)
            if batch * (context + tokens + 16) > ready.limits.cache_tokens:
                rows.append({**row, "ms": None, "host_ms": None, "idle": None, "note": "does not fit"})
                continue
            open_, runner.steps = batch, []
            length = max(1, context - tokens // 2)  # the measured steps lie around the context
            vocabulary = ready.limits.vocab_size
            decode(
                engine, prompts(batch, length, vocabulary, context + batch), WARM + STEPS, done, f"{context}-{batch}"
            )
            full = [t for t in runner.steps if t.num_decodes == t.num_tokens == batch]
            rows.append({**row, **summary(full[-STEPS:])})
            print(rows[-1], flush=True)
    engine.shutdown()
    del engine, runner, ready
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def summary(steps: list[Timed]) -> dict[str, Any]:
    """Of consecutive decode steps.

    ms       median time between results
    host_ms  mean of that time in which the engine's thread did not wait for the GPU
    idle     share of the time in which the GPU had nothing to do between steps
    """
    torch.cuda.synchronize()
    times = [later.ended - earlier.ended for earlier, later in pairwise(steps)]
    host = [elapsed - later.waited for elapsed, later in zip(times, steps[1:], strict=True)]
    gaps = [earlier.events[1].elapsed_time(later.events[0]) for earlier, later in pairwise(steps)]
    total = steps[0].events[1].elapsed_time(steps[-1].events[1])
    return {
        "ms": round(statistics.median(times) * 1e3, 3),
        "host_ms": round(statistics.mean(host) * 1e3, 3),
        "idle": round(max(0.0, sum(gaps) / total), 4),
    }


def host_rows(batches: tuple[int, ...], contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Processor time of the engine's thread a decode step, by part, with a device that does nothing."""
    return [host_row(batch, context, top_p) for top_p in (1.0, 0.9) for context in contexts for batch in batches]


def host_row(batch: int, context: int, top_p: float) -> dict[str, Any]:
    model = load_source(dummy_source("tiny"))
    answer = output_length(batch, context, 8192)
    tokens = context + answer + 8
    limits = SchedulerConfig(258, tokens, batch * -(-tokens // 16) + 8, max_num_seqs=batch)
    pool = KVPool(model.config, None, limits.num_blocks + 1, limits.block_size)
    sampler = Sampler(batch, 258, "cpu", seed=0)
    runner = Runner(model, pool, sampler, batch, 2, buckets=bucket_sizes(batch), max_blocks=-(-tokens // 16))
    scheduler = Scheduler(limits)
    engine = Engine(runner, scheduler, None)
    clock = Clock(batch)
    # what a GPU would do while the host goes on
    buckets = runner.buckets
    assert buckets is not None
    hidden, tokens_out = torch.zeros(limits.max_num_batched_tokens, 1), torch.zeros(batch, dtype=torch.int64)
    model.forward = lambda t, p, kv: hidden[: len(t)]  # type: ignore[method-assign]
    model.logits = lambda h: hidden[: len(h)]  # type: ignore[method-assign]
    buckets._compute = lambda size: None  # type: ignore[method-assign]
    fine = torch.zeros(batch, dtype=torch.bool)
    sampler.run = (
        lambda raw, plan: Sampled(  # type: ignore[method-assign]
            tokens_out[: len(raw)], fine[: len(raw)], None, plan.num_logprobs
        )
    )
    for part, owner, name in (
        ("schedule_us", scheduler, "schedule"),
        ("launch_us", runner, "launch"),
        ("update_us", scheduler, "update"),
        ("emit_us", engine, "_emit"),
        ("step_us", engine, "_turn"),
    ):
        clock.measure(owner, name, part)
    clock.watch(runner)
    done, open_ = threading.Event(), batch

    def listen(outputs: list[Output]) -> None:
        nonlocal open_
        open_ -= sum(output.finish_reason is not None for output in outputs)
        if not open_:
            done.set()

    engine.start(listen)
    asked = prompts(batch, context, 258, 0)
    greedy = top_p == 1.0
    params = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0.0 if greedy else 0.8, top_p=top_p)
    for index, prompt in enumerate(asked):
        engine.submit(Request(f"{index}", prompt, params))
    assert done.wait(300), engine.error
    engine.shutdown()
    parts = {part: round(statistics.median(times[-STEPS:]) * 1e6, 1) for part, times in clock.parts.items()}
    return {"batch": batch, "context": context, "sampling": "greedy" if greedy else "top_p", **parts}


class Clock:
    """Processor time of a thread inside functions, in turns that launch a decode step of `batch` sequences."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.parts: dict[str, list[float]] = {}
        self._is_full = False

    def watch(self, runner: Runner) -> None:
        launch = runner.launch

        def run(step: Step) -> Any:
            self._is_full = step.batch.num_decodes == step.batch.num_tokens == self.batch
            return launch(step)

        runner.launch = run  # type: ignore[method-assign]

    def measure(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)
        times = self.parts.setdefault(part, [])

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                if self._is_full:
                    times.append(time.thread_time() - started)

        setattr(owner, name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="host time alone, on any machine")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="separated by commas, w4a4,bf16+kv4 say")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.record:
        save("engine-latency", args.record)
        return
    batches, contexts = (tuple(int(part) for part in text.split(",")) for text in (args.batches, args.contexts))
    if args.host:
        rows = host_rows(batches, contexts)
        for row in rows:
            print(row)
        if not args.out:
            print(write_record("engine-host", rows, "cpu"))
        return
    rows = [row for scheme in args.schemes.split(",") for row in measure(scheme, batches, contexts, args.shape)]
    keep("engine-latency", rows, args.out)


if __name__ == "__main__":
    main()
