"""`atom bench serve` as a whole, against the fake server, and the command around it."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atom.cli import main
from atom.serving.bench.config import ServeBenchConfig
from atom.serving.bench.serve import bench_serve
from atom.serving.bench.server_facts import NoServerError

from .fake_server import Script, event, fake_server, token

COMMON: dict[str, Any] = {"token_ids": "5:50", "workload": "20/4", "num_requests": 12, "max_concurrency": 4}


def exact(i: int, body: dict[str, Any]) -> Script:
    return Script(tokens=body["max_tokens"], ttft=0.02, gap=0.005)


def test_a_closed_loop_from_end_to_end(tmp_path: Path) -> None:
    phases = []
    with fake_server(exact) as server:
        config = ServeBenchConfig(url=server.url + "/v1/", slo="ttft:2000,tpot:500", **COMMON)
        result = bench_serve(config, lambda phase, progress: phases.append(phase))
        bodies = [seen.body for seen in server.seen]
    assert phases == ["warm-up", "running"] and len(bodies) == 4 + 12
    assert all(len(body["prompt"]) == 20 and body["max_tokens"] == 4 for body in bodies)
    assert all(5 <= token < 50 for body in bodies for token in body["prompt"])
    prompts = {tuple(body["prompt"]) for body in bodies}
    assert len(prompts) == 16, "the warm-up's prompts are not the measured ones, which a cache would know"
    assert bodies[0]["model"] == "fake"

    assert result.is_complete and result.summary.completed == 12 and result.notes == ()
    assert result.summary.goodput_s == pytest.approx(result.summary.request_s)
    assert result.server["version"] == "fake 1.0" and "latencies" not in result.server
    result.write(tmp_path / "deep" / "result.json")
    written = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert written["kind"] == "atom-bench-serve" and written["is_complete"] is True
    assert len(written["samples"]) == 12 and written["samples"][0]["prompt"] == 20
    assert written["config"]["arrivals"] == "closed loop of 4" and written["config"]["request_rate"] is None
    assert written["seed"] == 0 and {"date", "command", "commit", "machine", "versions"} <= set(written)


def test_the_same_prompts_for_the_same_seed() -> None:
    def prompts(seed: int) -> list[list[int]]:
        with fake_server(exact) as server:
            bench_serve(ServeBenchConfig(url=server.url, seed=seed, warmup=0, **{**COMMON, "max_concurrency": 1}))
            return [seen.body["prompt"] for seen in server.seen]

    first = prompts(1)
    assert first == prompts(1) and first != prompts(2)


def test_open_loop_with_longer_requests_than_the_context() -> None:
    with fake_server(exact) as server:
        config = ServeBenchConfig(
            url=server.url, token_ids="5:50", workload="uniform:3000-5000/4-4", request_rate=200, num_requests=20
        )
        result = bench_serve(config)
    long = result.config["requests_too_long"]
    assert 0 < long < 20 and result.summary.requests == 20 - long
    assert f"{long} requests were longer than the server's context" in result.notes[0]
    assert result.config["arrivals"] == "Poisson arrivals, 200 requests/s"
    with (
        fake_server(exact) as server,
        pytest.raises(ValueError, match="none of 20 requests of 4096/4 fits 4096 tokens"),
    ):
        bench_serve(ServeBenchConfig(url=server.url, token_ids="5:50", workload="4096/4", num_requests=20))


def test_ctrl_c_leaves_a_result_that_says_so(tmp_path: Path) -> None:
    with fake_server(lambda i, body: exact(i, body) if i < 8 else Script(ttft=30)) as server:
        timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))

        def watch(phase: str, progress: object) -> None:
            if phase == "running":
                timer.start()

        result = bench_serve(ServeBenchConfig(url=server.url, **COMMON), watch)
    assert not result.is_complete and "INCOMPLETE" in result.table()
    assert result.summary.completed == 4 and result.summary.errors == {"interrupted": 4}
    assert any("4 of 12 requests were not sent" in note for note in result.notes)


def test_what_stops_it_before_it_starts() -> None:
    with pytest.raises(NoServerError, match=r"no server answers at http://127\.0\.0\.1:9 .*; start one"):
        bench_serve(ServeBenchConfig(url="127.0.0.1:9", **COMMON))
    with fake_server(exact) as server:
        with pytest.raises(NoServerError, match="answered 404 and no list of models"):
            bench_serve(ServeBenchConfig(url=server.url + "/elsewhere", **COMMON))
        with pytest.raises(ValueError, match="--model is other, the server has fake; name one"):
            bench_serve(ServeBenchConfig(url=server.url, model="other", **COMMON))
        with pytest.raises(ValueError, match="tokenizer of fake is not at hand; name a directory"):
            bench_serve(ServeBenchConfig(url=server.url, workload="5/5"))
    with fake_server(lambda i, body: Script(status=500)) as server:
        with pytest.raises(ValueError, match="all 4 requests of the warm-up failed, the first with http 500"):
            bench_serve(ServeBenchConfig(url=server.url, **COMMON))
        result = bench_serve(ServeBenchConfig(url=server.url, warmup=0, **COMMON))
    assert result.summary.errors == {"http 500": 12} and result.summary.ttft is None
    assert "12 http 500" in result.table()


def test_chat_with_text_prompts(tiny: Callable[[str], Path]) -> None:
    """The tiny model's tokenizer has a token for each byte: as many characters as tokens."""
    answer = [
        (0.0, event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})),
        (0.05, event({"choices": [{"delta": {"content": "x"}, "finish_reason": "length"}]})),
        (0.0, b"data: [DONE]\n\n"),
    ]
    with fake_server(lambda i, body: Script(events=answer)) as server:
        config = ServeBenchConfig(
            url=server.url, endpoint="chat", tokenizer=str(tiny("llama")), workload="30/1", num_requests=2, warmup=0
        )
        result = bench_serve(config)
        texts = [seen.body["messages"][0]["content"] for seen in server.seen]
    assert all(len(text) == 30 for text in texts) and texts[0] != texts[1]
    assert result.summary.ttft is not None and result.summary.ttft.min >= 50, "the role alone is no token"


def test_a_prefix_cache_that_knows_the_prompts_is_reported() -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 16}}
    answer = [(0.0, token(finish="length")), (0.0, event({"choices": [], "usage": usage})), (0.0, b"data: [DONE]\n\n")]
    with fake_server(lambda i, body: Script(events=answer)) as server:
        result = bench_serve(ServeBenchConfig(url=server.url, **{**COMMON, "workload": "20/1"}))
    assert "192 of 240 prompt tokens came from the server's prefix cache" in result.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x"}, "--url must be"),
        ({"slo": "speed:1"}, "cannot read 'speed:1' of --slo"),
        ({"workload": "much"}, "cannot read workload"),
        ({"num_requests": 0}, "--num-requests must be at least 1"),
        ({"timeout": 0.0}, "--timeout is in seconds"),
        ({"token_ids": "5-9"}, "is a range LOW:HIGH"),
        ({"token_ids": "5:9", "endpoint": "chat"}, "prompts as text need a tokenizer"),
        ({"endpoint": "chat", "prompt_format": "ids"}, "a chat's messages are text"),
        ({"extra_body": "[1]"}, "--extra-body must be a JSON object"),
        ({"request_rate": -1.0}, "rate must be above 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeBenchConfig(**options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(exact) as server:
        arguments = ["bench", "serve", "--url", server.url, "--token-ids", "5:50", "--workload", "8/2"]
        arguments += ["--num-requests", "5", "--max-concurrency", "2", "--output", str(tmp_path / "r.json"), "--json"]
        assert main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(out.strip().splitlines()[-1])
    assert found["summary"]["completed"] == 5 and "closed loop of 2" in out and "samples" not in found
    assert json.loads((tmp_path / "r.json").read_text())["summary"] == found["summary"]
    assert main(["report", "bench", str(tmp_path / "r.json"), "--no-plots", "--output", str(tmp_path / "rep")]) == 0
    assert "closed loop of 2" in capsys.readouterr().out and (tmp_path / "rep" / "report.html").is_file()


def test_the_command_when_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The partial result is written and printed, and the exit code says that something is missing."""
    with fake_server(lambda i, body: exact(i, body) if i < 6 else Script(ttft=30)) as server:
        arguments = ["bench", "serve", "--url", server.url, "--token-ids", "5:50", "--workload", "8/2"]
        arguments += ["--num-requests", "50", "--max-concurrency", "2", "--output", str(tmp_path / "r.json")]
        threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert main(arguments) == 1
    assert json.loads((tmp_path / "r.json").read_text())["is_complete"] is False
    done = capsys.readouterr()
    assert "INCOMPLETE" in done.out and "interrupted" in done.err


def test_bounds_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bounds", "--shape", "tiny", "--workload", "64/64", "--no-goals", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.strip().splitlines()[-1])
    assert found["goals"] == [] and {row["scheme"] for row in found["rows"]} >= {"bf16", "w4a4"}
    assert main(["bench", "bounds", "--shape", "gpt-9"]) == 2
