"""`atom bench throughput`: the engine in process, on real or on random weights."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from atom.errors import AtomError
from atom.kernels.bounds import GPUS

from ..startup import Ready
from .arrivals import Arrivals
from .drive import Driver
from .engine_run import Say, known_gpu, running, served_floor
from .floor import Mix, ModelFloor
from .lengths import parse_workload
from .offline_config import ThroughputConfig
from .summary import Summary, summarize
from .window import STEADY, StepTime, full_window, mid_life, within
from .workload import drop_long, mean_context

WINDOW_PROMPTS = 24  # that a window sees at least, where they take
PROMPTS_SHARE = 0.05  # of the time or more
LEAST_WINDOW = 0.5  # share of a window that steps of a full batch have to span
FRESH_TOKENS = 4_000_000  # of the requests that follow in a windowed run: more than the fastest GPU gets to


@dataclass(frozen=True)
class Point:
    """One run: how many were under way (0: all at once) or came a second, and what came of it.

    batch        most sequences that one step decoded
    steady_tok_s output tokens a second between the first and the last step of at least nine tenths of that batch; None
                 where those span less than a fifth of the run; of a steady: workload all is of its window
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


def bench_throughput(
    config: ThroughputConfig, say: Say = lambda text: None, found: Callable[[Point], None] = lambda point: None
) -> list[Point]:
    """One point for each workload and concurrency (or rate), in order; `found` is called with each as it is done.

    Of the concurrencies that the cache cannot hold on average the smallest is run (there memory decides; a steady:
    workload then has as many as it holds on average), and larger ones are left out: the file of points then has an
    entry `skipped` for each.
    """
    points = []
    with running(config, say) as (ready, driver):
        gpu = known_gpu(ready.model.device)
        floor = served_floor(ready, gpu or GPUS["h200"])
        runs: list[tuple[int, float | None]] = (
            [(0, rate) for rate in config.rate] if config.rate else [(c, None) for c in config.concurrency]
        )
        number = 0
        for asked in config.workload:
            held = cache_holds(config, ready, asked.removeprefix(STEADY))
            beyond = min((c for c, _ in runs if c > held), default=0)
            for concurrency, rate in runs:
                keys = {"asked_workload": asked, "concurrency": concurrency, "rate": rate}
                if beyond and concurrency > beyond:
                    why = f"the cache holds {held:.0f} requests on average: {beyond} show what {concurrency} would"
                    say(f"skipped: {why}")
                    _keep(config, keys | {"skipped": why})
                    continue
                number += 1
                try:
                    point = _point(config, ready, driver, floor, asked, number, concurrency, rate, say)
                except NotSteadyError as error:
                    say(f"skipped: {error}")
                    _keep(config, keys | {"skipped": str(error)})
                    continue
                if gpu is None:
                    point = replace(point, bound_tok_s=None)
                points.append(point)
                found(point)
                _keep(config, point.to_dict() | keys | {"is_memory_bound": concurrency > held})
    return points


class NotSteadyError(AtomError):
    """A window in which too few steps had a full batch."""


def _keep(config: ThroughputConfig, entry: dict[str, Any]) -> None:
    if config.points is not None:
        with config.points.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def cache_holds(config: ThroughputConfig, ready: Ready, workload: str) -> float:
    """Requests of the workload that the KV cache holds at once, each of its mean length over its life."""
    items = parse_workload(workload).items(config.requests_at(workload, 0), config.seed)
    items, _ = drop_long(items, ready.limits.max_sequence_tokens)
    return ready.limits.cache_tokens / mean_context(items) if items else 0.0


def _point(
    config: ThroughputConfig,
    ready: Ready,
    driver: Driver,
    floor: ModelFloor,
    asked: str,
    number: int,
    concurrency: int,
    rate: float | None,
    say: Say,
) -> Point:
    workload = parse_workload(asked.removeprefix(STEADY))
    window_s = config.window_s if asked.startswith(STEADY) else None
    wanted = config.requests_at(asked.removeprefix(STEADY), concurrency)
    items, too_long = drop_long(workload.items(wanted, config.seed), ready.limits.max_sequence_tokens)
    if not items:
        raise ValueError(
            f"no request of {workload.name} fits the engine's {ready.limits.max_sequence_tokens} tokens; give it more "
            "memory, or shorter requests"
        )
    mix = Mix.of(items)
    if window_s is not None:
        held = max(1, int(ready.limits.cache_tokens / mix.context))
        under_way = min(concurrency or ready.limits.max_num_seqs, held)
        # more would fit for as long as new ones are short, which is no steady state
        concurrency = min(concurrency, held)
        window_s = window_of_prompts(window_s, floor, mix, under_way)
        fresh = items[: max(64, int(FRESH_TOKENS * len(items) / sum(item.total_tokens for item in items)))]
        items = mid_life(items, under_way, config.seed) + fresh
    due = None if rate is None else Arrivals(rate).times(items, config.seed)
    what = f"{rate:g} requests/s" if rate is not None else f"{concurrency or 'all'} at once"

    def show(done: int, total: int, tokens: int) -> None:
        say(f"{workload.name}, {what}: {done} of {total} requests, about {tokens:,} tokens")

    started = time.perf_counter()
    seed = config.seed + number  # other prompts for each run, or the prefix cache would know them from the last
    samples = driver.run(items, seed, concurrency or None, due, show, window_s)
    batch = max((step.sequences for step in driver.steps), default=0)
    steady = steady_rate(driver.steps, 0.2 if window_s is None else 0.0)
    if window_s is not None and (window := full_window(driver.steps)) is not None:
        if (full_s := window[1] - window[0]) < LEAST_WINDOW * window_s:
            raise NotSteadyError(
                f"{workload.name}, {what}: nine tenths of the requests decoded together for {full_s:.1f} s of "
                f"{window_s:.1f}, prompts took the rest; measure whole requests, without {STEADY}"
            )
        samples = within(samples, *window)
    summary = summarize(samples)
    return Point(
        concurrency,
        rate,
        workload.name,
        len(samples),
        too_long,
        batch,
        round(float(mix.prompts.mean()), 1),
        round(mix.outputs / len(mix.prompts), 1),
        summary,
        steady,
        round(floor.bound(mix, max(1, batch)).out_tok_s, 1),
        floor.weight_bytes,
        ready.facts,
        config.memory_gb,
        time.perf_counter() - started,
    )


def window_of_prompts(window_s: float, floor: ModelFloor, mix: Mix, batch: int) -> float:
    """window_s, or as long as it takes at best until WINDOW_PROMPTS prompts have come, where prompts take time.

    Five seconds of 20000/2000 hold five prompts or six, and which of both decides the rate.
    """
    bound = floor.bound(mix, batch)
    if bound.step_ms > (1 - PROMPTS_SHARE) * bound.tpot_ms:
        return window_s
    return max(window_s, WINDOW_PROMPTS * mix.outputs / len(mix.prompts) / bound.out_tok_s)


def steady_rate(steps: Sequence[StepTime], least: float = 0.2) -> float | None:
    """See `Point.steady_tok_s`; `least` is the share of the run that has to be steady."""
    window = full_window(steps)
    if window is None or window[1] - window[0] < least * steps[-1].at_s:
        return None
    start, end = window
    return round(sum(step.tokens for step in steps if start < step.at_s <= end) / (end - start), 1)
