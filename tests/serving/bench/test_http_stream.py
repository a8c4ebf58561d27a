"""The HTTP client against raw bytes, cut at every place; and events likewise."""

import asyncio
from collections.abc import Mapping

import pytest

from atom.serving.bench.http_stream import ConnectFailedError, DisconnectedError, StreamClient
from atom.serving.bench.sse import EventReader

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
ANSWERS: list[tuple[bytes, bytes]] = [
    (CHUNKED + b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\n\r\n", b"hello world"),
    (CHUNKED + b"5\r\nhe\r\nl\r\n0\r\nTrailer: x\r\n\r\n", b"he\r\nl"),
    (CHUNKED + b"0\r\n\r\n", b""),
    (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", b"hello"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", b"ok"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
]


async def _ask(answers: list[bytes], step: int, close: bool = False, requests: int = 1) -> tuple[list[object], int]:
    """What the client makes of each raw answer, sent `step` bytes at a time; and how many connections it made."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while answers:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert await reader.readexactly(length) == b"{}"
            answer = answers.pop(0)
            for at in range(0, len(answer), step):
                writer.write(answer[at : at + step])
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    found: list[object] = []
    async with server, StreamClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        for _ in range(requests):
            got: list[bytes] = []
            heads: list[tuple[int, Mapping[str, str]]] = []
            try:
                await client.post("/x", b"{}", lambda s, h, heads=heads: heads.append((s, h)), got.append)  # type: ignore[misc]
                found.append((heads[0][0], b"".join(got)))
            except ConnectionError as error:
                found.append(error)
    return found, connections


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize(("raw", "body"), ANSWERS)
def test_answers_wherever_they_are_cut(raw: bytes, body: bytes, step: int) -> None:
    status = 204 if b"204" in raw else 200
    found, connections = asyncio.run(_ask([raw, raw], step, requests=2))
    assert found == [(status, body)] * 2 and connections == 1, "the connection is used again"


def test_a_body_that_ends_with_the_connection() -> None:
    found, _ = asyncio.run(_ask([b"HTTP/1.1 200 OK\r\n\r\nall of it"], 4, close=True))
    assert found == [(200, b"all of it")]


@pytest.mark.parametrize("header", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n"])
def test_connections_that_are_not_kept(header: bytes) -> None:
    raw = header + b"content-length: 2\r\n\r\nok"
    found, connections = asyncio.run(_ask([raw, raw], 100, requests=2))
    assert found == [(200, b"ok")] * 2 and connections == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-le", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", "closed the connection"),
        (CHUNKED + b"5\r\nhel", "closed the connection"),
        (CHUNKED + b"5\r\nhello\r\n", "closed the connection"),
        (CHUNKED + b"zz\r\nhello\r\n", "a chunk has the size b'zz'"),
        (CHUNKED + b"-5\r\nhello\r\n", "a chunk has the size b'-5'"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "which is not HTTP/1.1"),
        (b"x" * 70000, "head has no end"),
    ],
)
def test_broken_answers(raw: bytes, message: str) -> None:
    (found,), _ = asyncio.run(_ask([raw], 10_000, close=True))
    assert isinstance(found, DisconnectedError) and message in str(found)


def test_nobody_listens() -> None:
    async def ask() -> None:
        async with StreamClient("http://127.0.0.1:9") as client:
            await client.post("/x", b"{}", lambda status, headers: None, lambda data: None)

    with pytest.raises(ConnectFailedError, match=r"cannot connect to 127\.0\.0\.1:9"):
        asyncio.run(ask())


EVENTS = b': ping\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\n\n\ndata: [DONE]\r\n\r\n'


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_events_wherever_they_are_cut(step: int) -> None:
    reader = EventReader()
    found = [event for at in range(0, len(EVENTS), step) for event in reader.feed(EVENTS[at : at + step])]
    assert found == [b'{"a": 1}', b"two\nlines", b"[DONE]"] and reader.is_between_events


def test_carriage_returns_alone_end_lines() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\r\rdata: b\r") == [b"a"] and not reader.is_between_events
    assert reader.feed(b"\rx") == [b"b"]
