"""Guessed tokens in the scheduler: they save steps, change no text, and take nothing from others."""

import pytest

from atom.serving.request import FinishReason
from atom.serving.result import FAULTY, StepResult

from .fake_runner import VOCAB, expected_output
from .one_scheduler import engine, request


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


def test_guesses_end_nothing_before_min_tokens() -> None:
    """Every token as the one that ends, at every place where it might come too early."""
    for least in range(1, 8):
        run = engine(max_num_seqs=8, num_blocks=200, num_speculative_tokens=3, prompt_lookup_min=1)
        asked = [
            request(chr(97 + token), max_tokens=16, temperature=0.0, min_tokens=least, stop_token_ids=(token,))
            for token in range(VOCAB)
        ]
        for each in asked:
            run.add(each)
        run.finish()
        for each in asked:
            assert run.outputs[each.request_id, 0] == expected_output(each, 0, 16)
        assert run.scheduler.stats().num_accepted_tokens > 0


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
