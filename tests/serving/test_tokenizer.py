"""Long texts are the business of a thread, and do not keep Python's lock from the engine's."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from atom.serving.tokenizer import Tokenizer

from .tiny_tokenizers import byte_level


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    made = Tokenizer(byte_level())
    yield made
    made.close()


def longest_wait(work: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """(seconds that the work takes, the longest that another thread and the event loop could not run meanwhile)."""
    waits: list[float] = []
    done = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            waits.append(now - last)
            last = now

    async def run() -> float:
        start = time.perf_counter()
        task = asyncio.ensure_future(work())
        last = start
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            waits.append(now - last)
            last = now
        task.result()
        return time.perf_counter() - start

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        seconds = asyncio.run(run())
    finally:
        done.set()
        thread.join()
    return seconds, max(waits)


def test_a_long_text_stops_nobody(tokenizer: Tokenizer) -> None:
    seconds, wait = longest_wait(lambda: tokenizer.encode("prompt", "so he said " * 100_000))
    assert seconds > 0.2, "too short to show anything"
    assert wait < 0.5 * seconds


def test_long_lists_of_tokens_stop_nobody(tokenizer: Tokenizer) -> None:
    tokens = [i % 250 for i in range(1_000_000)]
    seconds, wait = longest_wait(lambda: tokenizer.decode_long(tokens))
    assert seconds > 0.02, "too short to show anything"
    assert wait < 0.7 * seconds


def test_long_and_short_texts_have_the_same_tokens(tokenizer: Tokenizer) -> None:
    text = "he said: naïve 😀 <think> </s>"
    for add in (True, False):
        short = asyncio.run(tokenizer.encode("prompt", text, add))
        assert short == tokenizer.hf.encode(text, add_special_tokens=add)
        long = text * 200
        assert asyncio.run(tokenizer.encode("prompt", long, add)) == tokenizer.hf.encode(long, add_special_tokens=add)
    tokens = tokenizer.hf.encode(text * 3)
    assert asyncio.run(tokenizer.decode_long(tokens)) == tokenizer.decode(tokens)
