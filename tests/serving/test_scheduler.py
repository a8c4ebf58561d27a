"""The scheduler's rules one by one, on the fake model."""

from typing import Any

import pytest

from atom.serving.config import SchedulerConfig
from atom.serving.errors import InvalidRequestError, QueueFullError
from atom.serving.request import FinishReason, Request
from atom.serving.result import FAULTY, StepResult
from atom.serving.sampling_params import SamplingParams
from atom.serving.scheduler import Scheduler

from .fake_runner import VOCAB, FakeEngine, expected_output


def engine(depth: int = 1, **limits: Any) -> FakeEngine:
    config = {"max_model_len": 64, "num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    config["growth_blocks"] = 0
    return FakeEngine(Scheduler(SchedulerConfig(VOCAB, **{**config, **limits})), depth)


def request(name: str, length: int = 6, max_tokens: int = 5, priority: int = 0, **params: Any) -> Request:
    """A prompt of its own for every first letter of a name."""
    prompt = tuple((ord(name[0]) * 7 + i * i) % VOCAB for i in range(length))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, **params), priority=priority)


def names(run: FakeEngine) -> list[str]:
    step = run.launch()
    return [] if step is None else [e.sequence.request.request_id for e in step.entries]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_request_alone(depth: int) -> None:
    run = engine(depth)
    asked = request("a", length=40, max_tokens=9)
    run.add(asked)
    run.finish()
    assert run.outputs["a", 0] == expected_output(asked, 0, 9)
    assert run.last["a", 0].finish_reason is FinishReason.LENGTH
    assert run.scheduler.stats().num_steps == 3 + 8  # chunks of 16, 16 and 8 tokens; no step for nothing at the end
    run.assert_idle()


@pytest.mark.parametrize("depth", [1, 2])
def test_ends(depth: int) -> None:
    """EOS, a stop id, min_tokens and ignore_eos, each with every token as the one that ends."""
    run = engine(depth, max_num_seqs=8)
    for token in range(VOCAB):
        prompt = (token, 3, 1)
        asked = [
            Request(f"eos{token}", prompt, SamplingParams(max_tokens=20), eos_token_ids=(token,)),
            Request(f"stop{token}", prompt, SamplingParams(max_tokens=20, stop_token_ids=(token, 1))),
            Request(f"min{token}", prompt, SamplingParams(max_tokens=20, min_tokens=10), eos_token_ids=(token,)),
            Request(f"ignore{token}", prompt, SamplingParams(max_tokens=20, ignore_eos=True), eos_token_ids=(token,)),
        ]
        for each in asked:
            run.add(each)
        run.finish()
        for each in asked:
            output, last = run.outputs[each.request_id, 0], run.last[each.request_id, 0]
            assert output == expected_output(each, 0, 20)
            stops = set(each.params.stop_token_ids) | (set() if each.params.ignore_eos else set(each.eos_token_ids))
            ended = output[-1] in stops
            assert last.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert last.stop_token == (output[-1] if ended else None)
            assert len(output) >= each.params.min_tokens
    reasons = {last.finish_reason for last in run.last.values()}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    run.assert_idle()


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    run = engine()
    run.add(request("a", length=4, max_tokens=10))
    run.advance()
    run.add(request("b", length=40))
    for chunk in (15, 15, 10):
        step = run.launch()
        assert step is not None
        assert [e.num_tokens for e in step.entries] == [1, chunk] and step.batch.num_decodes == 1
        run.deliver()


def test_prefix_cache_is_used_and_left_out_where_it_must_not_be() -> None:
    run = engine(num_blocks=64)
    long = request("a", length=17)
    for name, salt, params, cached in (
        ("a", None, {}, 0),
        ("a2", None, {}, 16),
        ("a3", "tenant", {}, 0),
        ("a4", "tenant", {}, 16),
        ("a5", None, {"prompt_logprobs": 1}, 0),
    ):
        asked = Request(name, long.prompt_token_ids, SamplingParams(max_tokens=5, **params), cache_salt=salt)
        run.add(asked)
        run.finish()
        assert run.outputs[name, 0] == expected_output(asked, 0, 5)
        assert run.last[name, 0].cached_tokens == cached
    full = Request("b", long.prompt_token_ids[:16], SamplingParams(max_tokens=1))
    run.add(full)
    run.finish()
    assert run.last["b", 0].cached_tokens == 12  # the last token is computed all the same: its logits are needed
    run.assert_idle()


def test_a_following_turn_finds_the_answer_in_the_cache() -> None:
    run = engine()
    run.add(request("a", length=6, max_tokens=7))
    run.finish()
    history = request("a", length=6).prompt_token_ids + tuple(run.outputs["a", 0])
    run.add(Request("next", (*history, 1), SamplingParams(max_tokens=2)))
    run.finish()
    assert run.last["next", 0].cached_tokens == 12  # all three full blocks of 6 + 6 tokens; the 7th was never stored


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [3, 4, 5, 8, 33])  # below, at and above a block; several chunks
def test_samples_share_the_prompts_full_blocks(length: int, depth: int, prefix_cache: bool) -> None:
    run = engine(depth, prefix_cache=prefix_cache)
    asked = request("a", length=length, max_tokens=6, n=3)
    run.add(asked)
    most = 0
    while run.scheduler.has_unfinished or run.results:
        run.advance()
        run.scheduler.check()
        most = max(most, run.scheduler.stats().used_blocks)
    for index in range(3):
        assert run.outputs["a", index] == expected_output(asked, index, 6)
    shared = (length - 1) // 4
    assert most <= shared + 3 * (-(-(length + 6) // 4) - shared)
    assert run.scheduler.stats().num_prefix_hits == 2 * shared * 4
    run.assert_idle()


def test_the_latest_is_preempted_and_computed_again() -> None:
    run = engine(num_blocks=8, watermark=0.0, prefix_cache=False)
    early, late = request("a", length=8, max_tokens=20), request("b", length=8, max_tokens=20)
    run.add(early)
    run.add(late)
    run.finish()
    assert run.scheduler.stats().num_preemptions > 0
    assert run.outputs["a", 0] == expected_output(early, 0, 20) and run.outputs["b", 0] == expected_output(late, 0, 20)
    assert run.finished == [("a", 0), ("b", 0)]
    run.assert_idle()


def test_what_was_computed_before_a_preemption_does_not_count_after_it() -> None:
    """A chunk of b comes back when b was preempted, and admitted again, since it was scheduled."""
    run = engine(3, num_blocks=8, watermark=0.0, max_num_batched_tokens=5, max_model_len=32)
    run.add(request("a", length=4, max_tokens=10))
    run.launch()
    run.deliver()
    run.add(request("b", length=24, max_tokens=5))
    for _ in range(4):  # a's first block and one to grow into, six for b
        run.launch()
    stale = [e for step, _ in run.results for e in step.entries if e.sequence.request.request_id == "b"]
    assert stale and not any(e.samples for e in stale)
    run.launch()  # a needs a third block
    b = stale[0].sequence
    assert b.num_preemptions == 1 and b.lane is None
    run.take(run.scheduler.abort("a"))
    run.launch()
    assert b.lane is not None and b.epoch == 2
    for _ in range(5):
        run.deliver()
        assert b.computed == 0
        run.scheduler.check()
    assert run.scheduler.blocks.find(b.digests) == 0
    run.finish()
    assert run.outputs["b", 0] == expected_output(request("b", length=24, max_tokens=5), 0, 5)
    run.assert_idle()


def test_priority_goes_first_but_only_for_so_long() -> None:
    run = engine(max_num_seqs=1, patience_steps=8)
    run.add(request("running", max_tokens=4))
    run.advance()
    run.add(request("low", max_tokens=4, priority=2))  # as if it came 16 steps later
    began: list[str] = []
    for number in range(12):
        run.add(request(f"high{number}", max_tokens=4, priority=0))
        for _ in range(4):  # as fast as they are served
            step = run.launch()
            if step is not None:
                began += [s.request.request_id for s in step.admitted]
                run.deliver()
    assert began[:4] == ["high0", "high1", "high2", "high3"]
    assert began.index("low") == 4
    run.finish()
    run.assert_idle()


def test_the_head_of_the_queue_is_not_passed_by_what_would_fit() -> None:
    run = engine(num_blocks=8, watermark=0.0, max_num_batched_tokens=32)
    run.add(request("a", length=16, max_tokens=4))
    assert names(run) == ["a"]
    run.add(request("big", length=28, max_tokens=1))
    run.add(request("small", length=1, max_tokens=1))
    assert names(run) == ["a"]
    run.finish()
    run.assert_idle()


def test_watermark_leaves_room_to_grow_but_never_blocks_the_only_one() -> None:
    run = engine(num_blocks=8, watermark=0.5)
    run.add(request("a", length=30, max_tokens=2))
    assert names(run) == ["a"]
    run.add(request("b", length=1, max_tokens=1))
    assert names(run) == ["a"]
    run.finish()
    run.assert_idle()


def test_every_running_sequence_has_blocks_to_grow_into_before_another_is_admitted() -> None:
    run = engine(num_blocks=6, watermark=0.0, growth_blocks=2)
    for name in "abc":
        run.add(request(name, length=4, max_tokens=4))
    assert names(run) == ["a", "b"], "c's prompt would leave 3 blocks, and two sequences are to have 4"
    run.finish()
    assert run.scheduler.stats().num_preemptions == 0
    run.assert_idle()


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
    run.add(request("b"))
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


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_guesses_save_steps_and_change_nothing(drafts: int, depth: int) -> None:
    """Greedy sequences and others side by side, one of them that ends by EOS in the middle of a guess."""
    asked = [
        request("a", max_tokens=40, temperature=0.0),
        request("b", max_tokens=40, temperature=0.0, n=2),
        request("c", max_tokens=40, temperature=0.0, min_tokens=20, stop_token_ids=(3, 5, 7)),
        request("d", max_tokens=33, temperature=0.7),
        request("e", max_tokens=33, temperature=0.0, presence_penalty=1.0),
    ]
    steps = []
    for tokens in (0, drafts):
        run = engine(depth, max_num_seqs=8, num_blocks=100, num_speculative_tokens=tokens, prompt_lookup_min=1)
        for each in asked:
            run.add(each)
        run.finish()
        for each in asked:
            for index in range(each.params.n):
                wanted = expected_output(each, index, each.max_tokens(run.scheduler.config))
                assert run.outputs[each.request_id, index] == wanted
        stats = run.scheduler.stats()
        steps.append(stats.num_steps)
        assert stats.num_output_tokens == sum(map(len, run.outputs.values()))
        assert 0 <= stats.num_accepted_tokens < stats.num_draft_tokens or not tokens
        run.assert_idle()
    assert stats.num_accepted_tokens > 20


def test_sequences_that_cannot_be_guessed_are_not() -> None:
    run = engine(num_speculative_tokens=4, prompt_lookup_min=1)
    for name, params in (
        ("a", {"temperature": 1.0}),
        ("b", {"temperature": 0.0, "frequency_penalty": 0.1}),
        ("c", {"temperature": 0.0, "repetition_penalty": 1.1}),
    ):
        run.add(request(name, max_tokens=20, **params))
    run.finish()
    assert run.scheduler.stats().num_draft_tokens == 0


def test_nobody_is_preempted_for_a_guess() -> None:
    """Two sequences fill the cache: with guesses or without, the same preemptions."""
    preemptions = []
    for tokens in (0, 8):
        run = engine(num_blocks=11, watermark=0.0, num_speculative_tokens=tokens, prompt_lookup_min=1)
        for name in ("a", "b"):
            run.add(request(name, length=6, max_tokens=14, temperature=0.0))
        run.finish()
        for name in ("a", "b"):
            assert run.outputs[name, 0] == expected_output(request(name, length=6), 0, 14)
        preemptions.append(run.scheduler.stats().num_preemptions)
    assert preemptions == [0, 0]
    assert run.scheduler.stats().num_accepted_tokens > 0


@pytest.mark.parametrize(("watermark", "crosses"), [(0.0, True), (0.9, False)])
def test_a_guess_takes_no_block_that_is_kept_for_others(watermark: float, crosses: bool) -> None:
    run = engine(num_blocks=20, watermark=watermark, num_speculative_tokens=8, prompt_lookup_min=1)
    run.add(request("a", length=6, max_tokens=40, temperature=0.0))
    ends = set()
    while run.scheduler.has_unfinished:
        step = run.launch()
        assert step is not None
        ends |= {-(-e.end // 4) - -(-(e.start + 1) // 4) for e in step.entries if e.drafts}  # blocks beyond the token's
        run.deliver()
    assert (max(ends) > 0) == crosses
    assert run.outputs["a", 0] == expected_output(request("a", length=6), 0, 40)


def test_a_faulty_row_in_a_guess_ends_the_sequence() -> None:
    run = engine(num_speculative_tokens=4, prompt_lookup_min=1)
    run.add(request("a", max_tokens=40, temperature=0.0))
    while True:
        step = run.launch()
        assert step is not None
        if step.entries[0].drafts:
            break
        run.deliver()
    _, result = run.results.popleft()
    run.take(run.scheduler.update(step, StepResult([FAULTY] * len(result.token_ids))))
    assert run.last["a", 0].finish_reason is FinishReason.ERROR
    run.assert_idle()


def admissions(run: FakeEngine, steps: int) -> list[int]:
    """The places, among that many steps, of those that begin a prompt."""
    found = []
    for place in range(steps):
        step = run.launch()
        assert step is not None
        found += [place] * bool(step.admitted)
        run.deliver()
    return found


def test_prompts_that_come_one_by_one_share_steps() -> None:
    """Two decode and one comes every step: at most every fourth step begins some, and none is lost."""
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=4)
    for name in "ab":
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    found = []
    for place, name in enumerate("cdefghij"):
        run.add(request(name, length=2, max_tokens=30))
        found += [place + at for at in admissions(run, 1)]
    assert found == [3, 7], "the fourth step after the last one that began any"
    run.finish()
    assert len(run.outputs) == 10
    run.assert_idle()


def test_short_prompts_are_not_gathered() -> None:
    """Those that fit into a few tokens begin at once, up to the first that does not; that one waits for its turn."""
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=4, admission_few=5)
    for name in "ab":
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    for name, length in (("c", 2), ("d", 3), ("e", 2), ("f", 6), ("g", 1)):
        run.add(request(name, length=length, max_tokens=30))
    steps = [run.launch() for _ in range(7)]
    assert [[s.request.request_id for s in step.admitted] for step in steps if step is not None] == [
        ["c", "d"], ["e"], [], [], [], ["f", "g"], [],
    ]  # fmt: skip
    while run.results:
        run.deliver()
    run.finish()
    run.assert_idle()


@pytest.mark.parametrize(("decodes", "length"), [(1, 2), (2, 16)], ids=["no crowd", "enough to begin"])
def test_prompts_are_not_made_to_wait_without_need(decodes: int, length: int) -> None:
    limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 64, "admission_crowd": 2}
    run = engine(**limits, admission_interval=8)
    for name in "ab"[:decodes]:
        run.add(request(name, max_tokens=30))
    assert admissions(run, 1) == [0]
    run.add(request("c", length=length, max_tokens=30))
    assert admissions(run, 1) == [0]
    run.finish()
