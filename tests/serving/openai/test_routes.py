"""Routes beside completions and chats, each asked for what it is for."""

import time
from collections.abc import Iterator

import pytest

from atom import __version__

from ..scripted import HF, Running, ScriptedRunner, running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made
        made.wait_idle()


def test_models(server: Running) -> None:
    cards = server.http.get("/v1/models").json()
    assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == ["tiny", "alias"]
    for card in cards["data"]:
        assert (card["object"], card["max_model_len"]) == ("model", 1024)
        assert server.http.get(f"/v1/models/{card['id']}").json() == card
    answer = server.http.get("/v1/models/other/one")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("text", ["Hello there.", "é 😀\n<s>", "</s>"])
def test_a_text_comes_back_from_its_tokens(server: Running, text: str) -> None:
    found = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == HF.encode(text) and found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 1024
    back = server.post("/detokenize", tokens=found["tokens"]).json()["prompt"]
    assert back == HF.decode(found["tokens"]) and text in back


def test_tokenize_takes_a_conversation(server: Running) -> None:
    found = server.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]).json()
    asked = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}]).json()
    assert found["count"] == asked["usage"]["prompt_tokens"]
    assert "<user>Hi" in server.post("/detokenize", tokens=found["tokens"]).json()["prompt"]


def test_what_cannot_be_tokenized_is_refused(server: Running) -> None:
    for path, body, field in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ):
        answer = server.post(path, **body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_what_the_tokenizer_is(server: Running) -> None:
    found = server.http.get("/tokenizer_info").json()
    assert found["tokenizer_class"] == type(HF).__name__ and found["eos_token"] == HF.eos_token
    assert found["model_max_length"] == 1024


def test_version_and_documentation(server: Running) -> None:
    assert server.http.get("/version").json() == {"version": __version__}
    assert "swagger" in server.http.get("/docs").text
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/abort", "/metrics", "/health"} <= set(paths)


def test_health_makes_a_token_ahead_of_the_queue() -> None:
    """It is alive while its queue is long, and once a step fails under the token it is not."""
    runner = ScriptedRunner(lambda request, index: "word " * 40, pause_s=0.002)
    with running(runner, max_num_seqs=1, max_num_batched_tokens=64) as server:
        streams = [
            server.http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) for _ in range(4)
        ]
        for stream in streams:
            stream.__enter__()
        assert server.http.get("/health/generate").json() == {"status": "ok"}
        assert server.engine.stats().waiting > 0, "others still wait"
        for stream in streams:
            stream.__exit__(None, None, None)
        server.wait_idle()
        runner.faults.append("injected")
        assert server.http.get("/health/generate").status_code == 500
        assert server.http.get("/health").status_code == 200 == server.http.get("/health/generate").status_code
        runner.faults += ["1", "2", "3"]
        for _ in range(3):
            assert server.http.get("/health/generate").status_code in (500, 503)
        deadline = time.monotonic() + 5
        while server.engine.healthy and time.monotonic() < deadline:
            time.sleep(0.005)
        assert server.http.get("/health/generate").status_code == 503 == server.http.get("/health").status_code


def test_prompt_tokens_that_wait_are_bounded_too() -> None:
    """429 with Retry-After; a request's own size is a matter of 400."""
    with running(max_num_seqs=1, max_num_batched_tokens=64, max_waiting_tokens=1100) as server:
        server.runner.gate.clear()
        path, body = "/v1/completions", {"prompt": [5] * 600, "max_tokens": 4, "stream": True}
        streams = [server.http.stream("POST", path, json=body) for _ in range(2)]
        assert streams[0].__enter__().status_code == 200
        deadline = time.monotonic() + 20
        while server.engine.stats().waiting and time.monotonic() < deadline:
            time.sleep(0.005)  # until it runs: the second has room then
        assert streams[1].__enter__().status_code == 200
        answer = server.post(path, prompt=[5] * 600, max_tokens=4)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "queue_full") and "tokens" in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert server.http.get("/health").status_code == 200
        server.runner.gate.set()
        for stream in streams:
            stream.__exit__(None, None, None)
        server.wait_idle()
        assert server.post(path, prompt=[5] * 600, max_tokens=4).status_code == 200


@pytest.mark.parametrize(
    ("limits", "what"),
    [({"num_blocks": 8}, "the KV cache holds 128 tokens"), ({"max_model_len": 128}, "max_model_len is 128")],
)
def test_what_context_or_cache_cannot_hold_is_refused_before_it_waits(limits: dict[str, int], what: str) -> None:
    with running(**limits) as server:
        for body, field in (({"prompt": [5] * 200}, "prompt"), ({"prompt": [5] * 100, "max_tokens": 60}, "max_tokens")):
            answer = server.post("/v1/completions", **body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, field) and what in error["message"]
        assert server.post("/v1/completions", prompt=[5] * 100, max_tokens=20).status_code == 200
        assert len(server.runner.seen) == 1
        server.wait_idle()
