"""A sequence's own rules: which token ends it, whatever the sampler was told."""

import pytest

from atom.serving.request import FinishReason, Request
from atom.serving.sampling_params import SamplingParams
from atom.serving.sequence import Sequence

EOS, STOP = 9, 8


def sequence(max_tokens: int = 5, min_tokens: int = 0, ignore_eos: bool = False) -> Sequence:
    params = SamplingParams(max_tokens, min_tokens, stop_token_ids=(STOP,), ignore_eos=ignore_eos)
    return Sequence(0, Request("r", (EOS, STOP), params, (EOS,)), 0, max_tokens, (0, 0))


@pytest.mark.parametrize("token", [EOS, STOP])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_a_stop_token_ends_it_from_min_tokens_on(token: int, min_tokens: int) -> None:
    found = sequence(min_tokens=min_tokens)
    for number in range(1, max(1, min_tokens) + 1):
        assert not found.is_finished
        found.append(token)
        assert found.is_finished == (number >= min_tokens)
    assert found.finish_reason is FinishReason.STOP and found.stop_token == token


def test_ignoring_eos_leaves_the_stop_token_ids() -> None:
    found = sequence(ignore_eos=True)
    found.append(EOS)
    assert not found.is_finished
    found.append(STOP)
    assert found.finish_reason is FinishReason.STOP


def test_the_last_token_may_stop_it_too() -> None:
    by_length, by_stop = sequence(max_tokens=2), sequence(max_tokens=2)
    for found, last in ((by_length, 1), (by_stop, EOS)):
        found.append(1)
        found.append(last)
    assert (by_length.finish_reason, by_length.stop_token) == (FinishReason.LENGTH, None)
    assert (by_stop.finish_reason, by_stop.stop_token) == (FinishReason.STOP, EOS)


def test_its_state_shows() -> None:
    found = sequence()
    assert repr(found) == "Sequence('r'[0], 0/2 tokens, waiting)"
    assert not found.is_decode and not found.is_sampled_out
    found.append(1)
    found.scheduled = 2
    assert found.is_decode and found.num_output == 1 and found.length == 3
