"""Aborts, stop strings, failed steps, faulty tokens and refusals: what they end, and that nothing is left behind."""

import pytest

from atom.serving.errors import InvalidRequestError, QueueFullError
from atom.serving.request import FinishReason
from atom.serving.result import FAULTY, StepResult

from .fake_runner import expected_output
from .one_scheduler import engine, request


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", range(9))
def test_abort_at_every_stage(steps: int, depth: int) -> None:
    """Waiting, in chunks, between them, decoding, with tokens under way, at the last step, after it, and twice."""
    run = engine(depth)
    run.add(request("a", length=40, max_tokens=3, n=2))
    run.add(request("b"))
    for _ in range(steps):
        run.advance()
    unfinished = [key for key in run.outputs if key[0] == "a" and not (key in run.last and run.last[key].finish_reason)]
    ended = run.scheduler.abort("a")
    assert [(o.request_id, o.index) for o in ended] == unfinished
    assert all(o.finish_reason is FinishReason.ABORT and o.token_ids == () for o in ended)
    run.take(ended)
    assert run.scheduler.abort("a") == [] and run.scheduler.abort("unknown") == []
    run.scheduler.check()
    run.finish()
    assert run.outputs["b", 0] == expected_output(request("b"), 0, 5)
    run.assert_idle()


def test_a_stop_string_ends_one_sample() -> None:
    run = engine(2)
    asked = request("a", max_tokens=10, n=2)
    run.add(asked)
    while len(run.outputs["a", 1]) < 3:
        run.advance()
    run.take(run.scheduler.stop("a", 1))
    assert run.scheduler.stop("a", 1) == [] == run.scheduler.stop("unknown", 0)
    run.finish()
    assert run.last["a", 1].finish_reason is FinishReason.STOP and len(run.outputs["a", 1]) == 3
    assert run.outputs["a", 0] == expected_output(asked, 0, 10)
    run.assert_idle()


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_failed_step_ends_what_ran_and_spares_what_waits(steps: int) -> None:
    run = engine(2, max_num_seqs=2)
    for name in "abcd":
        run.add(request(name))
    for _ in range(steps):
        run.advance()
    run.launch()
    ended = run.scheduler.fail()
    run.take(ended)
    assert ended and all(o.finish_reason is FinishReason.ERROR for o in ended)
    run.scheduler.check()
    assert run.scheduler.stats().used_blocks == run.scheduler.stats().cached_blocks == run.scheduler.in_flight == 0
    while run.results:  # a runner that hands back what is forgotten does no harm
        step, result = run.results.popleft()
        assert run.scheduler.update(step, result) == []
    run.finish()
    for name in "abcd":
        if run.last[name, 0].finish_reason is not FinishReason.ERROR:
            assert run.outputs[name, 0] == expected_output(request(name), 0, 5)
    assert run.last["d", 0].finish_reason is FinishReason.LENGTH
    run.assert_idle()


def test_a_preempted_sequence_whose_token_is_lost_ends_too() -> None:
    run = engine(2, num_blocks=6, watermark=0.0)
    run.add(request("a", length=8, max_tokens=12))
    run.add(request("b", length=8, max_tokens=12))
    run.launch()
    while not run.scheduler.stats().num_preemptions:  # with a step always under way
        run.launch()
        if not run.scheduler.stats().num_preemptions:
            run.deliver()
    (waiting,) = run.scheduler._waiting
    assert waiting.pending
    assert {o.request_id for o in run.scheduler.fail()} == {"a", "b"}
    run.results.clear()
    run.finish()
    run.assert_idle()


def test_a_forgotten_step_is_ignored_after_new_ones_too() -> None:
    run = engine(2)
    run.add(request("a"))
    run.launch()
    run.take(run.scheduler.fail())
    run.add(request("b"))
    run.launch()
    run.finish()
    assert run.outputs["a", 0] == [] and run.outputs["b", 0] == expected_output(request("b"), 0, 5)


def test_queue_limits() -> None:
    run = engine(max_waiting_requests=2, max_waiting_tokens=20)
    run.add(request("large", length=40))  # finds the queue empty
    with pytest.raises(QueueFullError, match="40 prompt tokens wait already, at most 20 may, got 6 more; try again"):
        run.add(request("a"))
    run.advance()
    run.add(request("a"))
    with pytest.raises(QueueFullError, match="6 prompt tokens wait already, at most 20 may, got 15 more"):
        run.add(request("b", length=15))
    run.add(request("b", length=14))
    with pytest.raises(QueueFullError, match="2 requests wait already, at most 2 may; try again"):
        run.add(request("c", length=1))
    run.scheduler.abort("b")
    run.add(request("c", length=1))
    run.finish()
    run.assert_idle()


def test_refusals_leave_nothing_behind() -> None:
    run = engine()
    with pytest.raises(InvalidRequestError, match="max_tokens must be at most 58") as caught:
        run.scheduler.add(request("a", max_tokens=59))
    assert caught.value.field == "max_tokens"
    run.assert_idle()
    run.add(request("a"))
    with pytest.raises(InvalidRequestError, match="request_id 'a' is in use"):
        run.scheduler.add(request("a"))
    run.finish()
    run.add(request("a"))  # free again
    run.finish()
    run.assert_idle()


def test_the_longest_request_that_is_admitted_fills_the_cache_exactly() -> None:
    run = engine(num_blocks=4, max_num_batched_tokens=4)
    asked = request("a", length=10, max_tokens=7)
    run.add(asked)
    run.finish()
    assert run.outputs["a", 0] == expected_output(asked, 0, 7)
    run.assert_idle()


def test_steps_come_back_in_order() -> None:
    run = engine()
    run.add(request("a"))
    run.launch()
    run.launch()
    with pytest.raises(AssertionError, match="in the order in which they were scheduled"):
        run.scheduler.update(*run.results[1])


def test_a_faulty_token_ends_its_sequence_alone() -> None:
    run = engine(depth=2)
    run.add(request("a"))
    run.add(request("b"))
    run.launch()
    run.launch()
    step, result = run.results.popleft()
    run.take(run.scheduler.update(step, StepResult([FAULTY, result.token_ids[1]])))
    run.finish()
    assert run.outputs["a", 0] == [] and run.last["a", 0].finish_reason is FinishReason.ERROR
    assert run.outputs["b", 0] == expected_output(request("b"), 0, 5)
    run.assert_idle()
