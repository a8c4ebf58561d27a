"""The scheduler's rules one by one, on the fake model."""

import pytest

from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams

from .fake_runner import VOCAB, expected_output
from .one_scheduler import engine, names, request


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


def test_a_step_without_room_for_tokens_begins_nothing() -> None:
    run = engine()
    for name in "ab":
        run.add(request(name, length=16))
    for chunks in ([16], [1, 15], [1, 1]):
        step = run.launch()
        assert step is not None and [entry.num_tokens for entry in step.entries] == chunks
        run.deliver()
    run.finish()
    run.assert_idle()


def test_a_step_that_preempts_admits_nobody() -> None:
    """Not even one that comes first, and for which what was freed would do: those that stay may want it next."""
    run = engine(num_blocks=6, watermark=0.0)
    run.add(request("a", length=8, max_tokens=8))
    run.add(request("b", length=8, max_tokens=8, priority=1))
    assert names(run) == ["a", "b"]
    run.deliver()
    seen = []
    run.add(request("c", length=7, max_tokens=2))
    while run.scheduler.has_unfinished:
        before = run.scheduler.stats().num_preemptions
        step = run.launch()
        assert step is not None
        seen.append((run.scheduler.stats().num_preemptions - before, [s.request.request_id for s in step.admitted]))
        run.deliver()
    preempting = next(place for place, (preempted, _) in enumerate(seen) if preempted)
    assert seen[preempting : preempting + 2] == [(1, []), (0, ["c"])]
    run.assert_idle()
