"""The engine on the fake model: outputs, refusals, aborts, faults, the end."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from atom.serving.engine import MAX_FAILURES, Engine
from atom.serving.errors import EngineDeadError, EngineDrainingError, InvalidRequestError, QueueFullError
from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler
from atom.serving.sequence import Output

from .fake_runner import VOCAB, expected_output
from .fake_step_runner import FakeStepRunner, small_config

WAIT_S = 20.0  # far more than anything here takes


class Running:
    """An engine that runs, and what it said."""

    def __init__(self, depth: int = 2, watchdog_s: float | None = None, **limits: int | bool) -> None:
        self.config = small_config(**limits)
        self.runner = FakeStepRunner(self.config, depth)
        self.scheduler = Scheduler(self.config)
        self.engine = Engine(self.runner, self.scheduler, watchdog_s)
        self.news = threading.Condition()
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.deaths: list[str] = []
        self.engine.start(self.take, self.deaths.append)

    def take(self, outputs: Sequence[Output]) -> None:
        with self.news:
            for output in outputs:
                key = output.request_id, output.index
                assert key not in self.ends, "an output after the last"
                self.tokens.setdefault(key, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    self.ends[key] = output.finish_reason
            self.news.notify_all()

    def wait(self, *keys: tuple[str, int]) -> None:
        with self.news:
            assert self.news.wait_for(lambda: all(key in self.ends for key in keys), WAIT_S), "an output never came"

    def close(self) -> None:
        self.runner.gate.set()
        self.engine.shutdown()
        assert not self.engine._thread.is_alive()
        if self.engine.error is None:
            self.scheduler.check()
            assert self.scheduler.blocks.num_used == 0 and not self.scheduler.has_unfinished
            assert self.engine.stats().waiting == 0
        assert not self.engine._live


@pytest.fixture
def running() -> Iterator[Any]:
    made: list[Running] = []

    def make(*args: Any, **kwargs: Any) -> Running:
        made.append(Running(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def request(name: str, length: int = 6, max_tokens: int = 5, **params: Any) -> Request:
    prompt = tuple((ord(name[0]) * 7 + i * i) % VOCAB for i in range(length))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_outputs_are_those_of_each_request_alone(running: Any, depth: int) -> None:
    run = running(depth)
    asked = [request(f"{chr(97 + i)}", length=1 + 3 * i, max_tokens=1 + i, n=1 + i % 3) for i in range(12)]
    for each in asked:
        run.engine.submit(each)
    keys = [(each.request_id, index) for each in asked for index in range(each.params.n)]
    run.wait(*keys)
    for each in asked:
        for index in range(each.params.n):
            assert run.tokens[each.request_id, index] == expected_output(each, index, each.max_tokens(run.config))
            assert run.ends[each.request_id, index] is FinishReason.LENGTH
    assert run.runner.deepest == depth  # work did overlap, as far as allowed
    assert run.engine.stats().num_finished == len(keys)


def test_refusals_come_at_once_while_a_step_runs(running: Any) -> None:
    run = running(depth=1, max_waiting_requests=2)
    run.runner.gate.clear()
    run.engine.submit(request("a", max_tokens=3))
    assert run.runner.launched.acquire(timeout=WAIT_S)
    with pytest.raises(InvalidRequestError, match="the vocabulary ends at"):
        run.engine.submit(Request("z", (VOCAB,)))
    with pytest.raises(InvalidRequestError, match="in use"):
        run.engine.submit(request("a"))
    run.engine.submit(request("b"))
    run.engine.submit(request("c"))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        run.engine.submit(request("d"))
    assert run.engine.stats().waiting_new == 2
    assert run.engine.stats().waiting_tokens == 12
    run.runner.gate.set()
    run.wait(("a", 0), ("b", 0), ("c", 0))
    run.engine.submit(request("d"))  # there is room again
    run.wait(("d", 0))


def test_abort_and_stop(running: Any) -> None:
    run = running(max_num_seqs=1)
    run.runner.gate.clear()
    run.engine.submit(request("a", max_tokens=50))
    assert run.runner.launched.acquire(timeout=WAIT_S)
    run.engine.submit(request("b"))
    run.engine.submit(request("c", n=2))
    run.engine.submit(request("d"))
    run.engine.abort("b")  # not even known to the scheduler yet
    run.engine.abort("b")
    run.engine.abort("nobody")
    run.engine.stop("c", 1)
    run.engine.stop("c", 7)
    run.engine.abort("a")  # its step is under way
    run.runner.gate.set()
    run.wait(("a", 0), ("b", 0), ("c", 0), ("c", 1), ("d", 0))
    run.engine.abort("d")  # has ended
    assert run.ends["a", 0] is run.ends["b", 0] is FinishReason.ABORT
    assert run.ends["c", 1] is FinishReason.STOP
    assert run.ends["c", 0] is run.ends["d", 0] is FinishReason.LENGTH
    run.engine.submit(request("a"))  # the name is free again
    with run.news:
        run.ends.clear()
        run.tokens.clear()
    run.wait(("a", 0))


@pytest.mark.parametrize("where", ["fails_in_launch", "fails_in_result"])
def test_a_failing_step_ends_what_ran_and_spares_what_waits(running: Any, where: str) -> None:
    run = running(max_num_seqs=2)
    setattr(run.runner, where, lambda step: any(e.sequence.request.request_id == "poison" for e in step.entries))
    run.runner.gate.clear()
    run.engine.submit(request("a", max_tokens=40))
    run.engine.submit(request("poison"))
    run.engine.submit(request("b"))
    run.runner.gate.set()
    run.wait(("a", 0), ("poison", 0), ("b", 0))
    assert run.ends["poison", 0] is FinishReason.ERROR and run.ends["b", 0] is FinishReason.LENGTH
    assert run.tokens["b", 0] == expected_output(request("b"), 0, 5)
    assert run.engine.healthy and run.engine.stats().num_failures == 1 and run.runner.resets == 1


def test_repeated_failures_kill_and_say_so(running: Any) -> None:
    run = running(max_num_seqs=1)
    run.runner.fails_in_result = lambda step: True
    run.runner.gate.clear()
    for i in range(MAX_FAILURES + 2):
        run.engine.submit(request(f"{i}"))
    run.runner.gate.set()
    run.wait(*((f"{i}", 0) for i in range(MAX_FAILURES + 2)))
    assert set(run.ends.values()) == {FinishReason.ERROR}
    run.engine._thread.join(WAIT_S)
    assert not run.engine.healthy and run.deaths == [run.engine.error]
    assert "3 steps in a row failed" in run.deaths[0]
    with pytest.raises(EngineDeadError, match="restart the server"):
        run.engine.submit(request("late"))
    run.engine.abort("late")
    assert run.engine.drain(1.0) is False


def test_a_lost_device_kills_at_once(running: Any) -> None:
    run = running()
    run.runner.fails_in_launch = lambda step: True
    run.runner.fails_in_reset = True
    run.engine.submit(request("a"))
    run.wait(("a", 0))
    run.engine._thread.join(WAIT_S)
    assert run.ends["a", 0] is FinishReason.ERROR and "the device is lost" in run.deaths[0]


def test_a_stuck_step_is_reported_to_everyone(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = running(watchdog_s=0.2)
    run.runner.gate.clear()
    run.engine.submit(request("a", n=2))
    run.wait(("a", 0), ("a", 1))
    assert set(run.ends.values()) == {FinishReason.ERROR}
    assert not run.engine.healthy and "has not ended after 0.2 s" in run.engine.error
    assert "self.runner.gate.wait()" in caplog.text  # where it is stuck
    with pytest.raises(EngineDeadError):
        run.engine.submit(request("b"))
    run.runner.gate.set()  # the step comes back after all: nobody hears of it
    run.engine._thread.join(WAIT_S)
    assert not run.engine._thread.is_alive() and "the engine's thread ends" not in caplog.text  # in peace


def test_a_slow_but_steady_engine_is_not_stuck(running: Any) -> None:
    run = running(depth=1, watchdog_s=0.4)
    run.runner.fails_in_result = lambda step: bool(time.sleep(0.05))
    run.engine.submit(request("a", max_tokens=16))
    run.wait(("a", 0))
    assert run.engine.healthy and run.ends["a", 0] is FinishReason.LENGTH


def test_drain_lets_everyone_finish_and_nobody_in(running: Any) -> None:
    run = running()
    for name in "abcdef":
        run.engine.submit(request(name, max_tokens=20))
    assert run.engine.drain(WAIT_S) is True
    assert set(run.ends.values()) == {FinishReason.LENGTH} and len(run.ends) == 6
    with pytest.raises(EngineDrainingError, match="shutting down"):
        run.engine.submit(request("g"))


def test_drain_aborts_at_its_deadline(running: Any) -> None:
    run = running()
    run.runner.gate.clear()
    run.engine.submit(request("a", max_tokens=50))
    assert run.runner.launched.acquire(timeout=WAIT_S)
    threading.Timer(0.2, run.runner.gate.set).start()
    run.runner.fails_in_result = lambda step: bool(time.sleep(0.02))
    assert run.engine.drain(0.1) is False
    assert run.ends["a", 0] is FinishReason.ABORT


def test_shutdown_answers_everyone(running: Any) -> None:
    run = running(max_num_seqs=1)
    run.runner.gate.clear()
    run.engine.submit(request("a", max_tokens=50))
    assert run.runner.launched.acquire(timeout=WAIT_S)
    run.engine.submit(request("b"))
    threading.Timer(0.1, run.runner.gate.set).start()
    run.engine.shutdown()
    run.engine.shutdown()
    assert run.ends == {("a", 0): FinishReason.ABORT, ("b", 0): FinishReason.ABORT}
    assert not run.engine.healthy


def test_before_start_and_without_start() -> None:
    engine = Engine(FakeStepRunner(small_config()), Scheduler(small_config()))
    assert not engine.healthy
    with pytest.raises(EngineDeadError, match="start"):
        engine.submit(request("a"))
    engine.shutdown()


def test_a_listener_that_raises_kills_the_engine() -> None:
    """Its clients would wait for ever."""
    deaths: list[str] = []

    def listen(outputs: Sequence[Output]) -> None:
        raise RuntimeError("cannot take this")

    engine = Engine(FakeStepRunner(small_config()), Scheduler(small_config()))
    engine.start(listen, deaths.append)
    engine.submit(request("a"))
    engine._thread.join(WAIT_S)
    assert not engine.healthy and "cannot take this" in deaths[0]
    engine.shutdown()
