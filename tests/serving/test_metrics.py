"""/metrics, read as Prometheus reads it."""

from prometheus_client.parser import text_string_to_metric_families

from .scripted import Running, ScriptedRunner, running


def samples(server: Running) -> dict[tuple[str, str], float]:
    """Values by name and the label that matters, if there is one."""
    text = server.http.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels.get("model_name", "tiny") == "tiny"
            found[sample.name, ",".join(labels.values())] = sample.value
    return found


def test_counts_are_those_of_what_was_served() -> None:
    with running(ScriptedRunner(lambda request, index: "Hello there.", pause_s=0.002)) as server:
        before = samples(server)
        assert before["atom:request_success_total", "stop"] == 0 and before["atom:kv_cache_blocks", ""] == 256
        whole = server.post("/v1/completions", prompt="hello", n=2, max_tokens=50).json()["usage"]
        server.post("/v1/completions", prompt="hello", max_tokens=3)
        server.post("/v1/completions", prompt="hello", max_tokens=-1)
        server.runner.faults.append("injected")
        server.post("/v1/completions", prompt="hello")
        server.wait_idle()
        after = samples(server)
        made = whole["completion_tokens"] + 3
        assert after["atom:generation_tokens_total", ""] == made
        assert after["atom:prompt_tokens_total", ""] == 4 * whole["prompt_tokens"]
        assert after["atom:request_success_total", "stop"] == 2 and after["atom:request_success_total", "length"] == 1
        assert after["atom:request_success_total", "error"] == after["atom:engine_step_failures_total", ""] == 1
        assert after["atom:time_to_first_token_seconds_count", ""] == 3
        assert after["atom:inter_token_latency_seconds_count", ""] == made - 3
        assert after["atom:inter_token_latency_seconds_sum", ""] >= 0.002 * (made / 2 - 3)
        assert after["atom:e2e_request_latency_seconds_count", ""] == 4
        assert after["atom:request_generation_tokens_sum", ""] == made
        assert after["atom:num_requests_running", ""] == after["atom:kv_cache_usage_perc", ""] == 0
        assert after["atom:http_requests_total", "/v1/completions,200"] == 2
        assert after["atom:http_requests_total", "/v1/completions,400"] == 1


def test_load_is_seen_while_it_lasts() -> None:
    with running(
        ScriptedRunner(lambda request, index: "word " * 100), max_num_seqs=1, max_num_batched_tokens=64
    ) as server:
        server.runner.gate.clear()
        with (
            server.http.stream("POST", "/v1/completions", json={"prompt": "hello", "stream": True}),
            server.http.stream("POST", "/v1/completions", json={"prompt": "other", "stream": True}),
        ):
            while (found := samples(server))["atom:num_requests_running", ""] != 1:
                pass
            assert found["atom:num_requests_waiting", ""] == 1 and found["atom:kv_cache_usage_perc", ""] > 0
            server.runner.gate.set()
        server.wait_idle()
        assert (
            samples(server)["atom:request_success_total", "abort"]
            + samples(server)["atom:request_success_total", "length"]
            == 2
        )


def test_paths_that_do_not_exist_make_no_labels() -> None:
    with running() as server:
        for number in range(3):
            server.http.get(f"/nothing/{number}")
        assert samples(server)["atom:http_requests_total", "other,404"] == 3
