"""A small HTTP/1.1 client for load: POST, and the answer's bytes handed over as they arrive.

General clients choose among their connections by looking at all of them for every request; httpx 0.28 with 128
requests under way added seconds to each one's first token (2-core CPU, where the server answered in 50 ms). Here an
idle connection is the top of a list, and a chunk costs one callback. No redirects, no proxies, no compression, no
retries: a load generator reports what happens.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

MAX_IDLE_S = 2.0  # servers close idle connections (uvicorn after 5 s); a request must not meet that
MAX_HEAD = 65536  # bytes

OnHead = Callable[[int, Mapping[str, str]], None]
OnBody = Callable[[bytes], None]


class ConnectFailedError(ConnectionError):
    """No connection could be made."""


class DisconnectedError(ConnectionError):
    """The connection ended, or made no sense, before the answer was whole."""


class StreamClient:
    """Keep-alive connections to one server, as many as are needed at once. Use it as an async context manager."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None) -> None:
        parts = urlsplit(base_url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._address: str | None = None  # of the first connection, so that names are resolved once
        self._idle: list[tuple[float, _Connection]] = []
        self._head = f"host: {parts.netloc}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())

    async def __aenter__(self) -> "StreamClient":
        return self

    async def __aexit__(self, *details: object) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()

    async def post(self, path: str, body: bytes, on_head: OnHead, on_body: OnBody) -> None:
        """Send `body` as JSON; return when the answer is whole.

        on_head  called once with the status and the headers, names in lower case
        on_body  called with the answer's bytes each time that some arrived; what either raises is raised here
        Raises ConnectFailedError and DisconnectedError. Cancelling it closes the connection, which tells the server.
        """
        connection = self._take_idle() or await self._connect()
        request = (
            f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\n"
            f"accept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        try:
            await connection.exchange(request.encode("latin-1") + body, on_head, on_body)
        except BaseException:
            connection.close()
            raise
        if connection.is_reusable:
            self._idle.append((time.monotonic(), connection))
        else:
            connection.close()

    def _take_idle(self) -> "_Connection | None":
        """The connection used last, if that was just now; older ones are closed."""
        while self._idle:
            since, connection = self._idle.pop()
            if connection.is_reusable and time.monotonic() - since < MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        name = self._host if self._tls else None
        try:
            transport, connection = await loop.create_connection(
                _Connection, self._address or self._host, self._port, ssl=self._tls, server_hostname=name
            )
        except OSError as error:
            raise ConnectFailedError(f"cannot connect to {self._host}:{self._port}: {error}") from None
        with suppress(TypeError, IndexError):
            self._address = str(transport.get_extra_info("peername")[0])
        return connection


class _Connection(asyncio.Protocol):
    """One connection: parses one answer after the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[None] | None = None
        self._on_head: OnHead = lambda status, headers: None
        self._on_body: OnBody = lambda data: None
        self._in_head = False
        self._left: int | None = 0  # bytes of the body, or of its chunk, still to come; None: until the end
        self._chunked = False
        self._keeps_alive = True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_reusable(self) -> bool:
        return self._keeps_alive and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, on_head: OnHead, on_body: OnBody) -> None:
        assert self._transport is not None
        self._on_head, self._on_body = on_head, on_body
        self._in_head, self._buffer = True, b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._keeps_alive = False
        if self._answer is None or self._answer.done():
            return
        if not self._in_head and not self._chunked and self._left is None:  # a body that ends with the connection
            self._answer.set_result(None)
        else:
            self._answer.set_exception(
                DisconnectedError(f"the server closed the connection ({exc or 'end of stream'})")
            )

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            return self.close()  # bytes that nobody asked for
        try:
            self._parse(data)
        except Exception as error:
            if not self._answer.done():
                self._answer.set_exception(error)
        return None

    def _parse(self, data: bytes) -> None:
        self._buffer += data
        while self._in_head:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                if len(self._buffer) > MAX_HEAD:
                    raise DisconnectedError("the answer's head has no end; is this an HTTP server?")
                return
            self._buffer = rest
            self._read_head(head)
        body, is_whole = self._read_body()
        if body:
            self._on_body(body)
        if is_whole and self._answer is not None and not self._answer.done():
            self._answer.set_result(None)

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if not words[0].startswith("HTTP/1.") or len(words) < 2 or not words[1].isdigit():
            raise DisconnectedError(f"the answer begins with {first[:60]!r}, which is not HTTP/1.1")
        status = int(words[1])
        if 100 <= status < 200:  # provisional; the answer's head comes next
            return
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self._keeps_alive = words[0] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self._left = 0 if self._chunked or status in (204, 304) else int(length) if length.isdigit() else None
        self._in_head = False
        self._on_head(status, headers)

    def _read_body(self) -> tuple[bytes, bool]:
        """What the buffer holds of the body, without the chunks' frames, and whether that was its end."""
        if self._chunked:
            return self._read_chunks()
        body = self._buffer if self._left is None else self._buffer[: self._left]
        self._buffer = b""
        if self._left is None:
            return body, False
        self._left -= len(body)
        return body, self._left == 0

    def _read_chunks(self) -> tuple[bytes, bool]:
        """RFC 9112, section 7.1. `_left` counts the chunk's bytes and the line end after them."""
        parts, buffer, at = [], self._buffer, 0
        is_whole = False
        left = self._left or 0
        while True:
            if left:
                part = buffer[at : at + left]
                at += len(part)
                parts.append(part[: max(0, left - 2)])
                left -= len(part)
                if left:
                    break
            end = buffer.find(b"\r\n", at)
            if end < 0:
                break
            size_text = buffer[at:end].partition(b";")[0].strip()
            try:
                size = int(size_text, 16)
                if size < 0:
                    raise ValueError
            except ValueError:
                raise DisconnectedError(f"a chunk has the size {size_text[:20]!r}; the stream is damaged") from None
            if size == 0:
                trailer_end = buffer.find(b"\r\n\r\n", end)  # no trailer: the two line ends are one after the other
                if trailer_end < 0:
                    break
                at, is_whole = trailer_end + 4, True
                break
            at, left = end + 2, size + 2
        self._buffer, self._left = buffer[at:], left
        return b"".join(parts), is_whole
