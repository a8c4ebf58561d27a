"""What the offline benchmarks print for people."""

from collections.abc import Sequence
from typing import Any

from .latency import StepLatency
from .offline_config import LatencyConfig, ThroughputConfig
from .tables import text_table
from .throughput import Point


def points_table(config: ThroughputConfig, points: Sequence[Point]) -> str:
    """One line a run."""
    facts = points[0].facts
    body = []
    for point in points:
        s = point.summary
        load = f"{point.rate:g}/s" if point.rate is not None else str(point.concurrency or "all")
        share = None if point.bound_tok_s is None else s.out_tok_s / point.bound_tok_s
        times = [None if spread is None else spread.p50 for spread in (s.ttft, s.tpot)]
        tail = None if s.tpot is None else s.tpot.p99
        rates = (s.out_tok_s, point.steady_tok_s, s.total_tok_s)
        body.append(
            [point.workload, load, point.batch, s.completed, *rates, *times, tail, share, sum(s.errors.values())]
        )
    titles = ["workload", "load", "batch", "requests", "out tok/s", "at full batch", "tok/s with prompts"]
    titles += ["TTFT p50 ms", "TPOT p50 ms", "TPOT p99 ms", "of bound", "errors"]
    return "\n".join([_headline(config.is_dummy, facts), "", text_table(titles, body)])


def latency_table(config: LatencyConfig, found: Sequence[StepLatency], facts: dict[str, Any]) -> str:
    """One line a batch and context."""
    body = []
    for r in found:
        share = None if r.sol_ms is None else r.sol_ms / r.ms
        body.append([str(r.batch), r.context, r.ms, r.ms_p99, r.sol_ms, share, r.batch / r.ms * 1e3, r.prefill_ms])
    titles = ("batch", "context", "step ms", "p99", "floor ms", "of floor", "tok/s", "prefill ms")
    return "\n".join([_headline(config.is_dummy, facts), "", text_table(titles, body)])


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of record `throughput`."""
    keys = ["experiment", "shape", "scheme", "kv", "memory_gb", "batch_mode", "batch", "out_tok_s", "tpot_target_ms"]
    keys += ["tpot_ms_p50", "ttft_ms_p50", "bound_tok_s"]
    return text_table(keys, [[row.get(key) for key in keys] for row in rows])


def _headline(is_dummy: bool, facts: dict[str, Any]) -> str:
    weights = ", random weights" if is_dummy else ""
    kernels = sorted(set(facts["kernels"].values()))
    return (
        f"{facts['model']}{weights}, scheme {facts['scheme']}, KV {facts['kv']} "
        f"({facts['kv_cache_tokens']:,} tokens), {facts['device']}, {facts['dtype']}, kernels: {', '.join(kernels)}"
    )
