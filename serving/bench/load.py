"""The load generator: sends planned requests when they are due and returns one sample for each that was sent.

Everything that takes time is done beforehand: bodies are made by a thread that stays ahead of the clock. What is left
is measured: a task that asks to be woken every 10 ms records how late that happens, so that a busy client is seen.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from .sample import Sample
from .workload import WorkItem

AHEAD = 512  # bodies made before they are due
BATCH = 16  # bodies that the thread makes at a time
LAG_PERIOD_S = 0.01

Send = Callable[[bytes, Sample, Callable[[], float]], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """What to send.

    due_s        when each item arrives, seconds from the start; None: a closed loop
    max_concurrency   requests under way at once, None for no limit (an open loop only)
    duration_s   nothing new is sent after it; what is under way may end
    """

    items: Sequence[WorkItem]
    make_body: Callable[[WorkItem], bytes]
    due_s: Sequence[float] | None = None
    max_concurrency: int | None = None
    duration_s: float | None = None

    def __post_init__(self) -> None:
        if self.due_s is None and self.max_concurrency is None:
            raise ValueError("a closed loop needs a number of requests under way; give max_concurrency")
        if self.due_s is not None and len(self.due_s) != len(self.items):
            raise ValueError(f"{len(self.items)} items have {len(self.due_s)} arrival times; give each one its own")


@dataclass
class Progress:
    """The state of a run, for whoever watches it; `samples` holds every request that was sent."""

    total: int
    samples: list[Sample] = field(default_factory=list)
    running: int = 0
    done: int = 0
    errors: int = 0
    start: float = 0.0
    loop_lags_s: list[float] = field(default_factory=list)
    is_stopped: bool = False  # before all was sent and answered

    def now_s(self) -> float:
        return time.perf_counter() - self.start


async def run_load(plan: Plan, send: Send, progress: Progress, stop: asyncio.Event) -> None:
    """Run the plan; `progress` has the samples, also while it runs.

    `stop`, once set, ends the run at once: nothing more is sent, what is under way is cancelled and its samples say
    so, and `progress.is_stopped` is set. An error of make_body is raised.
    """
    run = _Run(plan, send, progress)
    await run.prepare()
    work = asyncio.create_task(run.closed() if plan.due_s is None else run.open(plan.due_s))
    helpers = [asyncio.create_task(stop.wait()), asyncio.create_task(_measure_lag(progress))]
    try:
        await asyncio.wait((work, helpers[0]), return_when=asyncio.FIRST_COMPLETED)
        progress.is_stopped = not work.done()
    finally:
        for task in (work, *helpers):
            task.cancel()
        await asyncio.gather(work, *helpers, return_exceptions=True)
        await run.close()
    if not work.cancelled() and isinstance(error := work.exception(), BaseExceptionGroup):
        raise error.exceptions[0]


async def _measure_lag(progress: Progress) -> None:
    while True:
        wanted = time.perf_counter() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        progress.loop_lags_s.append(time.perf_counter() - wanted)


def _make_all(make: Callable[[WorkItem], bytes], items: Sequence[WorkItem]) -> list[bytes]:
    return [make(item) for item in items]


class _Run:
    """One run under way: the queue of bodies ahead of it, and the two ways of sending them."""

    def __init__(self, plan: Plan, send: Send, progress: Progress) -> None:
        self._plan = plan
        self._send = send
        self._progress = progress
        self._bodies: asyncio.Queue[bytes | Exception] = asyncio.Queue(AHEAD)
        self._slots = None if plan.max_concurrency is None else asyncio.Semaphore(plan.max_concurrency)
        self._next = 0
        self._maker: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        """Make the first bodies, then start the clock."""
        self._maker = asyncio.create_task(self._make_bodies())
        while not (self._bodies.full() or self._maker.done()):
            await asyncio.sleep(0.005)
        self._progress.start = time.perf_counter()

    async def close(self) -> None:
        if self._maker is not None:
            self._maker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._maker

    async def _make_bodies(self) -> None:
        items, make = self._plan.items, self._plan.make_body
        for first in range(0, len(items), BATCH):
            try:
                made = await asyncio.to_thread(_make_all, make, items[first : first + BATCH])
            except Exception as error:
                return await self._bodies.put(error)
            for body in made:
                await self._bodies.put(body)
        return None

    async def _take(self) -> bytes:
        body = await self._bodies.get()
        if isinstance(body, Exception):
            raise body
        return body

    def _is_over(self, due_s: float) -> bool:
        return self._plan.duration_s is not None and due_s > self._plan.duration_s

    async def closed(self) -> None:
        """As many loops as requests may be under way: each sends the next one when its last has ended."""
        assert self._plan.max_concurrency is not None
        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._plan.max_concurrency, len(self._plan.items))):
                group.create_task(self._loop())

    async def _loop(self) -> None:
        while self._next < len(self._plan.items) and not self._is_over(due := self._progress.now_s()):
            index, self._next = self._next, self._next + 1
            body = await self._take()
            await self._one(index, body, due)

    async def open(self, due_s: Sequence[float]) -> None:
        """Each request at its time, whatever became of the others; the limit on concurrency, if any, makes it wait."""
        async with asyncio.TaskGroup() as group:
            for index, due in enumerate(due_s):
                if self._is_over(due):
                    break
                body = await self._take()
                if (wait := due - self._progress.now_s()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._one(index, body, due))

    async def _one(self, index: int, body: bytes, due: float) -> None:
        progress, item = self._progress, self._plan.items[index]
        sample = Sample(index, item.prompt_tokens, item.output_tokens, due, free_s=due)
        progress.samples.append(sample)
        progress.running += 1
        try:
            if self._slots is None or self._plan.due_s is None:
                await self._send(body, sample, progress.now_s)
            else:
                is_held = self._slots.locked()
                async with self._slots:
                    sample.free_s = progress.now_s() if is_held else due
                    await self._send(body, sample, progress.now_s)
        except asyncio.CancelledError:
            sample.error, sample.end_s = sample.error or "interrupted", sample.end_s or progress.now_s()
            raise
        finally:
            progress.running -= 1
            progress.done += 1
            progress.errors += not sample.is_good
