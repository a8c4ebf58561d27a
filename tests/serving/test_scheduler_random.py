"""The scheduler under random operations: every output is the one its request has alone, and nothing is left behind."""

from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from atom.serving.config import SchedulerConfig
from atom.serving.errors import InvalidRequestError, QueueFullError
from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler

from .fake_runner import VOCAB, FakeEngine, expected_output

SIZE = 2
prompts = st.builds(lambda a, b: (1,) * a + (2,) * b, st.integers(1, 10), st.integers(0, 4))  # many common prefixes
picks = st.integers(0, 31)
configs = st.builds(
    lambda blocks, seqs, tokens, cache, watermark, growth, drafts, interval, crowd: SchedulerConfig(
        vocab_size=VOCAB,
        max_model_len=24,
        num_blocks=blocks,
        block_size=SIZE,
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + tokens,
        prefix_cache=cache,
        watermark=watermark,
        growth_blocks=growth,
        admission_interval=interval,
        admission_crowd=crowd,
        patience_steps=4,
        max_waiting_requests=12,
        max_waiting_tokens=100,
        num_speculative_tokens=drafts,
        prompt_lookup_min=1,
    ),
    st.integers(5, 14),
    st.integers(1, 5),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 2),
    st.sampled_from([0, 0, 1, 4]),
    st.integers(1, 4),
    st.integers(1, 3),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Clients come, leave and fail at random, while steps are launched and come back with a random delay."""

    @initialize(config=configs, depth=st.integers(1, 3))
    def start(self, config: SchedulerConfig, depth: int) -> None:
        self.run = FakeEngine(Scheduler(config), depth)
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.prompts: dict[tuple[str, int], tuple[int, ...]] = {}  # whose logprobs are wanted
        self.requests = 0

    def pick(self, number: int) -> tuple[str, int]:
        keys = sorted(self.expected)
        return keys[number % len(keys)]

    @rule(
        prompt=prompts,
        max_tokens=st.none() | st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-2, 2),
        eos=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        data=st.data(),
    )
    def add(
        self, prompt: tuple[int, ...], max_tokens: int | None, n: int, priority: int, eos: list[int], data: Any
    ) -> None:
        least = data.draw(st.integers(0, min(3, max_tokens or 3)))
        wants = data.draw(st.sampled_from([None, None, None, 0]))
        temperature = data.draw(st.sampled_from([0.0, 1.0]))  # to the fake model it is all the same
        params = SamplingParams(
            max_tokens, least, temperature, n=n, ignore_eos=data.draw(st.booleans()), prompt_logprobs=wants
        )
        request = Request(
            f"r{self.requests}", prompt, params, tuple(eos), priority, data.draw(st.sampled_from([None, "s"]))
        )
        config = self.run.scheduler.config
        try:
            self.run.add(request)
        except (InvalidRequestError, QueueFullError) as error:
            fits = len(prompt) + max(max_tokens or 1, least) <= config.max_sequence_tokens
            assert isinstance(error, QueueFullError) == fits
            return
        self.requests += 1
        for index in range(n):
            output = expected_output(request, index, request.max_tokens(config))
            self.expected[request.request_id, index] = output
            if wants is not None and index == 0:
                self.prompts[request.request_id, 0] = prompt

    @rule(steps=st.integers(1, 5))  # few, so that work is left for the other rules
    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.run.advance()
            self.run.scheduler.check()

    @rule()
    def launch(self) -> None:
        if len(self.run.results) < self.run.depth:
            self.run.launch()

    @rule()
    def deliver(self) -> None:
        if self.run.results:
            self.run.deliver()

    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        if self.expected:
            self.run.take(self.run.scheduler.abort(self.pick(pick)[0]))

    @rule(pick=picks)
    def stop(self, pick: int) -> None:
        if self.expected:
            self.run.take(self.run.scheduler.stop(*self.pick(pick)))

    @rule(pick=picks)
    def fail(self, pick: int) -> None:
        if pick % 4 == 0:  # rarer than the rest
            self.run.take(self.run.scheduler.fail())
            self.run.results.clear()

    @invariant()
    def outputs_are_those_of_each_request_alone(self) -> None:
        self.run.scheduler.check()
        for key, expected in self.expected.items():
            output, last = self.run.outputs[key], self.run.last.get(key)
            assert output == expected[: len(output)]
            if last is not None and last.finish_reason is FinishReason.LENGTH:
                assert output == expected
            if last is not None and last.stop_token is not None:
                assert output == expected and output[-1] == last.stop_token
            found = self.run.prompt_logprobs.get(key)
            assert (found is not None) == (key in self.prompts and bool(output))
            if found is not None:
                assert [(f.token_id, -f.logprob) for f in found] == list(zip(self.prompts[key][1:], count(1.0)))

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        self.run.finish()
        self.run.assert_idle()
        self.outputs_are_those_of_each_request_alone()
        assert all(self.run.last[key].finish_reason is not None for key in self.expected), "a request was forgotten"


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(max_examples=60, deadline=None)
@given(
    config=configs,
    depth=st.integers(1, 3),
    arrivals=st.lists(st.tuples(prompts, st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=12),
)
def test_waiting_is_bounded(config: SchedulerConfig, depth: int, arrivals: list[tuple[Any, int, int]]) -> None:
    """A request waits no longer than those before it could take one after the other, a token a step.

    That holds under preemption as well: the first in order never loses what it has computed.
    """
    run = FakeEngine(Scheduler(config), depth)
    bounds, work = [], 0
    for number, (prompt, max_tokens, pause) in enumerate(arrivals):
        request = Request(f"r{number}", prompt, SamplingParams(max_tokens=max_tokens))
        try:
            run.add(request)
        except (InvalidRequestError, QueueFullError):
            continue
        bounds.append(run.scheduler.stats().num_steps + work)
        work += len(prompt) + max_tokens + depth
        for _ in range(pause):
            run.advance()
    run.finish()
    for sequence, bound in enumerate(bounds):
        assert run.admitted[sequence] <= bound
    run.assert_idle()


@settings(max_examples=40, deadline=None)
@given(config=configs, arrivals=st.lists(st.tuples(prompts, st.integers(-1, 1)), min_size=2, max_size=10))
def test_no_one_passes_the_head_of_the_queue(config: SchedulerConfig, arrivals: list[tuple[Any, int]]) -> None:
    run = FakeEngine(Scheduler(config))
    for number, (prompt, priority) in enumerate(arrivals):
        try:
            run.add(Request(f"r{number}", prompt, SamplingParams(max_tokens=4), priority=priority))
        except (InvalidRequestError, QueueFullError):
            continue
        step = run.launch()
        if step is not None:
            behind = min((s.order for s in run.scheduler._waiting), default=None)
            assert behind is None or all(s.order < behind for s in step.admitted)
            run.deliver()
    run.finish()
    run.assert_idle()
