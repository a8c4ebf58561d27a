"""Structured output through the whole engine: running ahead, preempted, beside others; and a matcher that fails."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atom.serving.errors import InvalidRequestError, StepFailedError
from atom.serving.guidance_spec import choice_spec, object_spec, regex_spec, schema_spec
from atom.serving.llm import LLM
from atom.serving.request import FinishReason
from atom.serving.sampling_params import SamplingParams

from .driven_steps import PROMPTS
from .test_runner import engine_on

pytest.importorskip("llguidance", reason="structured output needs llguidance: pip install 'atom-serving[serving]'")

Tiny = Callable[[str], Path]
SPECS = (
    regex_spec("f", "[ab]{9,14}"),
    None,
    schema_spec("f", {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 4}),
    choice_spec("f", ["yes", "nono"]),
)


def run(llm: LLM, seeded: bool) -> list[Any]:
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=1.0 if seeded else 0.0,
            seed=index,
            min_tokens=5,
            n=1 + index % 2,
            guidance=SPECS[index % len(SPECS)],
            logprobs=1 if index == 2 else None,
        )
        for index in range(len(PROMPTS))
    ]
    found = llm.generate(PROMPTS, params)
    assert llm.engine.stats().used_blocks == 0
    for index, completion in enumerate(found):
        for sample in completion.samples:
            check(index % len(SPECS), sample.text, sample.finish_reason)
    return [[sample.token_ids for sample in completion.samples] for completion in found]


def check(kind: int, text: str, reason: FinishReason) -> None:
    if reason is not FinishReason.STOP:
        return
    if kind == 0:
        assert re.fullmatch("[ab]{9,14}", text)
    if kind == 2:
        value = json.loads(text)
        assert len(value) <= 4
        assert all(0 <= item <= 99 for item in value)
    if kind == 3:
        assert text in ("yes", "nono")


@pytest.mark.parametrize("seeded", [False, True])
def test_running_ahead_changes_no_guided_token(tiny: Tiny, seeded: bool) -> None:
    with engine_on(tiny("llama"), 1, ()) as plain:
        wanted = run(plain, seeded)
    for depth, buckets in ((2, ()), (3, (1, 2, 4, 8))):
        with engine_on(tiny("llama"), depth, buckets) as llm:
            assert run(llm, seeded) == wanted
            assert llm.engine.stats().num_preemptions > 0
            assert not [each for each in llm.ready.runner._guided._pending if len(each[1]) > 8]


def test_texts_end_where_the_specification_does(tiny: Tiny) -> None:
    with engine_on(tiny("llama"), 2, ()) as llm:
        params = SamplingParams(max_tokens=60, guidance=choice_spec("f", ["yes", "no"]), ignore_eos=True, n=4, seed=1)
        for sample in llm.generate([PROMPTS[1]], params)[0].samples:
            assert sample.text in ("yes", "no")
            assert sample.finish_reason is FinishReason.STOP
        stopped = replace(params, guidance=regex_spec("f", "xaby*"), stop=("b",), n=1)
        assert llm.generate([PROMPTS[1]], stopped)[0].samples[0].text == "xa"


def test_a_specification_that_cannot_be_followed_is_refused(tiny: Tiny) -> None:
    with engine_on(tiny("llama"), 1, ()) as llm, pytest.raises(InvalidRequestError, match="response_format"):
        llm.generate([PROMPTS[1]], SamplingParams(guidance=schema_spec("response_format", {"type": "foo"})))


def test_a_matcher_that_fails_ends_its_own_sequence(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on(tiny("llama"), 2, ()) as llm:
        llm.generate([PROMPTS[1]], SamplingParams(max_tokens=5, guidance=object_spec("f")))
        monkeypatch.setattr("atom.serving.guide.Matcher.fill", lambda self, row: row.fill(0))
        with pytest.raises(StepFailedError):
            llm.generate([PROMPTS[1]], SamplingParams(max_tokens=5, guidance=object_spec("f")))
        assert llm.engine.healthy
        assert llm.generate([PROMPTS[1]], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids
        assert llm.engine.stats().used_blocks == 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_everything_at_once_is_what_each_is_alone(tiny: Tiny, drafts: int) -> None:
    """Guided, penalised, filtered, biased and drafted rows share steps, and no row sees another's."""
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0, max_tokens=24, guidance=SPECS[0], min_tokens=11),
        SamplingParams(seed=1, max_tokens=24, ignore_eos=True, top_p=0.8, presence_penalty=1.5),
        SamplingParams(seed=2, max_tokens=24, guidance=SPECS[2], top_k=20, top_p=0.9, n=2),
        SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.3, min_tokens=20),
        SamplingParams(
            seed=3, max_tokens=24, min_p=0.05, logit_bias=((7, 4.0), (9, -100.0)), ignore_eos=True, logprobs=2
        ),
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, min_tokens=3),
    ]
    prompts = [PROMPTS[4] if index in (0, 6) else prompt for index, prompt in enumerate(PROMPTS[:7])]
    options = {"block_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 20, "kv_cache_bytes": "256KiB"}
    with LLM(str(tiny("llama")), device="cpu", num_speculative_tokens=drafts, **options) as llm:
        together = [[s.token_ids for s in c.samples] for c in llm.generate(prompts, params)]
        alone = [[s.token_ids for s in llm.generate([p], q)[0].samples] for p, q in zip(prompts, params, strict=True)]
        stats = llm.engine.stats()
    assert together == alone
    assert stats.used_blocks == 0
    assert (stats.num_draft_tokens > 0) == (drafts > 0)
