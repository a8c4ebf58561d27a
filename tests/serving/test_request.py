"""Admission: what can never be served is refused with the field and the limit that stands in the way."""

from typing import Any

import pytest

from atom.serving.config import SchedulerConfig
from atom.serving.errors import InvalidRequestError
from atom.serving.request import Request
from atom.serving.sampling_params import SamplingParams

CONTEXT = SchedulerConfig(vocab_size=10, max_model_len=20, num_blocks=100, block_size=4)
CACHE = SchedulerConfig(vocab_size=10, max_model_len=1000, num_blocks=4, block_size=4)  # stores 16 tokens


def request(length: int, priority: int = 0, **params: Any) -> Request:
    return Request("r", (1,) * length, SamplingParams(**params), priority=priority)


@pytest.mark.parametrize(
    ("config", "asked", "field", "message"),
    [
        (CONTEXT, request(0), "prompt", "at least one token"),
        (CONTEXT, request(20), "prompt", "20 tokens, at most 19 .*max_model_len is 20"),
        (CONTEXT, request(10, max_tokens=11), "max_tokens", "at most 10 after a prompt of 10 tokens .*, got 11; lower"),
        (CONTEXT, request(10, min_tokens=11), "min_tokens", "at most 10 after a prompt of 10 tokens .*, got 11; lower"),
        (CACHE, request(17), "prompt", "KV cache holds 16 tokens.*larger KV cache"),
        (CACHE, request(10, max_tokens=8), "max_tokens", "at most 7 .*KV cache holds 16 tokens"),
        (CONTEXT, Request("r", (1, 10)), "prompt", "token id 10, the vocabulary ends at 9"),
        (CONTEXT, Request("r", (-1,)), "prompt", "token id -1"),
        (CONTEXT, request(1, stop_token_ids=(10,)), "stop_token_ids", "token id 10"),
        (CONTEXT, request(1, logit_bias=((10, 1.0),)), "logit_bias", "token id 10"),
        (CONTEXT, request(1, priority=101), "priority", "within -100 and 100, got 101"),
    ],
)
def test_what_can_never_run_is_refused(config: SchedulerConfig, asked: Request, field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        asked.max_tokens(config)
    assert caught.value.field == field


def test_default_max_tokens_is_the_room_left() -> None:
    assert request(5).max_tokens(CONTEXT) == 15
    assert request(5).max_tokens(CACHE) == 12  # the last token is never stored
    assert request(5, max_tokens=3).max_tokens(CACHE) == 3
    assert request(16).max_tokens(CACHE) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("num_blocks", 0), ("block_size", 1.5), ("watermark", 1.0), ("max_num_batched_tokens", 255)]
)
def test_limits_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SchedulerConfig(**{"vocab_size": 10, "max_model_len": 20, "num_blocks": 10, field: value})
