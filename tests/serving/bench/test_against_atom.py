"""The load generator against Atom's own server: what clients measured must agree with what the server's metrics say."""

import json
from pathlib import Path
from typing import Any

import pytest

from atom.serving.bench.config import ServeBenchConfig
from atom.serving.bench.result import ServeResult
from atom.serving.bench.serve import bench_serve

from ..scripted import Running, ScriptedRunner, running

STEP_S = 0.02


def bench(server: Running, **options: Any) -> ServeResult:
    chosen: dict[str, Any] = {"workload": "40/10", "num_requests": 16, "token_ids": "5:200", "model": "tiny"} | options
    return bench_serve(ServeBenchConfig(url=server.url, **chosen))


def check_agreement(result: ServeResult) -> None:
    """Means within what HTTP and a busy machine take; the client never sees less than the server."""
    found, server = result.summary, result.server["latencies"]
    assert found.ttft is not None and found.tpot is not None and found.e2e is not None
    for measure, spread in (("ttft", found.ttft), ("e2e", found.e2e)):
        assert server[measure]["count"] == found.completed, "the warm-up is not in it"
        assert -1 < spread.mean - server[measure]["mean_ms"] < 60, measure
    assert found.tpot.mean == pytest.approx(server["tpot"]["mean_ms"], abs=0.15 * found.tpot.mean)
    assert found.tpot.min > 0.9 * STEP_S * 1e3, "a token takes a step"
    tokens = [value for name, value in result.server["metrics"].items() if name.startswith("atom:generation_tokens")]
    assert tokens == [found.output_tokens] and found.counted_by == "usage"


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_closed_loop(endpoint: str, tmp_path: Path) -> None:
    with running(ScriptedRunner(pause_s=STEP_S)) as server:
        options: dict[str, Any] = {"max_concurrency": 4}
        if endpoint == "chat":
            options |= {"endpoint": "chat", "token_ids": None, "tokenizer": str(save_tokenizer(tmp_path))}
        result = bench(server, **options)
        server.wait_idle()
    found = result.summary
    assert found.completed == 16 and not found.errors and found.short == 0 and found.peak_concurrency == 4
    assert found.output_tokens == 160
    if endpoint == "completions":
        assert found.prompt_tokens == 640, "exactly as asked; a chat's template adds its own"
    check_agreement(result)


def save_tokenizer(folder: Path) -> Path:
    from ..scripted import HF

    HF.save_pretrained(folder)
    return folder


def test_poisson() -> None:
    with running(ScriptedRunner(pause_s=STEP_S)) as server:
        result = bench(server, request_rate=20.0)
        server.wait_idle()
    assert result.summary.completed == 16 and result.config["arrivals"] == "Poisson arrivals, 20 requests/s"
    check_agreement(result)


def test_shared_prefixes_of_a_trace_hit_the_cache(tmp_path: Path) -> None:
    """Two of Mooncake's blocks in common: all but the first request find them."""
    rows = [{"timestamp": 200 * i, "input_length": 600, "output_length": 2, "hash_ids": [0, 10 + i]} for i in range(5)]
    trace = tmp_path / "conversation.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with running(ScriptedRunner()) as server:
        options = {"workload": f"trace:{trace}", "num_requests": None, "trace_arrivals": True, "warmup": 0}
        result = bench(server, **options)
    assert result.summary.completed == 5 and result.summary.prompt_tokens == 3000
    assert result.summary.cached_tokens == 4 * 512 and not result.notes
    assert result.config["arrivals"] == "the trace's arrivals at 1 times its speed"


def test_a_full_queue_is_an_error_by_its_status() -> None:
    with running(ScriptedRunner(pause_s=STEP_S), max_num_seqs=1, max_waiting_requests=2) as server:
        result = bench(server, max_concurrency=12, num_requests=12, warmup=0)
        server.wait_idle()
    assert result.summary.errors.get("http 429", 0) >= 6
    assert result.summary.completed + result.summary.errors["http 429"] == 12


def test_stopping_leaves_the_server_idle() -> None:
    """A request that runs into its timeout is dropped by the client, and the server frees what it held."""
    with running(ScriptedRunner(pause_s=STEP_S)) as server:
        result = bench(server, workload="40/500", num_requests=3, max_concurrency=3, timeout=0.5, warmup=0)
        server.wait_idle()
    assert result.summary.errors == {"timeout": 3} and result.summary.output_tokens == 0
