"""Decode steps through the whole engine: milliseconds a step, host time, and the share of it that the GPU is idle.

    python -m benchmarks.bench_engine --out engine.json     on the GPU: rows of the record engine-latency
    python -m benchmarks.bench_engine --record engine.json  writes benchmarks/results/h200/engine-latency.json from them
                                                            (several files; --commit where they came of no checkout)
    python -m benchmarks.bench_engine --profile 1,64        also prints the kernels of a step at these batches

Weights are dummies in the shape of Llama-3-8B. Decoding is what is measured, so prompts are not computed: the cache is
filled with random keys and values once, and every sequence finds its prompt there, in blocks of its own.
The host's part alone, on any machine: bench_host.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atom.kernels.bounds import GPUS, linear_bound_us
from atom.models.head import HeadFormat
from atom.quant.presets import get_scheme, kv_name
from atom.quant.schemes import LinearScheme
from atom.records import write_record
from atom.serving.batch import Step
from atom.serving.bench.floor import model_floor
from atom.serving.bench.shapes import shape_config
from atom.serving.engine import Engine
from atom.serving.engine_config import EngineConfig
from atom.serving.kv_pool import KVPool
from atom.serving.news import ended
from atom.serving.request import Request
from atom.serving.result import StepResult
from atom.serving.runner import Launched, Runner
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output
from atom.serving.startup import start_up

from .host_clock import Clock
from .timeline import Span, idle_median, idle_share, record, split_steps, table
from .timing import keep

SCHEMES = ("bf16", "fp8", "w4a8", "w4a4")
BATCHES = (1, 16, 64, 128, 256)
CONTEXTS = (512, 4096)
STEPS = 64  # that are measured
WARM = 16  # decode steps before them
PROFILED = 20  # decode steps of a profile
FILL = 2048  # blocks of the cache that are drawn; the others repeat them


@dataclass
class Timed:
    """One step: when its launch began, when its result was there, seconds of waiting for it."""

    num_decodes: int
    num_tokens: int
    begun: float
    ended: float = 0.0
    waited: float = 0.0


class TimedRunner:
    """A runner with a stopwatch; the engine sees no difference."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.depth = runner.depth
        self.steps: list[Timed] = []
        self.waited = 0.0  # seconds, in all

    def launch(self, step: Step) -> "TimedFlight":
        timed = Timed(step.batch.num_decodes, step.batch.num_tokens, time.perf_counter())
        launched = self.runner.launch(step)
        self.steps.append(timed)
        return TimedFlight(self, launched, timed)

    def reset(self) -> None:
        self.runner.reset()


class TimedFlight:
    def __init__(self, runner: TimedRunner, launched: Launched, timed: Timed) -> None:
        self.runner = runner
        self.launched = launched
        self.timed = timed

    def result(self) -> StepResult:
        before = time.perf_counter()
        if self.launched._event is not None:
            self.launched._event.synchronize()
            self.launched._event = None  # what follows finds the results there
        self.timed.waited = time.perf_counter() - before
        self.runner.waited += self.timed.waited
        result = self.launched.result()
        self.timed.ended = time.perf_counter()
        return result


def prompts(batch: int, context: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random ones of `context` tokens, all different."""
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, vocabulary, context).tolist()) for _ in range(batch)]


def fill_cache(pool: KVPool) -> None:
    """Random keys and values of a normal distribution everywhere, the same in every layer and every FILL blocks."""
    count = min(FILL, pool.num_blocks)
    slots = torch.arange(count * pool.block_size, device=pool.device)
    shape = (len(slots), pool.config.num_kv_heads, pool.config.head_dim)
    both = [torch.randn(shape, dtype=pool.dtype, device=pool.device) for _ in range(2)]
    for index, layout in enumerate(pool.layouts):
        layer = pool.layer(index)
        for part, values in enumerate(both):
            layout.write(layer, slots, part, values)
        for start in range(count, pool.num_blocks, count):
            layer[start : start + count] = layer[: min(count, pool.num_blocks - start)]


def find_prompts(scheduler: Scheduler) -> None:
    """Have every new sequence find all of its prompt but the last token in the cache, in blocks that are its own."""
    allocate = scheduler.blocks.allocate

    def found(sequence_id: int, length: int, digests: Any, reserve: int) -> int | None:
        return None if allocate(sequence_id, length, digests, reserve) is None else length - 1

    scheduler.blocks.allocate = found  # type: ignore[method-assign]


def decode(engine: Engine, asked: list[tuple[int, ...]], tokens: int, done: threading.Event, tag: str) -> None:
    """Run the prompts until each has `tokens` tokens."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    done.clear()
    for index, prompt in enumerate(asked):
        engine.submit(Request(f"{tag}-{index}", prompt, params))
    if not done.wait(300):
        raise RuntimeError(f"{tag}: {engine.error or 'no end after 300 s'}; see the log.")


class Bench:
    """An engine with dummy weights in `shape` that decodes at batches of one's choice."""

    def __init__(self, scheme: str, shape: str, max_num_seqs: int, head: HeadFormat = "full") -> None:
        options = EngineConfig(
            load_format="dummy",
            scheme=scheme,
            head=head,
            device="cuda",
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=False,
            seed=0,
        )
        started = time.perf_counter()
        ready = start_up(shape, options)
        self.facts = {**ready.facts, "ready_s": round(time.perf_counter() - started, 2)}
        self.limits = ready.limits
        self.runner = TimedRunner(ready.runner)
        self.scheduler = Scheduler(ready.limits)
        fill_cache(ready.runner.kv.pool)
        find_prompts(self.scheduler)
        self.engine = Engine(self.runner, self.scheduler)
        self.clock = Clock(self.engine, max_num_seqs, lambda: self.runner.waited)
        self._done, self._open = threading.Event(), 0
        self.engine.start(self._listen)

    def _listen(self, outputs: Sequence[Output]) -> None:
        self._open -= len(ended(outputs))
        if not self._open:
            self._done.set()

    def fits(self, batch: int, context: int) -> bool:
        return batch * (context + WARM + STEPS + 16) <= self.limits.cache_tokens

    def decode(self, batch: int, context: int, tokens: int) -> list[Timed]:
        """Decode `tokens` tokens of each sequence, greedily, around `context`; the steps that do nothing else."""
        length = max(1, context - tokens // 2)
        asked = prompts(batch, length, self.limits.vocab_size, context + batch)
        self._open, self.runner.steps, self.clock.batch = batch, [], batch
        decode(self.engine, asked, tokens, self._done, f"{context}-{batch}-{tokens}")
        return [t for t in self.runner.steps if t.num_decodes == t.num_tokens == batch]

    def profile(self, batch: int, context: int) -> list[list[Span]]:
        """The kernels of consecutive decode steps."""
        spans = record(lambda: self.decode(batch, context, PROFILED + 1))
        return split_steps(spans, PROFILED)[3:]  # the first is the prompts' last tokens


def measure(
    scheme: str,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    shape: str,
    profiled: tuple[int, ...] = (),
    head: HeadFormat = "full",
) -> list[dict[str, Any]]:
    """Rows of one scheme; prints where a step's time goes at batches in `profiled`."""
    bench = Bench(scheme, shape, max(batches), head)
    print(f"{scheme}: {bench.facts}", flush=True)
    rows = []
    bare, kv = get_scheme(scheme).name, kv_name(get_scheme(scheme))
    floor = model_floor(shape, scheme, GPUS["h200"])
    for context in contexts:
        for batch in batches:
            row = {"shape": shape, "scheme": bare, "kv": kv, "head": head, "batch": batch, "context": context}
            sol_us = floor.step_us(batch, context) - (head_gain_us(shape, batch) if head == "int8" else 0)
            row["sol_ms"] = round(sol_us / 1e3, 3)
            if not bench.fits(batch, context):
                print(f"{scheme}: {batch} sequences of {context} tokens do not fit", flush=True)
                continue
            measured = summary(bench.decode(batch, context, WARM + STEPS)[-STEPS:]) | bench.clock.medians(STEPS)
            kernels = bench.profile(batch, context)
            idle = {"idle": round(idle_share(kernels), 4), "idle_median": round(idle_median(kernels), 4)}
            rows.append({**row, **measured, **idle})
            print(rows[-1], flush=True)
            if batch in profiled:
                print(f"{scheme}, batch {batch}, context {context}\n{table(kernels)}", flush=True)
    bench.engine.shutdown()
    return rows


def head_gain_us(shape: str, batch: int) -> float:
    """By how much the floor of a step sinks if the head is in INT8."""
    config, gpu = shape_config(shape), GPUS["h200"]
    full, narrow = (
        linear_bound_us(gpu, batch, config.vocab_size, config.hidden_size, linear)
        for linear in (LinearScheme(), get_scheme("w8a8").default_linear)
    )
    return full - narrow


def measure_apart(scheme: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one scheme, from a process of its own: it leaves its memory to the next."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        chosen = ("batches", "contexts", "profile", "shape", "head")
        options = [f"--{name}={getattr(args, name)}" for name in chosen]
        command = [sys.executable, "-m", "benchmarks.bench_engine", f"--schemes={scheme}", f"--out={out}", *options]
        subprocess.run(command, check=True)
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
        return rows


def summary(steps: list[Timed]) -> dict[str, Any]:
    """Of consecutive decode steps.

    ms       median time between results
    mean_ms  their mean: pauses show
    host_ms  mean of that time in which the engine's thread did not wait for the GPU
    """
    times = [later.ended - earlier.ended for earlier, later in pairwise(steps)]
    host = [elapsed - later.waited for elapsed, later in zip(times, steps[1:], strict=True)]
    return {
        "ms": round(statistics.median(times) * 1e3, 3),
        "mean_ms": round(statistics.mean(times) * 1e3, 3),
        "host_ms": round(statistics.mean(host) * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="separated by commas, w4a4,bf16+kv4 say")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--profile", default="", help="batches whose kernels are listed")
    parser.add_argument("--head", choices=("full", "int8"), default="full", help="the head's format")
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", nargs="+", help="write the record from what -o wrote")
    parser.add_argument("--commit", help="of these files, where they do not know it")
    args = parser.parse_args()
    if args.record:
        found = [json.loads(Path(file).read_text()) for file in args.record]
        rows = [row for run in found for row in run["rows"]]
        commit, where = args.commit or found[0]["commit"], found[0]["where"]
        schemes = ",".join(dict.fromkeys(row["scheme"] for row in rows))
        command = f"python -m benchmarks.bench_engine --schemes {schemes}"
        print(write_record("engine-latency", rows, "h200", command=command, where=where, commit=commit))
        return
    batches, contexts, profiled = (
        tuple(int(part) for part in text.split(",") if part) for text in (args.batches, args.contexts, args.profile)
    )
    schemes = args.schemes.split(",")
    if len(schemes) == 1:
        rows = measure(schemes[0], batches, contexts, args.shape, profiled, args.head)
    else:
        rows = [row for scheme in schemes for row in measure_apart(scheme, args)]
    keep("engine-latency", rows, args.out)


if __name__ == "__main__":
    main()
