"""Structured output against parsers of its own: json, re, and a checker of schemas written here."""

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.serving.errors import InvalidRequestError
from atom.serving.guidance import grammar_of
from atom.serving.guidance_spec import GuidanceSpec, choice_spec, grammar_spec, object_spec, regex_spec, schema_spec
from atom.serving.guide import mask_words
from atom.serving.guided_lanes import GuidedLanes
from atom.serving.request import FinishReason, Request
from atom.serving.sampler import Sampler
from atom.serving.sampling_params import SamplingParams
from atom.serving.sequence import Sequence

from .guided_tokens import Tokens, allowed
from .tiny_tokenizers import byte_level, sentencepiece

pytest.importorskip("llguidance", reason="structured output needs llguidance: pip install 'atom-serving[serving]'")

ROOT = os.environ.get("ATOM_TEST_MODELS", "")
SMOLLM2 = Path(ROOT) / "smollm2-fp16"
NO_MODEL = pytest.mark.skipif(not (ROOT and SMOLLM2.is_dir()), reason="ATOM_TEST_MODELS has no smollm2-fp16")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
MAIL = r"[a-z]{1,8}@[a-z]{1,5}\.(com|org)"


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece", pytest.param("smollm2", marks=NO_MODEL)])
def tokens(request: pytest.FixtureRequest) -> Iterator[Tokens]:
    if request.param == "smollm2":
        from transformers import AutoTokenizer

        made = Tokens(AutoTokenizer.from_pretrained(SMOLLM2))
    else:
        made = Tokens(byte_level() if request.param == "byte_level" else sentencepiece())
    yield made
    made.compiler.close()


@pytest.fixture(scope="module")
def small() -> Iterator[Tokens]:
    made = Tokens(byte_level())
    yield made
    made.compiler.close()


def write(tokens: Tokens, spec: GuidanceSpec, params: SamplingParams, limit: int = 400, seed: int = 0) -> Sequence:
    """What a model of random logits generates under a specification; it finds the end of a text a little likelier."""
    request = Request("r", (0,), params, tokens.eos, guide=tokens.compiler.compile(spec))
    sequence = Sequence(0, request, 0, limit, (0, 0))
    sampler, lanes = Sampler(1, tokens.vocab_size, "cpu"), GuidedLanes(tokens.vocab_size)
    sampler.admit(0, sequence)
    lanes.admit(0, sequence)
    generator, lane = torch.Generator().manual_seed(seed), np.zeros(1, dtype=np.int32)
    while not sequence.is_finished:
        logits = torch.randn(1, tokens.vocab_size, generator=generator)
        logits[0, list(tokens.eos)] += 3
        early = np.array([sequence.num_output + 1 < params.min_tokens])
        mask, stop = lanes.mask(lane, early)
        assert mask is not None
        found = sampler.sample(logits, lane, stop, mask).told.tolist()
        assert found[0] >= 0, "no token was left to sample"
        lanes.follow(lane, lambda found=found: found)  # type: ignore[misc]
        sequence.append(found[0])
    return sequence


def text_of(tokens: Tokens, sequence: Sequence) -> str:
    text: str = tokens.hf.decode(sequence.token_ids[1:], skip_special_tokens=True)
    return text


def fits_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and isinstance(value["tags"], list)
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b", "ü"}
    )


SPECS = {
    "schema": (schema_spec("f", PERSON), lambda text: fits_person(json.loads(text))),
    "regex": (regex_spec("f", MAIL), lambda text: re.fullmatch(MAIL, text)),
    "choice": (choice_spec("f", ["yes", "no.", "a+b|c (d)", "né"]), lambda t: t in ("yes", "no.", "a+b|c (d)", "né")),
    "lark": (grammar_spec("f", 'start: pair+\npair: "(" /[ab]{1,3}/ ")"'), re.compile(r"(\([ab]{1,3}\))+").fullmatch),
    "gbnf": (grammar_spec("f", 'root ::= pair+\npair ::= "<" [ab] ">"'), re.compile("(<[ab]>)+").fullmatch),
}


@pytest.mark.parametrize("name", SPECS)
def test_random_models_write_what_fits(tokens: Tokens, name: str) -> None:
    spec, fits = SPECS[name]
    ends = 0
    for seed in range(8):
        sequence = write(tokens, spec, SamplingParams(temperature=1.5, seed=seed), seed=seed)
        if sequence.finish_reason is FinishReason.STOP:
            ends += 1
            text = text_of(tokens, sequence)
            assert fits(text), text
            assert sequence.stop_token in tokens.eos
    assert ends >= 4, "most texts should have ended"


def test_any_json_object(tokens: Tokens) -> None:
    ended = []
    for seed in range(8):
        sequence = write(tokens, object_spec("f"), SamplingParams(seed=seed), limit=300, seed=seed)
        text = text_of(tokens, sequence)
        assert text.startswith("{")
        if sequence.finish_reason is FinishReason.STOP:
            ended.append(json.loads(text))
    assert ended, "some text should have ended"
    assert all(isinstance(value, dict) for value in ended)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(top_k=3, top_p=0.5, presence_penalty=2.0),
        SamplingParams(min_p=0.9, logit_bias=((5, 100.0),)),
        SamplingParams(min_tokens=30),
        SamplingParams(ignore_eos=True),
        SamplingParams(ignore_eos=True, min_tokens=30),
    ],
)
def test_guidance_holds_whatever_else_is_asked_for(small: Tokens, params: SamplingParams) -> None:
    """A text that can only end, ends: min_tokens and ignore_eos give way where nothing else may follow."""
    sequence = write(small, choice_spec("f", ["yes", "no"]), params)
    assert text_of(small, sequence) in ("yes", "no")
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.num_output <= 4


def test_min_tokens_holds_where_the_text_may_go_on(small: Tokens) -> None:
    for seed in range(5):
        sequence = write(small, regex_spec("f", "a+"), SamplingParams(min_tokens=20, seed=seed), seed=seed)
        assert sequence.num_output >= 20
        assert set(text_of(small, sequence)) == {"a"}


def test_a_matcher_that_is_rebuilt_allows_the_same(small: Tokens) -> None:
    spec = schema_spec("f", PERSON)
    guide = small.compiler.compile(spec)
    output = write(small, spec, SamplingParams(seed=3), seed=3).token_ids[1:]
    going = guide.start()
    for number, token in enumerate(output[:-1]):
        going.accept(token)
        rows = np.full((2, mask_words(small.vocab_size)), 7, dtype=np.int32)
        going.fill(rows[0])
        guide.start(output[: number + 1]).fill(rows[1])
        assert (rows[0] == rows[1]).all()
        assert rows[0, output[number + 1] // 32] >> (output[number + 1] % 32) & 1


def test_masks_exactly(small: Tokens) -> None:
    guide = small.compiler.compile(regex_spec("f", "he|hl"))
    h, e, ell, he = small.hf.convert_tokens_to_ids(["h", "e", "l", "he"])
    (eos,) = small.eos
    assert allowed(guide, []) == {h, he}
    assert allowed(guide, [h]) == {e, ell}
    assert allowed(guide, [he]) == {eos}
    assert allowed(guide, [he, eos]) <= {eos}
    assert allowed(guide, [e]) == set(), "a token that does not fit leaves nothing"
    assert guide.start([e]).error
    assert guide.start([he]).is_complete
    assert guide.start([he]).is_stopped
    assert not guide.start([h]).is_complete


def test_rows_of_others_are_free_and_lanes_forget(small: Tokens) -> None:
    lanes = GuidedLanes(small.vocab_size)
    guide = small.compiler.compile(regex_spec("f", "he|hl"))
    free, guided = Request("a", (0,)), Request("b", (0,), eos_token_ids=small.eos, guide=guide)
    lanes.admit(0, Sequence(0, free, 0, 9, (0, 0)))
    batch, none = np.array([1, 0], dtype=np.int32), np.array([False, False])
    assert lanes.mask(batch, none)[0] is None
    lanes.admit(1, Sequence(1, guided, 0, 9, (0, 1)))
    mask, _ = lanes.mask(batch, none)
    assert mask is not None
    assert (mask[1] == -1).all()
    assert np.unpackbits(mask[0].view(np.uint8)).sum() == 2
    h, e, ell = small.hf.convert_tokens_to_ids(["h", "e", "l"])
    lanes.follow(batch, lambda: [h, e])
    again = lanes.mask(np.array([1], dtype=np.int32), np.array([True]))
    assert again[0] is not None
    assert np.flatnonzero(np.unpackbits(again[0].view(np.uint8), bitorder="little")).tolist() == sorted([e, ell])
    assert again[1].tolist() == [True], "the text may go on, so EOS stays forbidden"
    lanes.follow(batch, lambda: [e, e])
    _, stop = lanes.mask(np.array([1], dtype=np.int32), np.array([True]))
    assert stop.tolist() == [False], "nothing but EOS may follow"
    lanes.follow(batch, lambda: pytest.fail("a failed step has no tokens"))
    lanes.reset()
    lanes.mask(batch, none)
    lanes.admit(1, Sequence(2, free, 0, 9, (0, 0)))
    assert lanes.mask(batch, none)[0] is None


def test_a_matcher_that_takes_too_long_ends_its_own_sequence(small: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    guide, lanes = small.compiler.compile(regex_spec("f", "he|hl")), GuidedLanes(small.vocab_size)
    request = Request("b", (0,), eos_token_ids=small.eos, guide=guide)
    for lane in range(2):
        lanes.admit(lane, Sequence(lane, request, 0, 9, (0, lane)))
    monkeypatch.setattr("atom.serving.guided_lanes.MASK_S", 0.1)
    release = threading.Event()
    monkeypatch.setattr(lanes._lanes[0].matcher, "fill", lambda row: release.wait(20))
    both, none = np.array([0, 1], dtype=np.int32), np.array([False, False])
    start = time.monotonic()
    for _ in range(2):
        mask, _ = lanes.mask(both, none)
        assert mask is not None
        assert not mask[0].any()
        assert mask[1].any()
    assert time.monotonic() - start < 5
    release.set()
    lanes.admit(0, Sequence(2, request, 0, 9, (0, 0)))
    mask, _ = lanes.mask(both, none)
    assert mask is not None
    assert (mask[0] == mask[1]).all()


def test_a_request_without_its_guide_is_refused() -> None:
    from atom.serving.config import SchedulerConfig

    request = Request("r", (1,), SamplingParams(guidance=object_spec("response_format")))
    with pytest.raises(InvalidRequestError, match="response_format must be compiled"):
        request.max_tokens(SchedulerConfig(vocab_size=9, max_model_len=9, num_blocks=9))


def test_whitespace_is_bounded(small: Tokens) -> None:
    guide = small.compiler.compile(object_spec("f"))
    brace, newline = small.hf.convert_tokens_to_ids(["{", "Ċ"])
    assert newline in allowed(guide, [brace, *[newline] * 40])
    assert newline not in allowed(guide, [brace, *[newline] * 64])


def test_choices_are_taken_literally() -> None:
    text = "".join(map(chr, range(32, 127)))
    grammar = json.loads(grammar_of(choice_spec("f", [text])))
    assert grammar["grammars"]
