"""The asyncio side of the engine, without HTTP."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from atom.serving.errors import EngineDeadError, EngineDrainingError, InvalidRequestError, StepFailedError
from atom.serving.frontend import Frontend
from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.stream import Chunk

from .scripted import EOS, ScriptedRunner, ids_of, scripted_service

TEXT = "Hello there, é 😀."
Test = Callable[[Frontend], Awaitable[None]]


def on(test: Test, runner: ScriptedRunner | None = None) -> None:
    """Run a test on a front end of its own; afterwards nothing is left."""

    async def run() -> None:
        frontend = scripted_service(runner or ScriptedRunner(lambda request, index: TEXT)).frontend
        frontend.start()
        try:
            async with asyncio.timeout(20):
                await test(frontend)
                while frontend.engine.stats().used_blocks and frontend.engine.healthy:
                    await asyncio.sleep(0.002)
                assert frontend.num_open == 0
        finally:
            await frontend.close()

    asyncio.run(run())


def ask(name: str = "r", **params: object) -> Request:
    return Request(name, tuple(ids_of("hello")), SamplingParams(**({"max_tokens": 64} | params)), (EOS,))  # type: ignore[arg-type]


async def collect(frontend: Frontend, request: Request) -> list[Chunk]:
    return [chunk async for chunk in frontend.generate(request)]


def test_chunks_join_to_the_text() -> None:
    async def test(frontend: Frontend) -> None:
        chunks = await collect(frontend, ask())
        assert "".join(c.text for c in chunks) == TEXT
        assert [t for c in chunks for t in c.token_ids] == [*ids_of(TEXT), EOS]
        assert [c.finish_reason for c in chunks][-1] is FinishReason.STOP
        assert all(c.finish_reason is None for c in chunks[:-1])

    on(test)


def test_what_is_not_read_is_merged() -> None:
    async def test(frontend: Frontend) -> None:
        stream = frontend.open([ask(n=2, logprobs=1)])
        while frontend.engine.stats().running or frontend.engine.stats().waiting or frontend.num_open:
            await asyncio.sleep(0.002)
        chunks = [chunk async for chunk in stream]
        assert [(c.index, c.text, c.finish_reason) for c in chunks] == [(0, TEXT, "stop"), (1, TEXT, "stop")]
        for chunk in chunks:
            assert chunk.logprobs is not None
            assert [each.token_id for each in chunk.logprobs] == list(chunk.token_ids) == [*ids_of(TEXT), EOS]

    on(test)


def test_an_abort_keeps_what_was_not_read() -> None:
    async def test(frontend: Frontend) -> None:
        stream = frontend.open([ask("long", logprobs=1)])
        while stream.completion_tokens < 3:
            await asyncio.sleep(0.002)
        frontend.abort("long")
        while frontend.num_open:
            await asyncio.sleep(0.002)
        (chunk,) = [chunk async for chunk in stream]
        assert chunk.finish_reason is FinishReason.ABORT and len(chunk.token_ids) >= 3
        assert chunk.logprobs is not None
        assert [each.token_id for each in chunk.logprobs] == list(chunk.token_ids)

    on(test, ScriptedRunner(lambda request, index: "word " * 50, pause_s=0.01))


def test_tokens_may_come_several_at_once() -> None:
    async def test(frontend: Frontend) -> None:
        frontend.interval = 4
        chunks = await collect(frontend, ask(logprobs=0))
        assert [len(c.token_ids) for c in chunks][:3] == [1, 4, 4], "the first one waits for none"
        assert "".join(c.text for c in chunks) == TEXT
        assert [each.token_id for c in chunks for each in c.logprobs or ()] == [*ids_of(TEXT), EOS]
        assert sum(len(c.token_ids) for c in chunks) == len(ids_of(TEXT)) + 1
        assert {len(c.token_ids) for c in await collect(frontend, ask("s", stop=("never",)))} == {1}

    on(test, ScriptedRunner(lambda request, index: TEXT, pause_s=0.01))


def test_leaving_early_aborts() -> None:
    async def test(frontend: Frontend) -> None:
        async for _ in (chunks := frontend.generate(ask())):
            break
        await chunks.aclose()  # type: ignore[attr-defined]
        assert frontend.num_open == 0

    on(test, ScriptedRunner(lambda request, index: "word " * 50, pause_s=0.01))


def test_cancellation_aborts() -> None:
    async def test(frontend: Frontend) -> None:
        task = asyncio.create_task(collect(frontend, ask()))
        while not frontend.engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    on(test, ScriptedRunner(lambda request, index: "word " * 50, pause_s=0.01))


def test_a_stop_string_ends_the_sequence_in_the_engine() -> None:
    async def test(frontend: Frontend) -> None:
        chunks = await collect(frontend, ask(stop=("wor",), ignore_eos=True, max_tokens=500))
        assert "".join(c.text for c in chunks) == "a " and chunks[-1].stop_reason == "wor"
        await asyncio.sleep(0.05)
        assert frontend.engine.stats().num_output_tokens < 100

    on(test, ScriptedRunner(lambda request, index: "a word " * 50, pause_s=0.001))


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    runner = ScriptedRunner(lambda request, index: TEXT, faults=["injected"])

    async def test(frontend: Frontend) -> None:
        with pytest.raises(StepFailedError):
            await collect(frontend, ask())
        assert "".join(c.text for c in await collect(frontend, ask("again"))) == TEXT

    on(test, runner)


def test_a_dead_engine_reaches_every_waiter_and_the_callback() -> None:
    runner = ScriptedRunner(lambda request, index: TEXT, faults=["1", "2", "3"])

    async def test(frontend: Frontend) -> None:
        reasons: list[str] = []
        frontend.on_death = reasons.append
        runner.gate.clear()
        waiting = [asyncio.create_task(collect(frontend, ask(str(i)))) for i in range(80)]  # more than three steps hold
        await asyncio.sleep(0.05)
        runner.gate.set()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in ended} == {StepFailedError, EngineDeadError}
        while not reasons:
            await asyncio.sleep(0.002)
        assert len(reasons) == 1 and "3 steps in a row" in reasons[0]
        with pytest.raises(EngineDeadError):
            frontend.open([ask()])

    on(test, runner)


def test_drain_waits_refuses_and_then_aborts() -> None:
    runner = ScriptedRunner(lambda request, index: "word " * 40, pause_s=0.005)

    async def test(frontend: Frontend) -> None:
        short = asyncio.create_task(collect(frontend, ask("short", max_tokens=3)))
        long = asyncio.create_task(collect(frontend, ask("long", max_tokens=500, ignore_eos=True)))
        await asyncio.sleep(0.02)
        draining = asyncio.create_task(frontend.drain(0.2))
        await asyncio.sleep(0)
        with pytest.raises(EngineDrainingError):
            frontend.open([ask("late")])
        assert await draining is False
        assert (await short)[-1].finish_reason is FinishReason.LENGTH
        assert (await long)[-1].finish_reason is FinishReason.ABORT

    on(test, runner)


def test_drain_of_an_idle_server_is_over_at_once() -> None:
    async def test(frontend: Frontend) -> None:
        await collect(frontend, ask())
        assert await frontend.drain(5) is True

    on(test)


def test_several_requests_are_let_in_together_or_not_at_all() -> None:
    async def test(frontend: Frontend) -> None:
        with pytest.raises(InvalidRequestError, match="in use"):
            frontend.open([ask("same"), ask("same")])
        assert frontend.num_open == 0

    on(test)


def test_without_a_tokenizer_there_are_tokens_alone() -> None:
    async def test(frontend: Frontend) -> None:
        frontend.tokenizer.hf = None
        chunks = await collect(frontend, ask())
        assert [t for c in chunks for t in c.token_ids] == [*ids_of(TEXT), EOS] and {c.text for c in chunks} == {""}
        with pytest.raises(InvalidRequestError, match="stop_token_ids"):
            frontend.open([ask(stop=("x",))])

    on(test)
