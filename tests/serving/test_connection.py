"""A connection on which no whole request comes is closed, whatever its client does; one that is served is not."""

import socket
import time
from collections.abc import Iterator

import pytest

from atom.serving.server import build_app

from .scripted import ScriptedRunner, read_answer, scripted_service, serve_app

TIMEOUT_S = 0.4
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    runner = ScriptedRunner(pause_s=0.1)
    with serve_app(build_app(scripted_service(runner)), TIMEOUT_S) as url:
        yield int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", port))
    raw.settimeout(5)
    return raw


def closes_while_sending(raw: socket.socket, data: bytes) -> bool:
    """Whether the other side closes within 5 s although a byte comes every 50 ms."""
    raw.settimeout(0.05)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            raw.sendall(data)
            if not raw.recv(4096):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def test_one_that_says_nothing(port: int) -> None:
    with connect(port) as raw:
        assert raw.recv(100) == b""


def test_one_that_says_little(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(HEAD)
        assert closes_while_sending(raw, b"x")


def test_one_that_begins_a_second_request_and_never_ends_it(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(HEAD + b"\r\n")
        assert read_answer(raw).startswith(b"HTTP/1.1 200")
        raw.sendall(HEAD)
        assert closes_while_sending(raw, b"x")


def test_one_that_was_answered_and_goes_on_with_its_body(port: int) -> None:
    with connect(port) as raw:
        raw.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
        assert read_answer(raw).startswith(b"HTTP/1.1 404")
        assert closes_while_sending(raw, b"x")


def test_an_answer_may_take_longer(port: int) -> None:
    body = b'{"prompt": "x", "max_tokens": 20}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with connect(port) as raw:
        raw.sendall(head % len(body) + body)
        started = time.monotonic()
        assert read_answer(raw).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - started > TIMEOUT_S, "too fast to show anything"
        raw.sendall(HEAD + b"\r\n")
        assert read_answer(raw).startswith(b"HTTP/1.1 200")
