"""Sampling parameters: every field has bounds, and an error names the field, the need and the way out."""

import dataclasses
import math
from typing import Any

import pytest

from atom.serving.errors import InvalidRequestError
from atom.serving.sampling_params import MAX_LOGIT_BIAS, MAX_STOP, SamplingParams

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_tokens", True),  # a boolean is an int to Python, not to us
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", "0"),
    ("top_k", -1),
    ("top_k", 2.0),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", -0.1),
    ("min_p", math.inf),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0.0),
    ("seed", -1),
    ("seed", 2**63),
    ("logprobs", -1),
    ("logprobs", 65),
    ("prompt_logprobs", 65),
    ("n", 0),
    ("n", 129),
    ("stop", ["a"]),
    ("stop", ("",)),
    ("stop", ("a" * 1025,)),
    ("stop", ("a",) * (MAX_STOP + 1)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", ("a",)),
    ("logit_bias", ((1, 101.0),)),
    ("logit_bias", ((1,),)),
    ("logit_bias", ((1, math.nan),)),
    ("logit_bias", tuple((i, 0.0) for i in range(MAX_LOGIT_BIAS + 1))),
    ("ignore_eos", 1),
    ("guidance", {"type": "object"}),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: str(v)[:20])
def test_wrong_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{field} must be .*, got .*; .*\.$") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and isinstance(caught.value, ValueError)


def test_every_field_is_checked() -> None:
    assert {field for field, _ in WRONG} == {field.name for field in dataclasses.fields(SamplingParams)}


def test_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(max_tokens=1, min_tokens=1, temperature=2, top_k=0, top_p=1, min_p=1, seed=2**63 - 1, logprobs=0)
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=10, logit_bias=((0, -100),), n=128)


def test_min_tokens_is_at_most_max_tokens() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens must be an integer within 0 and 3, got '4'"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_is_a_value() -> None:
    assert SamplingParams() == SamplingParams() and hash(SamplingParams()) == hash(SamplingParams())
    assert SamplingParams(temperature=0).is_greedy and not SamplingParams().is_greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]
