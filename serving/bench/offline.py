"""`atom bench throughput` and `atom bench latency`: the engine in process, on real or on random weights."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from atom.errors import AtomError, UnsupportedError
from atom.kernels.bounds import GPUS, Gpu
from atom.models.device import choose_device
from atom.models.dummy import SHAPES
from atom.quant.presets import get_scheme

from ..engine_config import EngineConfig
from ..startup import Ready, start_up
from .arrivals import Arrivals
from .drive import Driver, StepTime
from .floor import GIB, Mix, ModelFloor, model_floor
from .lengths import parse_workload
from .offline_config import LatencyConfig, ModelChoice, ThroughputConfig
from .prompts import Vocabulary
from .sample import Sample
from .summary import Summary, summarize
from .workload import Segment, WorkItem, drop_long, mean_context

Say = Callable[[str], None]
WARM_UP = (8, 64, 8)  # requests, prompt tokens, output tokens


@dataclass(frozen=True)
class Point:
    """One run: how many were under way (0: all at once) or came a second, and what came of it.

    batch        most sequences that one step decoded
    steady_tok_s output tokens a second between the first and the last step of at least nine tenths of that batch; None
                 where those span less than a fifth of the run
    bound_tok_s  what the GPU allows at that batch, where its rates are known
    weight_bytes of the weights as packed for kernels
    """

    concurrency: int
    rate: float | None
    workload: str
    requests: int
    too_long: int
    batch: int
    input: float
    output: float
    summary: Summary
    steady_tok_s: float | None
    bound_tok_s: float | None
    weight_bytes: int
    facts: dict[str, Any]
    memory_gb: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "scheme": "bf16" if self.facts["scheme"] == "none" else self.facts["scheme"],
            "kv": self.facts["kv"],
            "memory_gb": self.memory_gb or 0,
            "workload": self.workload,
            "concurrency": self.concurrency,
            "rate": self.rate,
            "requests": self.requests,
            "too_long": self.too_long,
            "batch": self.batch,
            "input": self.input,
            "output": self.output,
            "steady_tok_s": self.steady_tok_s,
            "bound_tok_s": self.bound_tok_s,
            "weight_bytes": self.weight_bytes,
            "seconds": round(self.seconds, 2),
            "summary": self.summary.to_dict(),
            "engine": self.facts,
        }


@contextmanager
def running(choice: ModelChoice, say: Say) -> Iterator[tuple[Ready, Driver]]:
    """The engine, started and warmed up by a few requests; shut down afterwards."""
    options = _with_memory(choice, choice.engine_options)
    ready = start_up(choice.model, options, say)
    low = min(256, ready.limits.vocab_size - 1)
    if ready.tokenizer is None:
        vocabulary = Vocabulary.of_range(low if ready.limits.vocab_size > 1024 else 0, ready.limits.vocab_size)
    else:
        vocabulary = Vocabulary.of_tokenizer(ready.tokenizer)
    driver = Driver(ready.engine, vocabulary.token_ids)
    driver.start()
    try:
        say("warming up")
        count, prompt, output = WARM_UP
        length = min(prompt, ready.limits.max_sequence_tokens - output)
        items = [WorkItem((Segment(f"warm-up {i}", length),), output) for i in range(count)]
        _check(driver.run(items, seed=choice.seed), "the warm-up")
        yield ready, driver
    finally:
        ready.engine.shutdown()


def _check(samples: list[Sample], what: str) -> list[Sample]:
    """The samples, if all are good; AtomError says which failed."""
    if bad := [sample for sample in samples if not sample.is_good]:
        raise AtomError(f"{len(bad)} of {len(samples)} requests of {what} failed ({bad[0].error}); the log says why")
    return samples


def _with_memory(choice: ModelChoice, options: EngineConfig) -> EngineConfig:
    """The engine's options under the memory budget.

    On a GPU the budget is a share of its memory, as vLLM's gpu_memory_utilization counts it: weights, activations at
    their peak, whatever else is there, and the rest for the cache. On a CPU the cache gets what packed weights leave.
    """
    if choice.memory_gb is None:
        return options
    device = choose_device(options.device)
    budget = choice.memory_gb * GIB
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if budget > total:
            raise ValueError(f"--memory-gb {choice.memory_gb:g} is more than the GPU's {total / GIB:.1f} GiB; lower it")
        return replace(options, gpu_memory_utilization=budget / total)
    if not choice.is_dummy:
        raise UnsupportedError("--memory-gb on a CPU is for shapes alone (--load-format dummy); use --kv-cache-bytes")
    weights = model_floor(choice.model, choice.engine.scheme or "bf16", GPUS["h200"]).weight_bytes
    left = int(budget - weights)
    if left <= 0:
        raise ValueError(
            f"the weights alone take {weights / GIB:.2f} GiB, --memory-gb is {choice.memory_gb:g}; raise it, or take "
            "a scheme of fewer bits"
        )
    return replace(options, kv_cache_bytes=left)


def known_gpu(device: torch.device) -> Gpu | None:
    """The GPU's rates for bounds, None for a CPU or a GPU whose rates are not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def served_floor(ready: Ready, gpu: Gpu) -> ModelFloor:
    """The floor of what runs, with the cache format that runs."""
    weights, cache = ready.model.scheme or get_scheme("bf16"), ready.runner.kv.pool.scheme
    return ModelFloor(ready.model.config, weights.with_kv(None if cache is None else cache.kv), gpu)


def bench_throughput(
    config: ThroughputConfig, say: Say = lambda text: None, found: Callable[[Point], None] = lambda point: None
) -> list[Point]:
    """One point for each concurrency or rate, in order; `found` is called with each as it is done.

    Of the concurrencies that the cache cannot hold on average the smallest is run (there memory decides), and larger
    ones are left out: the file of points then has an entry `skipped` for each.
    """
    points = []
    with running(config, say) as (ready, driver):
        gpu = known_gpu(ready.model.device)
        floor = served_floor(ready, gpu or GPUS["h200"])
        runs: list[tuple[int, float | None]] = (
            [(0, rate) for rate in config.rate] if config.rate else [(c, None) for c in config.concurrency]
        )
        held = cache_holds(config, ready)
        beyond = min((c for c, _ in runs if c > held), default=0)
        for number, (concurrency, rate) in enumerate(runs):
            if beyond and concurrency > beyond:
                why = f"the cache holds {held:.0f} requests on average, so that {beyond} show what {concurrency} would"
                say(f"skipped: {why}")
                _keep(config, {"concurrency": concurrency, "rate": rate, "skipped": why})
                continue
            point = _point(config, ready, driver, floor, number, concurrency, rate, say)
            if gpu is None:
                point = replace(point, bound_tok_s=None)
            points.append(point)
            found(point)
            _keep(config, point.to_dict() | {"is_memory_bound": concurrency > held})
    return points


def _keep(config: ThroughputConfig, entry: dict[str, Any]) -> None:
    if config.points is not None:
        with config.points.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def cache_holds(config: ThroughputConfig, ready: Ready) -> float:
    """Requests of the workload that the KV cache holds at once, each of its mean length over its life."""
    items = parse_workload(config.workload).items(config.requests_at(0), config.seed)
    items, _ = drop_long(items, ready.limits.max_sequence_tokens)
    return ready.limits.cache_tokens / mean_context(items) if items else 0.0


def _point(
    config: ThroughputConfig,
    ready: Ready,
    driver: Driver,
    floor: ModelFloor,
    number: int,
    concurrency: int,
    rate: float | None,
    say: Say,
) -> Point:
    workload = parse_workload(config.workload)
    wanted = config.requests_at(concurrency)
    items, too_long = drop_long(workload.items(wanted, config.seed), ready.limits.max_sequence_tokens)
    if not items:
        raise ValueError(
            f"no request of {workload.name} fits the engine's {ready.limits.max_sequence_tokens} tokens; give it more "
            "memory, or shorter requests"
        )
    due = None if rate is None else Arrivals(rate).times(items, config.seed)
    what = f"{rate:g} requests/s" if rate is not None else f"{concurrency or 'all'} at once"

    def show(done: int, total: int, tokens: int) -> None:
        say(f"{workload.name}, {what}: {done} of {total} requests, about {tokens:,} tokens")

    started = time.perf_counter()
    seed = config.seed + 1 + number  # other prompts for each run, or the prefix cache would know them from the last
    samples = driver.run(items, seed, concurrency or None, due, show)
    summary = summarize(samples)
    batch = max((step.sequences for step in driver.steps), default=0)
    mix = Mix.of(items)
    return Point(
        concurrency,
        rate,
        workload.name,
        len(items),
        too_long,
        batch,
        round(float(mix.prompts.mean()), 1),
        round(mix.outputs / len(items), 1),
        summary,
        steady_rate(driver.steps),
        round(floor.bound(mix, max(1, batch)).out_tok_s, 1),
        floor.weight_bytes,
        ready.facts,
        config.memory_gb,
        time.perf_counter() - started,
    )


def steady_rate(steps: Sequence[StepTime]) -> float | None:
    """See `Point.steady_tok_s`."""
    batch = max((step.sequences for step in steps), default=0)
    full = [index for index, step in enumerate(steps) if step.sequences >= 0.9 * batch]
    if len(full) < 2:
        return None
    first, last = full[0], full[-1]
    span = steps[last].at_s - steps[first].at_s
    if span < steps[-1].at_s / 5:
        return None
    return round(sum(step.tokens for step in steps[first + 1 : last + 1]) / span, 1)


@dataclass(frozen=True)
class StepLatency:
    """A static batch: ms is the median decode step, sol_ms its floor, prefill_ms until all had their first token."""

    batch: int
    context: int
    ms: float
    ms_p99: float
    prefill_ms: float
    sol_ms: float | None


def bench_latency(config: LatencyConfig, say: Say = lambda text: None) -> tuple[list[StepLatency], dict[str, Any]]:
    """Every batch at every context; and the facts of the engine that ran them.

    Raises UnsupportedError if a batch does not fit the engine at once: then there is no such step.
    """
    options = replace(config.engine, enable_prefix_caching=False)
    if max(config.batch) > options.max_num_seqs:
        options = replace(options, max_num_seqs=max(config.batch))
    found = []
    with running(replace(config, engine=options), say) as (ready, driver):
        gpu = known_gpu(ready.model.device)
        floor = None if gpu is None else served_floor(ready, gpu)
        for context in config.context:
            for batch in config.batch:
                say(f"batch {batch}, context {context}")
                found.append(_latency(config, ready, driver, floor, batch, context))
    return found, ready.facts


def _latency(
    config: LatencyConfig, ready: Ready, driver: Driver, floor: ModelFloor | None, batch: int, context: int
) -> StepLatency:
    limits = ready.limits
    chunks = -(-batch * context // limits.max_num_batched_tokens)
    output = config.steps + 2 * chunks + 4  # the first sequences decode while the last are prefilled
    blocks = batch * -(-(context + output) // limits.block_size)
    if blocks > limits.num_blocks - limits.watermark_blocks or context + output > limits.max_sequence_tokens:
        raise UnsupportedError(
            f"{batch} sequences of {context + output} tokens take {blocks} KV blocks, the engine has "
            f"{limits.num_blocks} and sequences of {limits.max_sequence_tokens} tokens; give it more memory, or less "
            "to do"
        )
    items = [WorkItem((Segment(f"{context} {i}", context),), output) for i in range(batch)]
    samples = _check(driver.run(items, config.seed + batch), f"batch {batch} at context {context}")
    full = [b.at_s - a.at_s for a, b in zip(driver.steps, driver.steps[1:], strict=False) if _is_full(a, b, batch)]
    steps = full[-config.steps :]
    if len(steps) < 2:
        raise UnsupportedError(f"no two steps held all {batch} sequences; raise --max-num-batched-tokens")
    first = max(sample.token_s[0] for sample in samples)
    return StepLatency(
        batch,
        context,
        round(1e3 * statistics.median(steps), 4),
        round(1e3 * float(np.percentile(steps, 99)), 4),
        round(1e3 * first, 4),
        None if floor is None else round(floor.step_us(batch, context + output / 2) / 1e3, 4),
    )


def _is_full(a: StepTime, b: StepTime, batch: int) -> bool:
    return a.sequences == batch == b.sequences and b.tokens == batch


def latency_rows(config: LatencyConfig, found: list[StepLatency], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of record `engine-latency`; host time and idle share need a profile and are not known here."""
    shape = config.model if config.model in SHAPES else str(facts["model"]).rstrip("/").rpartition("/")[2]
    return [
        {
            "shape": shape,
            "scheme": facts["scheme"] if facts["scheme"] != "none" else "bf16",
            "kv": facts["kv"],
            "batch": row.batch,
            "context": row.context,
            "ms": row.ms,
            "sol_ms": row.sol_ms,
            "host_ms": None,
            "idle": None,
        }
        for row in found
    ]
