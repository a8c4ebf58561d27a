"""The decoding sequences' arrays against a sequence's own definition, and what `take` leaves to a closer look."""

import numpy as np
import pytest

from atom.serving.decoding import Decoding
from atom.serving.request import FinishReason, Request
from atom.serving.result import FAULTY
from atom.serving.sampling_params import SamplingParams
from atom.serving.sequence import Sequence

EOS, STOP, STEPS = 9, 8, 400


def make(number: int, lane: int, prompt: int = 4, **params: int) -> Sequence:
    """A sequence whose prompt's last chunk has just been scheduled."""
    wishes = SamplingParams(**{"max_tokens": 20, **params}, stop_token_ids=(STOP,))  # type: ignore[arg-type]
    request = Request(f"r{number}", tuple(range(10, 10 + prompt)), wishes, (EOS,))
    sequence = Sequence(number, request, 0, wishes.max_tokens or 0, (number, number))
    sequence.lane, sequence.epoch = lane, 1
    sequence.scheduled, sequence.pending = prompt, 1
    return sequence


def test_a_step_goes_on_by_a_token_and_a_later_one_does_not_need_it() -> None:
    decoding = Decoding(4, block_size=4)
    early, late = make(0, lane=2, prompt=4, min_tokens=3), make(1, lane=0, prompt=6)
    decoding.join(late)
    decoding.join(early)
    assert [s.request_id for s in decoding] == ["r0", "r1"] and len(decoding) == 2
    assert [(s.request_id, length) for s, length in decoding.at_block_start()] == [("r0", 5)]
    first = decoding.advance()
    assert first.lanes.tolist() == [2, 0] and first.starts.tolist() == [4, 6]
    assert first.is_pending.tolist() == [True, True] and first.masks_stop.tolist() == [True, False]
    assert (early.scheduled, early.pending, early.length) == (5, 2, 6)  # the prompt's token is not back yet

    early.came_back(70)
    assert (early.pending, early.length, early.token_ids[-1]) == (1, 6, 70)
    late.came_back(60)
    assert decoding.take(first, np.array([71, 72], dtype=np.int32)).tolist() == [True, True]
    assert early.computed == 5 and late.computed == 7
    early.token_ids.append(71)
    late.token_ids.append(72)
    second = decoding.advance()
    assert second.is_pending.tolist() == [False, False] and second.tokens.tolist() == [71, 72]
    decoding.check()


@pytest.mark.parametrize(
    "token, is_taken", [(7, True), (EOS, False), (STOP, False), (FAULTY, False)], ids=["plain", "eos", "stop", "faulty"]
)
def test_what_may_end_a_sequence_is_not_taken(token: int, is_taken: bool) -> None:
    decoding, sequence = Decoding(2, 4), make(0, lane=1)
    decoding.join(sequence)
    sequence.came_back(5)
    step = decoding.advance()
    assert decoding.take(step, np.array([token], dtype=np.int32)).tolist() == [is_taken]


def test_the_last_token_is_not_taken_and_none_is_scheduled_after_it() -> None:
    decoding, sequence = Decoding(2, 4), make(0, lane=1, max_tokens=2)
    decoding.join(sequence)
    sequence.came_back(5)
    step = decoding.advance()
    assert len(decoding.advance()) == 0 and decoding.at_block_start() == []
    assert decoding.take(step, np.array([7], dtype=np.int32)).tolist() == [False]
    sequence.came_back(7)
    assert sequence.finish_reason is FinishReason.LENGTH


def test_one_that_left_is_another_when_it_comes_back() -> None:
    decoding, sequence = Decoding(2, 4), make(0, lane=1)
    decoding.join(sequence)
    sequence.came_back(5)
    step = decoding.advance()
    decoding.leave(sequence)
    assert (sequence.scheduled, sequence.computed, sequence.pending, sequence.decoding) == (5, 0, 1, None)
    sequence.came_back(7)  # of that step: taken by hand
    sequence.scheduled, sequence.pending = 6, 1  # computed again
    decoding.join(sequence)
    assert decoding.take(step, np.array([7], dtype=np.int32)).tolist() == [False]
    decoding.check()


def test_random_steps_are_what_each_sequence_does_alone() -> None:
    draw = np.random.default_rng(0)
    decoding, live, made = Decoding(8, 4), dict[int, Sequence](), 0
    for _ in range(STEPS):
        free = [lane for lane in range(8) if lane not in live]
        if free and draw.random() < 0.5:
            lane = int(draw.choice(free))
            live[lane] = make(made, lane, prompt=int(draw.integers(1, 9)), max_tokens=int(draw.integers(2, 30)))
            made += 1
            decoding.join(live[lane])
            live[lane].came_back(5)
        if live and draw.random() < 0.2:
            gone = live.pop(int(draw.choice(list(live))))
            decoding.leave(gone)
        wanted = [s for s in sorted(live.values(), key=lambda s: s.order) if not s.is_sampled_out]
        starts = [s.length - 1 for s in wanted]
        growing = [s for s in wanted if s.scheduled % 4 == 0]
        assert [s for s, _ in decoding.at_block_start()] == growing
        step = decoding.advance()
        assert list(step.rows.sequences) == wanted and step.starts.tolist() == starts
        assert step.tokens.tolist() == [s.token_ids[-1] for s in wanted]
        tokens = draw.choice([3, 4, 5, EOS], size=len(wanted), p=[0.4, 0.3, 0.25, 0.05]).astype(np.int32)
        for sequence, token, taken in zip(wanted, tokens.tolist(), decoding.take(step, tokens).tolist(), strict=True):
            known = len(sequence.token_ids)
            if taken:
                sequence.token_ids.append(token)
                assert sequence.computed == known and token != EOS and known + 1 < sequence.max_length
            else:
                sequence.came_back(token)
                assert sequence.is_finished
                decoding.leave(live.pop(sequence.lane or 0))
        decoding.check()
    assert made > 50
