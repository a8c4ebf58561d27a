"""Answers that end early when their client does: server-sent events, and plain ones.

Starlette cancels neither: a plain handler runs on after its client has left, and a stream learns of it with the next
send, which for a request that still waits may be minutes away. Both here watch the connection while they work.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import pydantic_core
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientLeftError(Exception):
    """The client has closed the connection; nobody reads an answer."""


def to_json(value: Any) -> bytes:
    return pydantic_core.to_json(value)


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


async def until_left(receive: Receive) -> None:
    """Wait until the client closes the connection; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; then raises ClientLeftError."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(until_left(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        await _cancel(task, watcher)


class EventStream(Response):
    """Sends events as they come; ends, and closes their source, when they end or the client leaves.

    events  whole events as bytes
    close   called once at the end, whatever happened, also if `events` was never begun
    """

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self.events = events
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(until_left(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except OSError:  # the client left in the middle of a send
            pass
        finally:
            self.close()
            await _cancel(sender, watcher)
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self.events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _cancel(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
