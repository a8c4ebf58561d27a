"""An OpenAI-compatible server whose answers are scripts: known delays, known failures.

It runs in a thread and notes when it really sent what, on the clock that the client reads, so that a test can compare
with the truth even where the machine is busy.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn


@dataclass
class Script:
    """One answer: the first token after `ttft`, each other one `gap` after the last.

    events    sent instead of the generated tokens: (seconds to wait, bytes)
    reset     cut the connection after so many events
    queue     wait for this lock, as a server with one slot does
    """

    tokens: int = 5
    ttft: float = 0.0
    gap: float = 0.0
    status: int = 200
    usage: bool = True
    content_type: str = "text/event-stream"
    events: list[tuple[float, bytes]] | None = None
    reset: int | None = None
    queue: asyncio.Lock | None = None


@dataclass
class Seen:
    """What the server got and when it sent: perf_counter seconds."""

    body: dict[str, Any]
    received_s: float
    sent_s: list[float] = field(default_factory=list)


@dataclass
class FakeServer:
    url: str
    seen: list[Seen]
    headers: list[dict[str, str]]


def token(text: str = "x", finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _events(script: Script, body: dict[str, Any]) -> Iterator[tuple[float, bytes]]:
    if script.events is not None:
        yield from script.events
        return
    for i in range(script.tokens):
        is_last = i == script.tokens - 1
        yield (script.gap if i else script.ttft), token("x", "length" if is_last else None)
    if script.usage:
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": script.tokens}
        yield 0.0, event({"choices": [], "usage": usage})
    yield 0.0, b"data: [DONE]\n\n"


class _ResetError(Exception):
    """Makes uvicorn drop the connection."""


def _app(behave: Callable[[int, dict[str, Any]], Script], server: FakeServer) -> Any:
    pages = {
        "/version": ("application/json", b'{"version": "fake 1.0"}'),
        "/v1/models": ("application/json", b'{"data": [{"id": "fake", "max_model_len": 4096}]}'),
    }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] in pages or scope["method"] == "GET":
            kind, text = pages.get(scope["path"], ("text/plain", b"not here"))
            status = 200 if scope["path"] in pages else 404
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
            await send({"type": "http.response.body", "body": text})
            return
        data, more = b"", True
        while more:
            message = await receive()
            data, more = data + message.get("body", b""), message.get("more_body", False)
        seen = Seen(json.loads(data), time.perf_counter())
        server.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        number = len(server.seen)
        server.seen.append(seen)
        script = behave(number, seen.body)
        if script.queue:
            async with script.queue:
                await answer(script, seen, send)
        else:
            await answer(script, seen, send)

    async def answer(script: Script, seen: Seen, send: Any) -> None:
        headers = [(b"content-type", script.content_type.encode())]
        await send({"type": "http.response.start", "status": script.status, "headers": headers})
        for number, (wait, data) in enumerate(_events(script, seen.body)):
            if number == script.reset:
                raise _ResetError
            if wait:
                await asyncio.sleep(wait)
            seen.sent_s.append(time.perf_counter())
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


@contextmanager
def fake_server(behave: Callable[[int, dict[str, Any]], Script]) -> Iterator[FakeServer]:
    """The server, reachable while the context lasts; `behave(number of the request, its body)` chooses the script."""
    sock = socket.create_server(("127.0.0.1", 0))
    server = FakeServer(f"http://127.0.0.1:{sock.getsockname()[1]}", [], [])
    config = uvicorn.Config(_app(behave, server), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield server
    finally:
        running.should_exit = True
        thread.join(timeout=5)
        sock.close()
