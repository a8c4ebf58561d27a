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


TRACES = {
    "azure.csv": "arrival_s,context_tokens,generated_tokens\n0.0,37,4\n0.6,50,3\n1.8,20,5\n",
    "published.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:01:51.1000000,37,4\n"
    "2023-11-16 18:01:51.7000000,50,3\n2023-11-16 18:01:52.9000000,20,5\n",
    "arxiv.csv": "num_prefill_tokens,num_decode_tokens\n37,4\n50,3\n20,5\n",
    "sharegpt.jsonl": "".join(
        json.dumps({"id": str(i), "turns": [[p, o], [9, 9]]}) + "\n"
        for i, (p, o) in enumerate([(37, 4), (50, 3), (20, 5)])
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_asked_as_it_was_recorded(name: str, tmp_path: Path) -> None:
    """Lengths of each request, and its time where the trace has one, three times as fast; goodput by both limits."""
    (tmp_path / name).write_text(TRACES[name])
    has_times = name in ("azure.csv", "published.csv")
    with running(ScriptedRunner(pause_s=STEP_S)) as server:
        options: dict[str, Any] = {"trace_arrivals": True, "speed": 3.0} if has_times else {"max_concurrency": 1}
        workload = {"workload": f"trace:{tmp_path / name}", "num_requests": None, "warmup": 0}
        result = bench(server, **workload, **options, slo="ttft:5000,tpot:1000")
        strict = bench(server, **workload, **options, slo="ttft:5000,tpot:1", seed=1)
        server.wait_idle()
    assert [(s["prompt"], s["output"]) for s in result.samples] == [(37, 4), (50, 3), (20, 5)]
    if has_times:
        assert [s["due_s"] for s in result.samples] == pytest.approx([0.0, 0.2, 0.6])
        assert result.config["arrivals"] == "the trace's arrivals at 3 times its speed"
    assert result.summary.goodput_s == pytest.approx(result.summary.request_s)
    assert strict.summary.goodput_s == 0.0 and strict.summary.completed == 3


def test_turns_of_a_conversation_find_the_turn_before(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "a", "turns": [[64, 8], [32, 8], [16, 8]]}) + "\n")
    with running(ScriptedRunner()) as server:
        options = {"workload": f"turns:{tmp_path / 't.jsonl'}", "num_requests": None, "max_concurrency": 1, "warmup": 0}
        result = bench(server, **options)
    assert [s["prompt"] for s in result.samples] == [64, 64 + 8 + 32, 64 + 8 + 32 + 8 + 16]
    assert result.summary.cached_tokens is not None and result.summary.cached_tokens >= 64 - 16 + 96


def test_bursts() -> None:
    """Gamma gaps through the command's own option; a limit of clients makes some wait, and their wait counts."""
    with running(ScriptedRunner(pause_s=STEP_S)) as server:
        result = bench(server, request_rate=40.0, burstiness=0.3, max_concurrency=2, workload="16/6")
        server.wait_idle()
    found = result.summary
    assert found.completed == 16 and found.peak_concurrency <= 2 and "0.3" in result.config["arrivals"]
    assert found.ttft is not None and found.ttft.max > 4 * STEP_S * 1e3, "those that queued in the client say so"


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
