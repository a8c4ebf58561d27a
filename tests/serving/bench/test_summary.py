"""Definitions by hand: TTFT, TPOT, percentiles, rates, goodput; what a chunk says; what a server says of itself."""

import json
from typing import Any

import numpy as np
import pytest

from atom.serving.bench.answer import MalformedAnswerError, ServerSaidError, read_event
from atom.serving.bench.sample import Sample
from atom.serving.bench.server_facts import metric_changes, parse_metrics, server_latencies
from atom.serving.bench.slo import Slo
from atom.serving.bench.summary import Spread, summarize
from atom.serving.bench.target import Target, normalize_url


def sample(index: int, due: float, tokens: list[float], end: float | None = None, **more: Any) -> Sample:
    made = Sample(index, 10, len(tokens), due, due, due + 0.001, tokens, tokens[-1] if end is None else end)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_times_of_a_request() -> None:
    one = sample(0, due=1.0, tokens=[1.5, 1.6, 1.9], end=2.0, output_tokens=5)
    assert one.ttft_s == pytest.approx(0.5) and one.e2e_s == pytest.approx(1.0)
    assert one.tpot_s == pytest.approx(0.4 / 4), "five tokens in three chunks: four gaps"
    assert one.itl_s == pytest.approx([0.1, 0.3])
    assert one.send_lag_s == pytest.approx(0.001)
    assert sample(0, 0, [1.0]).tpot_s is None
    none = Sample(0, 1, 1, 0.0)
    assert none.ttft_s is None and none.tokens == 0


def test_spread_is_numpy_s() -> None:
    values = np.random.default_rng(0).random(101)
    found = Spread.of_seconds(values.tolist())
    assert found is not None and found.count == 101
    assert found.p99 == pytest.approx(np.percentile(values, 99) * 1000)
    assert (found.mean, found.min, found.max) == pytest.approx(
        (values.mean() * 1000, values.min() * 1000, values.max() * 1000)
    )
    assert Spread.of_seconds([]) is None


def test_rates_by_hand() -> None:
    """Two answers of 3 and 2 tokens, one error, within 4 seconds."""
    samples = [
        sample(0, 0.0, [1.0, 1.1, 1.2], output_tokens=3, prompt_tokens=12, cached_tokens=8),
        sample(1, 0.5, [2.0, 2.4], output_tokens=2, prompt_tokens=10, cached_tokens=0, asked_output=4),
        sample(2, 1.0, [3.0], end=4.0, error="http 503"),
    ]
    found = summarize(samples, Slo.parse("ttft:1200,tpot:200"))
    assert found.duration_s == 4.0 and (found.requests, found.completed) == (3, 2)
    assert (found.output_tokens, found.prompt_tokens, found.cached_tokens) == (5, 22, 8)
    assert found.out_tok_s == 5 / 4 and found.total_tok_s == 27 / 4 and found.request_s == 0.5
    assert found.errors == {"http 503": 1} and found.short == 1
    assert found.good_requests == 1 and found.goodput_s == 0.25, "the second one's TTFT is 1500 ms"
    assert found.concurrency == pytest.approx((1.2 + 1.9 + 3.0 - 0.003) / 4)
    assert found.peak_concurrency == 3
    assert found.ttft is not None and found.ttft.count == 2, "errors have no part in latencies"
    assert json.dumps(found.to_dict())
    with pytest.raises(ValueError, match="no request was sent"):
        summarize([])


def test_rate_under_full_load_leaves_out_the_ends() -> None:
    """Two at a time, ten tokens a second each; the last one runs alone, which the steady rate must not count."""
    samples = [sample(i, 1.0 * (i // 2), [i // 2 + 0.1 * j for j in range(1, 11)]) for i in range(10)]
    samples.append(sample(10, 5.0, [5.0 + 0.1 * j for j in range(1, 51)]))
    found = summarize(samples)
    assert found.peak_concurrency == 2
    assert found.steady_out_tok_s == pytest.approx(20, rel=0.05)
    assert found.out_tok_s == pytest.approx(150 / 10)
    assert found.counted_by == "deltas"


def test_slo() -> None:
    slow = sample(0, 0.0, [0.3, 0.9])
    assert Slo.parse("ttft:300.001").is_met(slow) and not Slo.parse("ttft:299").is_met(slow)
    assert not Slo.parse("ttft:400,tpot:599").is_met(slow) and Slo.parse("tpot:601,e2e:901").is_met(slow)
    assert not Slo.parse("ttft:400").is_met(sample(0, 0.0, [0.1], error="timeout"))
    assert Slo.parse("tpot:1").is_met(sample(0, 0.0, [0.1])), "one token has no TPOT to violate"
    assert str(Slo.parse("ttft:400, tpot:5.5")) == "ttft:400,tpot:5.5"
    for text, message in (("ttft", "write MEASURE:MILL"), ("p99:5", "measures are ttft, tpot"), ("tpot:-1", "write")):
        with pytest.raises(ValueError, match=message):
            Slo.parse(text)
    with pytest.raises(ValueError, match="names tpot twice"):
        Slo.parse("tpot:1,tpot:2")


def chat(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish}]}


@pytest.mark.parametrize(
    ("chunk", "count"),
    [
        (text("a"), 1),
        (text(""), 1),  # a token that ends within a character
        (text("", "length"), 0),
        (text("a", "length"), 1),
        (chat(role="assistant", content=""), 0),
        (chat(content="a"), 1),
        (chat(reasoning_content="a"), 1),
        (chat(tool_calls=[{"index": 0}]), 1),
        (chat(), 0),
        ({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}, 0),
    ],
)
def test_which_chunks_carry_tokens(chunk: dict[str, Any], count: int) -> None:
    found = Sample(0, 1, 1, 0.0)
    assert not read_event(json.dumps(chunk).encode(), found, 2.5)
    assert found.token_s == [2.5] * count
    assert found.output_tokens == (3 if "usage" in chunk else None)


def test_usage_finish_and_the_end() -> None:
    found = Sample(0, 1, 1, 0.0)
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    read_event(json.dumps({**text("a", "stop"), "usage": usage}).encode(), found, 1.0)
    assert (found.finish_reason, found.prompt_tokens, found.cached_tokens) == ("stop", 9, 4)
    assert read_event(b"[DONE]", found, 1.0)
    with pytest.raises(ServerSaidError, match="boom"):
        read_event(b'{"error": {"message": "boom"}}', found, 1.0)
    with pytest.raises(MalformedAnswerError, match="unknown shape"):
        read_event(b'{"choices": [3]}', found, 1.0)


def test_bodies() -> None:
    body = json.loads(Target("http://x", "m", "chat", 0.5, False, extra_body={"top_k": 3}).body("hi", 7))
    assert body["messages"] == [{"role": "user", "content": "hi"}] and body["max_completion_tokens"] == 7
    assert body["top_k"] == 3 and "ignore_eos" not in body and body["temperature"] == 0.5


def test_urls() -> None:
    assert normalize_url("localhost:8000") == "http://localhost:8000"
    assert normalize_url("https://a.b/v1/") == "https://a.b"
    for url in ("ftp://x", "http://", "http://x/?a=b"):
        with pytest.raises(ValueError, match="--url must be the server's address"):
            normalize_url(url)


PAGE = """# HELP vllm:time_to_first_token_seconds x
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="a, \\"b\\""} {b1}
vllm:time_to_first_token_seconds_bucket{le="0.2",model_name="a, \\"b\\""} {b2}
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="a, \\"b\\""} {b3}
vllm:time_to_first_token_seconds_sum{model_name="a, \\"b\\""} {sum}
vllm:time_to_first_token_seconds_count{model_name="a, \\"b\\""} {b3}
vllm:num_requests_running 3.0
vllm:prompt_tokens_total {sum} 1700000000
broken line here of no kind
"""


def page(**values: float) -> dict[str, float]:
    found = PAGE
    for name, value in values.items():
        found = found.replace("{" + name + "}", str(value))
    return parse_metrics(found)


def test_the_server_s_histograms() -> None:
    before, after = page(b1=10, b2=10, b3=10, sum=0.5), page(b1=10, b2=30, b3=30, sum=3.5)
    found = server_latencies(before, after)
    assert found == {"ttft": {"count": 20, "mean_ms": 150, "p50_ms": 150, "p99_ms": 199}}
    assert server_latencies(after, after) == {}
    changes = metric_changes(before, after)
    assert changes["vllm:prompt_tokens_total{}"] == 3.0 and "vllm:num_requests_running{}" not in changes
