"""The last step of an answer: as JSON or as events, and errors that come when these have begun."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from ..stream import Chunk, Stream
from .errors import ApiError, api_error
from .sse import EventStream, event, to_json, unless_left

logger = logging.getLogger(__name__)

T = TypeVar("T")
LARGE = 10_000  # tokens of logprobs, some 20 ms


class JsonAnswer(Response):
    """A dictionary as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Generated(Protocol):
    """What a request for text is answered with."""

    async def whole(self) -> dict[str, Any]: ...

    def events(self) -> AsyncGenerator[bytes, None]: ...


async def respond(http: Request, generated: Generated, stream: Stream, in_events: bool) -> Response:
    """`generated` whole or in events, of what `stream` brings, which is closed at the end or when the client leaves."""
    if in_events:
        return EventStream(generated.events(), stream.close)
    try:
        return JsonAnswer(await unless_left(http, generated.whole()))
    finally:
        stream.close()


async def beside_others(count: int, make: Callable[[], T]) -> T:
    """What `make` makes of the logprobs of `count` tokens, alternatives included; many in a thread, streams go on."""
    return make() if count < LARGE else await asyncio.to_thread(make)


def error_answer(error: ApiError) -> Response:
    return JsonAnswer(error.body, error.status, error.headers)


def internal_error(error: Exception) -> ApiError:
    """A failure that nobody foresaw: logged in full, told in short."""
    logger.error("internal error", exc_info=error)
    return ApiError(500, f"internal error ({type(error).__name__}); the server's log has it.", code="internal_error")


class ErrorEvents:
    """Ends a stream at an error and says it: the status was sent long before."""

    def __init__(self) -> None:
        self.found: ApiError | None = None

    async def catch(self, stream: Stream) -> AsyncIterator[Chunk]:
        try:
            async for chunk in stream:
                yield chunk
        except Exception as error:
            self.found = api_error(error) or internal_error(error)

    def events(self) -> Iterator[bytes]:
        if self.found is not None:
            yield event(self.found.body)
