"""A profile's shares become a row of its record, and several files one record."""

import argparse

from atom.records import check_rows
from benchmarks.bench_engine import Timed
from benchmarks.profile_steps import busy_times, kinds, part_of, row_of
from benchmarks.timeline import Span


def test_rows() -> None:
    spans = [Span("gemm_sm90", 0, 4), Span("paged_decode", 4, 3), Span("greedy_sm90", 8, 1), Span("mystery", 9, 1)]
    times, idle = busy_times(spans)
    assert idle == 1 and sum(times.values()) == 9
    shares = {part_of(name): us / 10 for name, us in times.items()} | {"nothing runs": idle / 10}
    steps = [Timed(8, 8, 0.0, 1.0), Timed(8, 8, 1.0, 1.002, 0.001), Timed(8, 40, 1.0, 1.012, 0.004)]
    found = {"shares": shares, "steps": kinds(steps), "out_tok_s": 1000.0}
    args = argparse.Namespace(model="llama-3-8b", scheme="w4a8", workload="512/256", memory_gb=None, batch=8)
    row = row_of(args, found)
    check_rows("profile", [row])
    assert row["gemm"] == 0.4 and row["decode_attention"] == 0.3 and row["idle"] == row["other"] == 0.1
    assert row["prefill_attention"] == 0.0 and row["kv"] == "int4" and row["memory_gb"] == 0
    assert row["decode_ms"] == 2.0 and row["mixed_ms"] == 10.0 and row["mixed_tokens"] == 40
    assert row["mixed_time"] == 0.8333
