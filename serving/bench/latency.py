"""`atom bench latency`: decode steps of a batch that does not change, in process."""

import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from atom.errors import UnsupportedError
from atom.models.dummy import SHAPES

from ..startup import Ready
from .drive import Driver
from .engine_run import Say, check_samples, known_gpu, running, served_floor
from .floor import ModelFloor
from .offline_config import LatencyConfig
from .window import StepTime
from .workload import Segment, WorkItem


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
    if blocks > limits.num_blocks - limits.reserve_blocks(batch - 1) or context + output > limits.max_sequence_tokens:
        raise UnsupportedError(
            f"{batch} sequences of {context + output} tokens take {blocks} KV blocks, the engine has "
            f"{limits.num_blocks} and sequences of {limits.max_sequence_tokens} tokens; give it more memory, or less "
            "to do"
        )
    items = [WorkItem((Segment(f"{context} {i}", context),), output) for i in range(batch)]
    samples = check_samples(driver.run(items, config.seed + batch), f"batch {batch} at context {context}")
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
    """Rows of record `latency`."""
    shape = config.model if config.model in SHAPES else str(facts["model"]).rstrip("/").rpartition("/")[2]
    return [
        {
            "shape": shape,
            "scheme": facts["scheme"] if facts["scheme"] != "none" else "bf16",
            "kv": facts["kv"],
            "batch": row.batch,
            "context": row.context,
            "ms": row.ms,
            "ms_p99": row.ms_p99,
            "prefill_ms": row.prefill_ms,
            "sol_ms": row.sol_ms,
        }
        for row in found
    ]
