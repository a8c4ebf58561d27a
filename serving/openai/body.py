"""A request's body: read up to a limit of bytes and of time, then parsed as strict JSON.

Strict: no NaN or Infinity, no lone surrogates, nesting up to 200 levels; pydantic's parser refuses those itself.

Values are made on the event loop, with Python's lock, and everybody's streams stand still meanwhile. 32 MiB of text are
one value; of `[1],[1],` they are eight million, which took 5 s. So bytes that separate values are counted first. Texts
have them too: the limits let two million tokens of prose, code or JSON through, and as many token ids.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from .errors import ApiError

MOST = {  # of a body's bytes
    b",": (2**22, "commas"),
    b'"': (2**21, "quotation marks"),
    b":": (2**19, "colons"),
    b"[": (2**19, "brackets"),
    b"{": (2**19, "braces"),
}


class Bodies:
    """Memory for the bodies of all requests that are being read.

    most  bytes together
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def hold(self) -> Iterator[list[bytes]]:
        """A list for the chunks of one body, which is `take`'s; its memory is given back at the end."""
        chunks: list[bytes] = []
        try:
            yield chunks
        finally:
            self.held -= sum(map(len, chunks))

    def take(self, chunks: list[bytes], chunk: bytes) -> None:
        """Add a chunk. ApiError (429) if there is no room."""
        if self.held + len(chunk) > self.most:
            message = f"bodies of {self.held} bytes are being read, at most {self.most} together; try again later."
            raise ApiError(429, message, code="queue_full", retry_after_s=1)
        self.held += len(chunk)
        chunks.append(chunk)


async def read_json(request: Request, max_bytes: int, timeout_s: float, bodies: Bodies) -> Any:
    """The body's JSON value.

    Raises ApiError: 400 malformed, 408 too slow, 413 too large (before the rest is read) or of too many values, 415 not
    JSON by its header, 429 too many others are read.
    """
    _check_headers(request)
    _check_length(request, max_bytes)
    with bodies.hold() as chunks:
        try:
            async with asyncio.timeout(timeout_s):
                await _read(request, max_bytes, bodies, chunks)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {timeout_s:g} s; send it faster.") from None
        data = b"".join(chunks)
    _check_values(data)
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body must be JSON: {error}; correct it.", code="malformed_json") from None


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content-type must be application/json, got {kind[:80]!r}; set the header.")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise ApiError(415, f"content-encoding must be identity, got {encoding[:80]!r}; send the body as it is.")


def _check_length(request: Request, max_bytes: int) -> None:
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) < 20):
        raise ApiError(400, f"content-length must be a number of bytes, got {length[:80]!r}; correct it.")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)


async def _read(request: Request, max_bytes: int, bodies: Bodies, chunks: list[bytes]) -> None:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:  # a chunked body says its length only as it comes
            raise _too_large(max_bytes)
        bodies.take(chunks, chunk)


def _check_values(data: bytes) -> None:
    if len(data) <= min(most for most, _ in MOST.values()):
        return
    for byte, (most, name) in MOST.items():
        count = data.count(byte)
        if count > most:
            raise ApiError(413, f"the body has {count} {name}, at most {most} are read; send several requests.")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body must have at most {max_bytes} bytes; send less, or serve with a larger --max-body-bytes."
    )
