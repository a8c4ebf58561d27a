"""A client that leaves costs nothing: at any moment, streaming or not, its requests end and their blocks are free."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ..scripted import Running, ScriptedRunner, running

BODY = '{"prompt": "hello", "max_tokens": 900, "n": 2, "stream": %s}'
CHAT = '{"messages": [{"role": "user", "content": "hello"}], "max_tokens": 900, "stream": %s}'
ROUTES = {"/v1/completions": BODY, "/v1/chat/completions": CHAT}


@pytest.fixture
def server() -> Iterator[Running]:
    runner = ScriptedRunner(lambda request, index: "word " * 300, pause_s=0.002)
    with running(runner, max_num_seqs=2, max_num_batched_tokens=64) as made:
        yield made


def send(server: Running, path: str, stream: bool) -> socket.socket:
    body = (ROUTES[path] % str(stream).lower()).encode()
    raw = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    raw.sendall(head.encode() + body)
    return raw


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_while_it_runs(server: Running, path: str, stream: bool) -> None:
    raw = send(server, path, stream)
    wait_for(lambda: server.engine.stats().num_output_tokens > 5)
    made = server.engine.stats().num_output_tokens
    raw.close()
    server.wait_idle()
    assert server.engine.stats().num_output_tokens < made + 600, "it was aborted long before its end"


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(server: Running, stream: bool) -> None:
    first = send(server, "/v1/completions", False)
    wait_for(lambda: server.engine.stats().running == 2)
    second = send(server, "/v1/completions", stream)
    wait_for(lambda: server.engine.stats().waiting == 2)
    second.close()
    wait_for(lambda: server.engine.stats().waiting == 0)
    assert server.engine.stats().running == 2, "the other one runs on"
    first.close()
    server.wait_idle()


def test_while_a_step_is_under_way(server: Running) -> None:
    server.runner.gate.clear()
    raw = send(server, "/v1/completions", True)
    wait_for(lambda: server.service.frontend.num_open == 1)
    raw.close()
    wait_for(lambda: server.service.frontend.num_open == 0)
    server.runner.gate.set()
    server.wait_idle()


def test_in_the_middle_of_its_body(server: Running) -> None:
    raw = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    raw.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"prompt"')
    time.sleep(0.05)
    raw.close()
    assert server.http.get("/health").status_code == 200
    server.wait_idle()


def test_a_client_that_does_not_read_holds_nobody_up(server: Running) -> None:
    idle = send(server, "/v1/chat/completions", True)
    idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    answer = server.post("/v1/completions", prompt="x", max_tokens=20)
    assert answer.json()["usage"]["completion_tokens"] == 20
    idle.close()
    server.wait_idle()


def test_many_come_and_go(server: Running) -> None:
    for number in range(40):
        raw = send(server, list(ROUTES)[number % 2], number % 3 == 0)
        time.sleep(0.001 * (number % 7))
        raw.close()
    server.wait_idle()
    assert server.post("/v1/completions", prompt="x", max_tokens=3).status_code == 200


def test_abort_by_the_answers_id_and_by_request_id(server: Running) -> None:
    for name in ("own", "client"):
        body = {"prompt": "x", "max_tokens": 900, "stream": True}
        headers = {"x-request-id": "mine-1"}
        with server.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.headers["x-request-id"] == "mine-1"
            lines = (line for line in answer.iter_lines() if line)
            own = next(lines).split('"id":"')[1].split('"')[0]
            done = server.post("/v1/abort", request_id=own if name == "own" else "mine-1")
            assert done.json()["aborted"] is True
            rest = list(lines)
            assert '"finish_reason":"abort"' in rest[-2] and rest[-1] == "data: [DONE]"
        server.wait_idle()
    assert server.post("/v1/abort", request_id="nobody").json()["aborted"] is False
