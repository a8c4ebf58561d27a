"""What goes wrong is told as the API tells it: never a hang, never a 5xx for a client's mistake."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from atom.serving.openai.service import Limits
from atom.serving.server import ROUTES, AppOptions

from ..scripted import Running, ScriptedRunner, running

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    yield
    server.wait_idle()


def refused(answer: httpx.Response, status: int, param: str | None, match: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and match in error["message"], error
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("body", "param", "match"),
    [
        ({"prompt": "hi", "temperature": 3.0}, "temperature", "within 0 and 2"),
        ({"prompt": "hi", "temperature": "1"}, "temperature", "valid number"),
        ({"prompt": "hi", "top_p": 0}, "top_p", "above 0"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens", "at least 1"),
        ({"prompt": "hi", "max_tokens": 5000}, "max_tokens", "max_model_len is 1024"),
        ({"prompt": "hi", "max_tokens": True}, "max_tokens", "valid integer"),
        ({"prompt": "hi", "n": 0}, "n", "within 1 and 128"),
        ({"prompt": "hi", "n": 10**30}, "n", "integer"),
        ({"prompt": "hi", "logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"prompt": "hi", "logit_bias": {"999999": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "hi", "stop": [""]}, "stop", "1 to 1024 characters"),
        ({"prompt": "hi", "stop": [1]}, "stop", "valid string"),
        ({"prompt": "hi", "seed": -1}, "seed", "within 0"),
        ({"prompt": "hi", "priority": 1000}, "priority", "-100"),
        ({"prompt": "hi", "suffix": "x"}, "suffix", "leave it out"),
        ({"prompt": "hi", "best_of": 3}, "best_of", "equal n"),
        ({"prompt": "hi", "stream_options": {}}, "stream_options", "needs stream"),
        ({"prompt": "hi", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
        ({"prompt": "hi", "frobnicate": 1}, "frobnicate", "unknown field"),
        ({"prompt": "hi", "guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "exclude"),
        ({"max_tokens": 1}, "prompt", "required"),
        ({"prompt": None}, "prompt", "required"),
        ({"prompt": {}}, "prompt", "must be a text"),
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": ""}, "prompt", "at least one token"),
        ({"prompt": [["a"]]}, "prompt", "must be a text"),
        ({"prompt": [1, "a"]}, "prompt", "must be a text"),
        ({"prompt": [10**6]}, "prompt", "vocabulary"),
        ({"prompt": [-1]}, "prompt", "must be a text"),
        ({"prompt": "a " * 600}, "prompt", "leave room"),
        ({"prompt": "x" * 10**5}, "prompt", "100000 characters"),
        ({"prompt": ["a"] * 1025}, "prompt", "at most 1024 texts"),
        ({"prompt": ["a"] * 1000, "n": 128}, "prompt", "asks for 128000 samples"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(server: Running, body: dict[str, Any], param: str, match: str) -> None:
    refused(server.post(PATH, **body), 400, param, match)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "hi", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "hi"} trailing',
    ],
    ids=["empty", "cut", "words", "nan", "infinity", "surrogate", "no utf-8", "deep", "huge number", "trailing"],
)
def test_malformed_json(server: Running, data: bytes) -> None:
    error = refused(server.http.post(PATH, content=data, headers=JSON), 400, None, "must be JSON")
    assert error["code"] == "malformed_json"


@pytest.mark.parametrize("data", [b"[]", b'"x"', b"1", b"null"])
def test_a_body_that_is_no_object(server: Running, data: bytes) -> None:
    assert server.http.post(PATH, content=data, headers=JSON).status_code == 400


def test_overflowing_number_is_no_number(server: Running) -> None:
    data = b'{"prompt": "hi", "temperature": 1e400}'
    refused(server.http.post(PATH, content=data, headers=JSON), 400, "temperature", "finite")


def test_wrong_type_encoding_method_and_path(server: Running) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    refused(server.http.post(PATH, content=b"{}", headers=form), 415, None, "application/json")
    refused(server.http.post(PATH, content=b"{}", headers=JSON | {"content-encoding": "gzip"}), 415, None, "identity")
    assert server.http.get(PATH).headers["allow"] == "POST"
    refused(server.http.get(PATH), 405, None, "use POST")
    refused(server.http.post("/v1/nothing"), 404, None, "nothing at /v1/nothing")


def test_unknown_model(server: Running) -> None:
    assert refused(server.post(PATH, model="gpt-9", prompt="x"), 400, "model", "use tiny")["code"] == "model_not_found"
    assert server.post(PATH, model="alias", prompt="x").status_code == 200


def test_charset_in_the_content_type(server: Running) -> None:
    kind = {"content-type": "application/json; charset=utf-8"}
    assert server.http.post(PATH, content=b'{"prompt": "x"}', headers=kind).status_code == 200


def test_huge_bodies_are_refused_before_they_are_read() -> None:
    with running(limits_http=Limits(max_body_bytes=1000, body_timeout_s=0.3)) as server:
        refused(server.http.post(PATH, json={"prompt": "x" * 2000}), 413, None, "at most 1000 bytes")
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as raw:
            raw.settimeout(5)
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            raw.sendall(f"{head}content-length: 100000000\r\n\r\n".encode())  # and never the body
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")

        def endless() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        refused(server.http.post(PATH, content=endless(), headers=JSON), 413, None, "at most 1000 bytes")

        def slow() -> Iterator[bytes]:
            yield b"{"
            time.sleep(0.6)
            yield b"}"

        refused(server.http.post(PATH, content=slow(), headers=JSON), 408, None, "within 0.3 s")


def test_bodies_of_all_requests_together_are_bounded() -> None:
    with running(limits_http=Limits(max_bodies_bytes=1000)) as server:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 950\r\n\r\n"
        body = {"prompt": "x" * 100}
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as raw:
            raw.settimeout(5)
            raw.sendall(head.encode() + b" " * 930)
            deadline = time.monotonic() + 5
            while server.service.bodies.held < 930 and time.monotonic() < deadline:
                time.sleep(0.005)
            answer = server.http.post(PATH, json=body)
            assert refused(answer, 429, None, "at most 1000 together")["code"] == "queue_full"
            assert answer.headers["retry-after"] == "1"
            raw.sendall(b'{"prompt": "x"}     ')
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")
        assert server.service.bodies.held == 0 and server.http.post(PATH, json=body).status_code == 200
        with socket.create_connection(("127.0.0.1", server.http.base_url.port)) as raw:  # and one that leaves
            raw.sendall(head.encode() + b" " * 930)
        deadline = time.monotonic() + 5
        while server.http.post(PATH, json=body).status_code == 429:
            assert time.monotonic() < deadline, "its memory is still taken"
        assert server.service.bodies.held == 0


def test_api_key_on_every_route_but_health() -> None:
    with running(options=AppOptions(api_keys=("secret", "other"))) as server:
        paths = [path for _, path, *_ in ROUTES if "{" not in path]
        assert PATH in paths and "/metrics" in paths
        for path in [*paths, "/", "/docs", "/openapi.json", "/nothing"]:
            for method in ("GET", "POST"):
                answer = server.http.request(method, path)
                if path == "/health" and method == "GET":
                    assert answer.status_code == 200
                elif path != "/health":
                    assert answer.status_code == 401, path
        refused(server.post(PATH, prompt="x"), 401, None, "is missing")
        for value in ("Bearer wrong", "secret", "Basic secret", "Bearer", "Bearer secre"):
            answer = server.http.post(PATH, json={"prompt": "x"}, headers={"authorization": value})
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        for key in ("secret", "other"):
            answer = server.http.post(PATH, json={"prompt": "x"}, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 200


def test_a_key_of_other_letters() -> None:
    with running(options=AppOptions(api_keys=("schlüssel",))) as server:
        for key, status in (("schlüssel", 200), ("schlussel", 401), ("schl\xc3\xbcssel", 401)):
            headers = {"authorization": f"Bearer {key}".encode()}
            assert server.http.get("/v1/models", headers=headers).status_code == status


def test_full_queue_is_429_with_retry_after() -> None:
    with running(max_num_seqs=1, max_num_batched_tokens=64, max_waiting_requests=1) as server:
        server.runner.gate.clear()
        streams = [server.http.stream("POST", PATH, json={"prompt": "x", "stream": True}) for _ in range(2)]
        for stream in streams:
            stream.__enter__()
            deadline = time.monotonic() + 5
            while server.engine.stats().running < 1 and time.monotonic() < deadline:
                time.sleep(0.005)
        answer = server.post(PATH, prompt="y")
        assert refused(answer, 429, None, "wait already")["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        server.runner.gate.set()
        for stream in streams:
            stream.__exit__(None, None, None)
        server.wait_idle()
        assert server.post(PATH, prompt="y").status_code == 200


def test_a_list_of_prompts_is_let_in_whole_or_not_at_all() -> None:
    with running(max_num_seqs=1, max_num_batched_tokens=64, max_waiting_requests=2) as server:
        server.runner.gate.clear()
        assert server.post(PATH, prompt=["a", "b", "c", "d"]).status_code == 429
        server.runner.gate.set()
        server.wait_idle()


def test_other_sites_are_let_in_only_if_they_are_named() -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with running(options=AppOptions(api_keys=("secret",), allowed_origins=("https://good.example",))) as server:
        for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
            answer = server.http.options(PATH, headers={"origin": origin} | asks)
            assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    with running() as server:
        answer = server.http.post(PATH, json={"prompt": "x"}, headers={"origin": "https://good.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_a_failed_step_reaches_its_clients_and_no_others(server: Running) -> None:
    server.runner.faults.append("injected")
    error = refused(server.post(PATH, prompt="x"), 500, None, "send it again")
    assert (error["type"], error["code"]) == ("server_error", "step_failed")
    assert server.post(PATH, prompt="x").status_code == 200 and server.http.get("/health").status_code == 200


def test_a_failed_step_in_a_stream_is_an_event() -> None:
    runner = ScriptedRunner(lambda request, index: "word " * 50, pause_s=0.005)
    with (
        running(runner) as server,
        server.http.stream("POST", PATH, json={"prompt": "x", "stream": True, "max_tokens": 200}) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        runner.faults.append("injected")
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "step_failed"
        server.wait_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_reaches_every_waiter(stream: bool) -> None:
    with running() as server:
        server.runner.faults += ["1", "2", "3", "4"]
        statuses = []
        for _ in range(3):
            answer = server.post(PATH, prompt="x", stream=stream)
            statuses.append(
                json.loads(answer.text.split("data: ")[1])["error"]["code"] if stream else answer.status_code
            )
        assert statuses[:2] == ["step_failed"] * 2 if stream else [500] * 2
        deadline = time.monotonic() + 5
        while server.engine.error is None and time.monotonic() < deadline:
            time.sleep(0.005)
        answer = server.post(PATH, prompt="x")
        refused(answer, 503, None, "dead")
        assert server.http.get("/health").status_code == 503
