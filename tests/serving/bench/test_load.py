"""The load generator against a server whose delays and failures are known."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from atom.serving.bench.arrivals import Arrivals
from atom.serving.bench.http_stream import OnBody, OnHead, StreamClient
from atom.serving.bench.lengths import Drawn, Fixed
from atom.serving.bench.load import Plan, Progress, run_load
from atom.serving.bench.sample import Sample
from atom.serving.bench.summary import summarize
from atom.serving.bench.target import Target, key_headers, send
from atom.serving.bench.workload import WorkItem

from .fake_server import Script, event, fake_server, token


def items(count: int, prompt: int = 3, output: int = 5) -> list[WorkItem]:
    return Drawn("test", Fixed(prompt, output)).items(count, 0)


def run(
    url: str,
    work: Sequence[WorkItem],
    due_s: Sequence[float] | None = None,
    max_concurrency: int | None = None,
    duration_s: float | None = None,
    timeout_s: float = 20.0,
    stop_after_s: float | None = None,
) -> Progress:
    """Run the load to its end, or until it is stopped."""
    target = Target(url, "fake", timeout_s=timeout_s)
    plan = Plan(
        work,
        lambda item: target.body([1] * item.prompt_tokens, item.output_tokens),
        due_s,
        max_concurrency,
        duration_s,
    )
    progress = Progress(len(work))

    async def main() -> None:
        stop = asyncio.Event()
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        async with StreamClient(url, key_headers()) as client:
            await run_load(plan, lambda body, sample, clock: send(client, target, body, sample, clock), progress, stop)

    asyncio.run(main())
    return progress


def test_times_agree_with_the_server_s_own_clock() -> None:
    """TTFT and TPOT against when the server really sent, and against the delays it was told to keep."""
    with fake_server(lambda i, body: Script(tokens=8, ttft=0.15 + 0.01 * i, gap=0.02)) as server:
        progress = run(server.url, items(12, output=8), max_concurrency=12)
    assert not progress.is_stopped and [s.error for s in progress.samples] == [None] * 12
    assert len(server.seen) == 12
    offset = progress.start
    by_first = sorted(server.seen, key=lambda seen: seen.sent_s[0])
    ttft, tpot = [], []
    for sample, seen in zip(sorted(progress.samples, key=lambda s: s.token_s[0]), by_first, strict=True):
        ttft.append(sample.token_s[0] - (seen.sent_s[0] - offset))
        true_tpot = (seen.sent_s[7] - seen.sent_s[0]) / 7
        assert sample.tpot_s is not None
        tpot.append(sample.tpot_s - true_tpot)
        assert sample.output_tokens == 8 and sample.prompt_tokens == 3 and sample.finish_reason == "length"
    assert min(ttft) > 0, "nothing arrives before it was sent"
    assert statistics.median(ttft) < 0.03
    assert abs(statistics.median(tpot)) < 0.003
    found = summarize(progress.samples)
    assert found.ttft is not None and found.tpot is not None
    assert found.ttft.p50 == pytest.approx(205, abs=60)  # delays of 150 ... 260 ms, and a busy machine's share
    assert found.tpot.p50 == pytest.approx(20, abs=10)
    assert found.counted_by == "usage" and found.output_tokens == 96 and found.peak_concurrency == 12


def test_open_loop_measures_from_the_intended_arrival() -> None:
    """A server with one slot of 50 ms, asked every 20 ms: the wait grows by 30 ms a request and must show.

    A client that waited for each answer before it sent the next request would report 50 ms throughout.
    """
    lock: list[asyncio.Lock] = []

    def behave(i: int, body: dict[str, Any]) -> Script:
        lock or lock.append(asyncio.Lock())
        return Script(tokens=1, ttft=0.05, queue=lock[0])

    with fake_server(behave) as server:
        due = [0.02 * i for i in range(20)]
        progress = run(server.url, items(20, output=1), due)
        ttft = [s.ttft_s for s in sorted(progress.samples, key=lambda s: s.index)]
        assert all(t is not None and t >= 0.03 * i + 0.045 for i, t in enumerate(ttft))
        lock.clear()
        capped = run(server.url, items(20, output=1), due, max_concurrency=1)
    waits = [s.ttft_s for s in sorted(capped.samples, key=lambda s: s.index)]
    assert all(t is not None and t >= 0.03 * i + 0.045 for i, t in enumerate(waits)), "the cap's queue counts too"
    lag = summarize(capped.samples).send_lag
    assert lag is not None and lag.p50 < 20, "waiting for the cap is not the client's lateness"


def test_closed_loop_keeps_its_concurrency() -> None:
    with fake_server(lambda i, body: Script(tokens=3, ttft=0.02, gap=0.01)) as server:
        progress = run(server.url, items(20), max_concurrency=4)
    found = summarize(progress.samples)
    assert (found.completed, found.peak_concurrency) == (20, 4)
    assert 2.5 < found.concurrency <= 4
    assert [s.index for s in progress.samples] == list(range(20)), "in the order of the workload"
    assert found.short == 20, "three tokens came where five were asked for"


def test_poisson_arrivals_are_sent_on_time() -> None:
    work = items(60, output=1)
    due = Arrivals(rate=100).times(work, seed=3)
    with fake_server(lambda i, body: Script(tokens=1)) as server:
        progress = run(server.url, work, due)
    found = summarize(progress.samples)
    assert found.completed == 60 and found.send_lag is not None
    assert found.send_lag.p50 < 20 and found.send_lag.min >= 0
    assert [s.due_s for s in progress.samples] == due


CUT = [(0.0, token()), (0.0, b'data: {"choices": [{"te')]
FAILURES: list[tuple[Script, str, str]] = [
    (Script(status=503, content_type="application/json"), "http 503", ""),
    (Script(reset=2), "disconnect", ""),
    (Script(events=CUT), "disconnect", "the stream ended before the answer did"),
    (Script(events=[(0.0, token())]), "disconnect", "the stream ended before the answer did"),
    (Script(events=[(0.0, b"data: {nonsense\n\n")]), "malformed", "an event is not JSON"),
    (Script(events=[(0.0, b"data: 5\n\n")]), "malformed", "no JSON object"),
    (Script(events=[(0.0, event({"choices": [{"no": "text"}]}))]), "malformed", "unknown shape"),
    (Script(content_type="text/html"), "malformed", "text/html, not an event stream"),
    (Script(events=[(0.0, token()), (0.0, event({"error": {"message": "boom"}}))]), "server error", "boom"),
    (Script(tokens=0), "empty", "no tokens"),
    (Script(ttft=5.0), "timeout", "within 0.6 s"),
]


def test_every_failure_is_counted_by_its_kind() -> None:
    """One request of each kind among good ones; none is dropped, none counts as an answer."""
    scripts = [script for script, _, _ in FAILURES]

    def behave(i: int, body: dict[str, Any]) -> Script:
        return scripts[len(body["prompt"]) - 10] if len(body["prompt"]) >= 10 else Script()

    work = [item for i in range(len(scripts)) for item in (*items(1, prompt=10 + i), *items(1))]
    with fake_server(behave) as server:
        progress = run(server.url, work, max_concurrency=4, timeout_s=0.6)
    by_index = sorted(progress.samples, key=lambda s: s.index)
    assert len(by_index) == 2 * len(scripts)
    for sample, (_, kind, message) in zip(by_index[::2], FAILURES, strict=True):
        assert sample.error == kind, sample.message
        assert message in sample.message and sample.end_s > sample.sent_s
    assert all(s.is_good for s in by_index[1::2])
    found = summarize(progress.samples)
    assert found.completed == len(scripts) and sum(found.errors.values()) == len(scripts)
    assert found.output_tokens == 5 * len(scripts), "tokens of failed answers do not count"
    assert found.errors["disconnect"] == 3 and found.errors["malformed"] == 4


def test_no_server() -> None:
    progress = run("http://127.0.0.1:9", items(3), max_concurrency=2)
    assert [s.error for s in progress.samples] == ["connect"] * 3


class Replay(StreamClient):
    """An answer whose pieces arrive at known times of a clock of its own: seconds to wait, bytes."""

    def __init__(self, pieces: Sequence[tuple[float, bytes]]) -> None:
        super().__init__("http://replay")
        self.pieces = pieces
        self.now_s = 0.0

    async def post(self, path: str, body: bytes, on_head: OnHead, on_body: OnBody) -> None:
        on_head(200, {"content-type": "text/event-stream"})
        for wait_s, data in self.pieces:
            self.now_s += wait_s
            on_body(data)


def test_stall_in_the_middle_shows_in_itl_and_not_in_ttft() -> None:
    done = b"data: [DONE]\n\n"
    client = Replay([(0.1, token()), (0.3, token()), (0.02, token(finish="length")), (0.0, done)])
    sample = Sample(0, asked_prompt=3, asked_output=3, due_s=0.0)
    asyncio.run(send(client, Target("http://replay", "fake"), b"{}", sample, lambda: client.now_s))
    found = summarize([sample])
    assert found.itl is not None and found.ttft is not None
    assert found.itl.max == pytest.approx(300) and found.ttft.p50 == pytest.approx(100)
    assert found.counted_by == "deltas" and found.output_tokens == 3


def test_stopping_keeps_what_was_measured() -> None:
    """Ctrl-C sets `stop`: answers so far stay, what is under way is noted as interrupted, the rest is not sent."""
    with fake_server(lambda i, body: Script(tokens=2, ttft=0.01) if i < 4 else Script(ttft=30.0)) as server:
        start = time.perf_counter()
        progress = run(server.url, items(50), max_concurrency=4, stop_after_s=1.0)
    assert time.perf_counter() - start < 10
    assert progress.is_stopped and progress.running == 0
    errors = [s.error for s in progress.samples]
    assert errors.count(None) == 4 and errors.count("interrupted") == 4 and len(errors) == 8
    assert summarize(progress.samples).errors == {"interrupted": 4}


def test_duration_ends_the_sending_and_not_the_answers() -> None:
    with fake_server(lambda i, body: Script(tokens=2, ttft=0.2)) as server:
        closed = run(server.url, items(500), max_concurrency=2, duration_s=0.5)
        opened = run(server.url, items(500), [0.1 * i for i in range(500)], duration_s=0.35)
    assert 2 <= len(closed.samples) <= 8 and all(s.is_good for s in closed.samples)
    assert len(opened.samples) == 4 and all(s.is_good for s in opened.samples)
    assert not closed.is_stopped


def test_a_busy_client_is_seen() -> None:
    """Something that holds the event loop for 60 ms shows in the lags."""
    with fake_server(lambda i, body: Script(tokens=2, ttft=0.3)) as server:
        target = Target(server.url, "fake")
        plan = Plan(items(1), lambda item: target.body([1], 2), max_concurrency=1)
        progress = Progress(1)

        async def slow(body: bytes, sample: Sample, clock: Callable[[], float]) -> None:
            async with StreamClient(server.url) as client:
                asyncio.get_running_loop().call_later(0.05, time.sleep, 0.06)
                await send(client, target, body, sample, clock)

        asyncio.run(run_load(plan, slow, progress, asyncio.Event()))
    found = summarize(progress.samples, loop_lags_s=progress.loop_lags_s)
    assert found.loop_lag is not None and found.loop_lag.max >= 40


def test_an_error_in_making_bodies_is_raised() -> None:
    def fail(item: WorkItem) -> bytes:
        raise ValueError("no tokenizer")

    async def never(body: bytes, sample: Sample, clock: Callable[[], float]) -> None:
        raise AssertionError

    for due in (None, [0.0, 0.0]):
        with pytest.raises(ValueError, match="no tokenizer"):
            asyncio.run(run_load(Plan(items(2), fail, due, 1), never, Progress(2), asyncio.Event()))


def test_plans_that_cannot_run() -> None:
    with pytest.raises(ValueError, match="needs a number of requests under way"):
        Plan(items(1), lambda item: b"")
    with pytest.raises(ValueError, match="1 items have 2 arrival times"):
        Plan(items(1), lambda item: b"", [0.0, 1.0])


def test_bodies_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with fake_server(lambda i, body: Script()) as server:
        run(server.url, items(1, prompt=4, output=9), max_concurrency=1)
    (seen,) = server.seen
    assert seen.body["prompt"] == [1, 1, 1, 1] and seen.body["max_tokens"] == 9
    assert seen.body["ignore_eos"] is True and seen.body["stream_options"] == {"include_usage": True}
    assert server.headers[0]["authorization"] == "Bearer secret"
