"""The engine in process: what is asked for comes out, limits hold, and rates are of what happened."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from atom.errors import UnsupportedError
from atom.kernels.bounds import GPUS
from atom.serving.bench.drive import StepTime
from atom.serving.bench.engine_run import running
from atom.serving.bench.floor import Mix, model_floor
from atom.serving.bench.latency import bench_latency, latency_rows
from atom.serving.bench.lengths import parse_workload
from atom.serving.bench.offline_config import LatencyConfig, ThroughputConfig
from atom.serving.bench.offline_tables import latency_table, points_table
from atom.serving.bench.prompts import Vocabulary
from atom.serving.bench.throughput import bench_throughput, steady_rate, window_of_prompts
from atom.serving.bench.workload import Segment, WorkItem
from atom.serving.engine_config import EngineConfig
from atom.serving.errors import InvalidRequestError

ENGINE = EngineConfig(load_format="dummy", scheme="w4a8", kv_cache_bytes="8MiB", max_num_seqs=8)
QUIET = lambda text: None  # noqa: E731


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[object, object]]:
    with running(ThroughputConfig("tiny", engine=ENGINE), QUIET) as (ready, driver):
        yield ready, driver


def test_throughput_of_closed_loops_and_of_all_at_once(tmp_path: Path) -> None:
    points = tmp_path / "points.jsonl"
    config = ThroughputConfig(
        "tiny", engine=ENGINE, workload=("20/6",), num_requests=12, concurrency=(3, 0), points=points
    )
    three, everything = bench_throughput(config)
    for point in (three, everything):
        assert point.summary.completed == 12 and not point.summary.errors
        assert point.summary.output_tokens == 12 * 6 and point.summary.prompt_tokens == 12 * 20
        assert not point.summary.cached_tokens, "a run that the prefix cache knows is no measurement"
        assert (point.input, point.output, point.too_long) == (20, 6, 0)
        assert point.facts["kv"] == "int4" and point.bound_tok_s is None, "no bound on a CPU"
    assert three.batch == 3 and three.summary.peak_concurrency == 3
    assert everything.batch == 8, "the engine's own limit"
    written = [json.loads(line) for line in points.read_text().splitlines()]
    assert [entry["concurrency"] for entry in written] == [3, 0]
    assert written[0]["scheme"] == "w4a8" and written[0]["engine"]["model"] == "tiny"
    text = points_table(config, [three, everything])
    assert "random weights" in text and "kernels: reference" in text and "all" in text


def test_a_window_that_prompts_fill_is_no_steady_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atom.serving.bench.throughput.full_window", lambda steps: (0.0, 0.1))
    points = tmp_path / "points.jsonl"
    config = ThroughputConfig("tiny", engine=ENGINE, workload=("steady:20/6",), window_s=0.3, points=points)
    assert bench_throughput(config) == []
    (entry,) = (json.loads(line) for line in points.read_text().splitlines())
    assert "prompts took the rest" in entry["skipped"] and entry["asked_workload"] == "steady:20/6"


def test_more_than_the_cache_holds_is_run_once(tmp_path: Path) -> None:
    """Sequences of 40 tokens on average, in a cache for 192: the first count beyond it shows what memory allows."""
    points = tmp_path / "points.jsonl"
    small = replace(ENGINE, kv_cache_bytes="192Ki", scheme="bf16")
    config = ThroughputConfig("tiny", engine=small, workload=("30/20",), num_requests=6, points=points)
    found = bench_throughput(replace(config, concurrency=(1, 5, 6, 7)))
    entries = [json.loads(line) for line in points.read_text().splitlines()]
    ran = [entry["concurrency"] for entry in entries if "skipped" not in entry]
    holds = found[0].facts["kv_cache_tokens"] / 40
    assert 1 <= holds < 5 and ran == [1, 5] and [p.concurrency for p in found] == [1, 5]
    assert [entry["is_memory_bound"] for entry in entries[:2]] == [False, True]
    assert found[1].batch <= holds + 1 and found[1].summary.completed == 6
    assert "the cache holds" in entries[2]["skipped"] and entries[3]["concurrency"] == 7


def test_a_steady_state_has_as_many_as_the_cache_holds() -> None:
    """Requests of 30 to 50 tokens: while new ones are short more of them would fit, for a while."""
    small = replace(ENGINE, kv_cache_bytes="192Ki", scheme="bf16")
    config = ThroughputConfig("tiny", engine=small, workload=("steady:30/20",), window_s=0.3)
    (point,) = bench_throughput(replace(config, concurrency=(7,)))
    assert point.batch <= int(point.facts["kv_cache_tokens"] / 40) == point.concurrency < 7


def test_rates_and_lengths_that_do_not_fit() -> None:
    config = ThroughputConfig(
        "tiny", engine=replace(ENGINE, max_model_len=64), workload=("uniform:40-80/4-4",), rate=(200.0,)
    )
    (point,) = bench_throughput(replace(config, num_requests=30))
    assert point.rate == 200.0 and point.too_long > 0 and point.requests + point.too_long == 30
    assert point.summary.completed == point.requests
    with pytest.raises(ValueError, match=r"no request of 64/1 fits the engine's 64 tokens"):
        bench_throughput(replace(config, workload=("64/1",), rate=(), num_requests=3))


def test_a_window_of_a_full_batch(tmp_path: Path) -> None:
    """Two workloads on one engine, each cut after half a second at its full batch."""
    points = tmp_path / "points.jsonl"
    config = ThroughputConfig(
        "tiny",
        engine=ENGINE,
        workload=("steady:20/400", "steady:9/90"),
        concurrency=(3, 0),
        window_s=0.5,
        points=points,
    )
    found = bench_throughput(config)
    assert [(p.workload, p.concurrency, p.batch) for p in found] == [
        ("20/400", 3, 3), ("20/400", 0, 8), ("9/90", 3, 3), ("9/90", 0, 8)
    ]  # fmt: skip
    for point in found:
        assert not point.summary.errors and 0.5 <= point.summary.duration_s < 5
        assert point.steady_tok_s == pytest.approx(point.summary.out_tok_s, rel=0.02)
        assert point.summary.tpot is not None and point.requests < 512
    assert (found[0].input, found[0].output) == (20, 400), "of the workload, not of what was under way"
    entries = [json.loads(line) for line in points.read_text().splitlines()]
    assert [entry["asked_workload"] for entry in entries] == ["steady:20/400"] * 2 + ["steady:9/90"] * 2
    with pytest.raises(ValueError, match="is a closed loop"):
        replace(config, rate=(3.0,))


def test_driver_keeps_due_times_and_refuses_bad_requests(engine: tuple[object, object]) -> None:
    _, driver = engine
    items = parse_workload("8/3").items(4, 0)
    samples = driver.run(items, due_s=[0.0, 0.05, 0.1, 0.15])  # type: ignore[attr-defined]
    assert [s.due_s for s in samples] == [0.0, 0.05, 0.1, 0.15]
    assert all(s.sent_s >= s.due_s and s.token_s[0] > s.sent_s and s.finish_reason == "length" for s in samples)
    assert all(s.output_tokens == 3 and len(s.token_s) == 3 for s in samples)
    assert all(s.token_s == sorted(s.token_s) and s.token_s[-1] == s.end_s < 30 for s in samples)
    assert {t for s in samples for t in s.token_s} == {step.at_s for step in driver.steps}  # type: ignore[attr-defined]
    assert sum(step.tokens for step in driver.steps) == 12  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match="max_tokens must be at most"):
        driver.run([WorkItem((Segment("a", 4),), 10**6)])  # type: ignore[attr-defined]
    assert len(driver.run(items)) == 4, "and goes on"  # type: ignore[attr-defined]


def test_latency_of_static_batches() -> None:
    config = LatencyConfig("tiny", engine=ENGINE, batch=(1, 4), context=(24,), steps=6)
    found, facts = bench_latency(config)
    assert [(r.batch, r.context) for r in found] == [(1, 24), (4, 24)]
    assert all(0 < r.ms <= r.ms_p99 and r.prefill_ms > 0 and r.sol_ms is None for r in found)
    rows = latency_rows(config, found, facts)
    assert rows[0]["shape"] == "tiny" and rows[0]["scheme"] == "w4a8" and rows[0]["kv"] == "int4"
    assert "step ms" in latency_table(config, found, facts)
    with pytest.raises(UnsupportedError, match=r"take \d+ KV blocks, the engine has"):
        bench_latency(replace(config, batch=(64,), context=(1900,)))


def test_memory_budget_on_a_cpu() -> None:
    """Packed weights come off first; what is left is the cache."""
    fits = ThroughputConfig("tiny", memory_gb=0.01, engine=replace(ENGINE, kv_cache_bytes=None))
    with running(fits, QUIET) as (ready, _):
        cache = ready.facts["kv_cache_bytes"]
    assert 0.2 * 0.01 * 2**30 < cache < 0.01 * 2**30
    with pytest.raises(ValueError, match="the weights alone take"):
        bench_throughput(replace(fits, memory_gb=0.0001))
    with pytest.raises(ValueError, match="drop --kv-cache-bytes"):
        ThroughputConfig("tiny", memory_gb=1.0, engine=ENGINE)


def test_rate_at_full_batch() -> None:
    """Ten steps a second: 4 sequences for 3 s, after a start and before an end of 1 each."""
    counts = [1] * 5 + [4] * 30 + [1] * 15
    steps = [StepTime(0.1 * i, n, n) for i, n in enumerate(counts, 1)]
    assert steady_rate(steps) == pytest.approx(40.0)
    assert steady_rate([*steps[:5], StepTime(0.6, 4, 4), *steps[35:]]) is None, "one step is no steady state"
    assert steady_rate([]) is None


def test_options() -> None:
    assert ThroughputConfig("llama-3-8b").engine_options.load_format == "dummy"
    assert not ThroughputConfig("some/dir").is_dummy
    assert [ThroughputConfig("tiny").requests_at("8/3", c) for c in (0, 8, 100)] == [512, 64, 400]
    assert ThroughputConfig("tiny").requests_at("trace:x", 0) is None
    with pytest.raises(ValueError, match="above 0, got -1"):
        ThroughputConfig("tiny", memory_gb=-1)
    with pytest.raises(ValueError, match="unknown scheme 'w5a5'"):
        ThroughputConfig("tiny", engine=EngineConfig(load_format="dummy", scheme="w5a5"))
    with pytest.raises(ValueError, match="are at least 1"):
        LatencyConfig("tiny", batch=(0,))


def test_prompts_are_of_the_model_s_vocabulary(engine: tuple[object, object]) -> None:
    ready, _ = engine
    assert Vocabulary.of_range(0, ready.limits.vocab_size).ids.max() < 258  # type: ignore[attr-defined]


def test_a_window_holds_many_prompts_where_they_take_time() -> None:
    def window(shape: str, lengths: str, batch: int) -> float:
        floor = model_floor(shape, "w4a8", GPUS["h200"])
        return window_of_prompts(4.0, floor, Mix.of(parse_workload(lengths).items(64, 0)), batch)

    assert 12 < window("llama-3-8b", "20000/2000", 150) < 20, "one and a half requests a second"
    assert window("llama-3-8b", "1000/1000", 512) == 4.0 and window("llama-2-7b", "paper", 8) == 4.0


def test_a_window_ends_while_the_queue_is_full() -> None:
    """More prompts than may wait: what has not been let in by the end of the window stays out."""
    small = replace(ENGINE, max_waiting_tokens=600)
    config = ThroughputConfig("tiny", engine=small, workload=("steady:100/400",), window_s=0.5)
    (point,) = bench_throughput(config)
    assert point.batch == 8 and not point.summary.errors and point.seconds < 60
