"""Generation through the whole engine on tiny models, against the plain loop of atom/models/generate.py."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.models.dummy import dummy_source
from atom.models.generate import generate
from atom.models.kv import DenseKV
from atom.models.loader import load_model, load_source
from atom.models.model import Model
from atom.quant.presets import PRESETS, get_scheme
from atom.serving.errors import EngineDeadError, InvalidRequestError, StepFailedError
from atom.serving.llm import LLM
from atom.serving.request import FinishReason
from atom.serving.sampling_params import SamplingParams

Tiny = Callable[[str], Path]
DRAW = random.Random(5)
COMMON = [DRAW.randrange(256) for _ in range(21)]
# one token; below, at and above a block of 4; several chunks of 16; two with a common beginning
PROMPTS = [[DRAW.randrange(256) for _ in range(length)] for length in (1, 3, 4, 5, 40)] + [
    [*COMMON, 7],
    [*COMMON, 9, 30],
]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SMALL: dict[str, Any] = {
    "block_size": 4,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "device": "cpu",
    "kv_cache_bytes": "8MiB",
}


@torch.inference_mode()
def expected(model: Model, params: SamplingParams = GREEDY) -> list[tuple[int, ...]]:
    assert params.max_tokens is not None
    return [tuple(generate(model, prompt, params.max_tokens, eos=())) for prompt in PROMPTS]


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "qwen3", "mistral", "gemma3"])
def test_greedy_is_what_the_plain_loop_yields(tiny: Tiny, name: str) -> None:
    wanted = expected(load_model(tiny(name)))
    with LLM(str(tiny(name)), **SMALL) as llm:
        assert tokens(llm) == wanted  # together
        assert [tokens(llm, [prompt])[0] for prompt in PROMPTS] == wanted  # alone, their prefixes now in the cache
        assert llm.engine.stats().num_prefix_hits > 0
        assert llm.engine.stats().used_blocks == 0


@pytest.mark.parametrize("scheme", [*PRESETS, "bf16+kv4", "w4a8+kvfp8"])
def test_every_scheme(scheme: str) -> None:
    wanted = expected(load_source(dummy_source("tiny", get_scheme(scheme))))
    assert len(set(wanted)) > 1  # the model does listen to its prompt
    with LLM("tiny", load_format="dummy", scheme=scheme, **SMALL) as llm:
        assert tokens(llm) == wanted


@pytest.mark.parametrize(
    ("limits", "happens"),
    [
        ({"enable_prefix_caching": False}, "nothing"),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 3}, "nothing"),
        # 13 blocks of 4 hold one sequence of 52 tokens; all of them need 40
        (
            {"max_model_len": 53, "kv_cache_bytes": 13 * 4 * 3 * 2 * 2 * 32 * 4, "watermark": 0.0, "growth_blocks": 0},
            "preemption",
        ),
    ],
)
def test_limits_change_no_token(tiny: Tiny, limits: dict[str, Any], happens: str) -> None:
    wanted = expected(load_model(tiny("llama")))
    with LLM(str(tiny("llama")), **{**SMALL, **limits}) as llm:
        assert tokens(llm) == wanted
        assert (llm.engine.stats().num_preemptions > 0) == (happens == "preemption")


def test_speculation_changes_no_token(tiny: Tiny) -> None:
    """Prompts that repeat themselves, with logprobs, beside sequences that are drawn."""
    prompts = [prompt * 3 for prompt in PROMPTS[:4]] + [[5, 6, 7] * 12]
    params = [SamplingParams(max_tokens=40, temperature=0, logprobs=1, ignore_eos=True)] * 4
    params.append(SamplingParams(max_tokens=40, seed=1, presence_penalty=0.5, ignore_eos=True))
    found = []
    for drafts in (0, 3):
        with LLM(str(tiny("llama")), **SMALL, num_speculative_tokens=drafts, prompt_lookup_min=1) as llm:
            found.append(llm.generate(prompts, params))
            stats = llm.engine.stats()
    assert [c.token_ids for c in found[0]] == [c.token_ids for c in found[1]]
    for plain, guessed in zip(*found, strict=True):
        logprobs = [[each.logprob for each in c.samples[0].logprobs or ()] for c in (plain, guessed)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert stats.num_accepted_tokens > 0 and stats.used_blocks == 0


def test_samples_with_a_seed_are_the_same_alone_and_in_any_batch(tiny: Tiny) -> None:
    params = [SamplingParams(max_tokens=10, seed=seed, temperature=1.0, n=3, ignore_eos=True) for seed in range(7)]

    def samples(llm: LLM, picks: list[int]) -> list[list[tuple[int, ...]]]:
        found = llm.generate([PROMPTS[i] for i in picks], [params[i] for i in picks])
        return [[sample.token_ids for sample in completion.samples] for completion in found]

    with LLM(str(tiny("llama")), **SMALL) as llm:
        together = samples(llm, list(range(7)))
        assert [samples(llm, [i])[0] for i in range(7)] == together
        assert samples(llm, [6, 0, 3]) == [together[6], together[0], together[3]]
    assert len({tuple(sample) for each in together for sample in each}) == 21


@torch.inference_mode()
def test_logprobs_of_prompts_and_outputs(tiny: Tiny) -> None:
    model = load_model(tiny("llama"))
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=3, ignore_eos=True)
    with LLM(str(tiny("llama")), **SMALL) as llm:
        found = llm.generate(PROMPTS, params)
        plain = llm.generate(PROMPTS[:1], GREEDY)[0]
    assert plain.prompt_logprobs is None and plain.samples[0].logprobs is None
    for prompt, completion in zip(PROMPTS, found, strict=True):
        text = [*prompt, *completion.token_ids]
        kv = DenseKV(model.config)
        logits = model.logits(model(torch.tensor(text), kv.positions(len(text)), kv))
        wanted = logits.log_softmax(-1)
        of_prompt, of_output = completion.prompt_logprobs or (), completion.samples[0].logprobs or ()
        assert [len(of_prompt), len(of_output)] == [len(prompt) - 1, 5]
        for position, got in enumerate([*of_prompt, *of_output]):
            assert got.token_id == text[position + 1]
            assert got.logprob == pytest.approx(float(wanted[position, got.token_id]), abs=1e-4)
            assert got.rank == 1 + int((wanted[position] > wanted[position, got.token_id]).sum())
            best = wanted[position].topk(3 if position + 1 < len(prompt) else 2)
            assert [token for token, _ in got.top] == best.indices.tolist()
            assert [value for _, value in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_text_stop_strings_and_eos(tiny: Tiny) -> None:
    with LLM(str(tiny("llama")), **SMALL) as llm:
        whole = llm.generate("shall we", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))[0]
        assert whole.prompt == "shall we" and whole.finish_reason is FinishReason.LENGTH
        assert whole.text == llm.tokenizer.decode(whole.token_ids)
        stop = whole.text[9:11]
        cut = llm.generate("shall we", SamplingParams(max_tokens=30, temperature=0, stop=(stop,), ignore_eos=True))[0]
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason is FinishReason.STOP and cut.samples[0].stop_reason == stop
        last = whole.token_ids[4]
        by_id = llm.generate("shall we", SamplingParams(max_tokens=30, temperature=0, stop_token_ids=(last,)))[0]
        assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(last) + 1]
        assert by_id.samples[0].stop_reason == last
        assert by_id.text == llm.tokenizer.decode(by_id.token_ids[:-1])
        assert llm.engine.stats().used_blocks == 0


def test_chat_uses_the_template(tiny: Tiny) -> None:
    with LLM(str(tiny("llama")), **SMALL) as llm:
        message = {"role": "user", "content": "hello"}
        with pytest.raises(InvalidRequestError, match="no chat template; use generate"):
            llm.chat([message])
        llm.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
        one = llm.chat([message], GREEDY)[0]
        assert one.prompt == "[user]hello[assistant]"
        two = llm.chat([[message], [message, message]], GREEDY)
        assert [c.prompt for c in two] == ["[user]hello[assistant]", "[user]hello[user]hello[assistant]"]
        assert two[0].token_ids == one.token_ids == llm.generate(one.prompt, GREEDY)[0].token_ids


def test_more_prompts_than_the_queue_holds(tiny: Tiny) -> None:
    seen: list[tuple[int, int]] = []
    limits = {"max_waiting_requests": 3, "max_waiting_tokens": 50, "max_num_seqs": 2}
    with LLM(str(tiny("llama")), **{**SMALL, **limits}) as llm:
        found = llm.generate(
            [[index % 200, 3] for index in range(20)],
            SamplingParams(max_tokens=2, n=2),
            progress=lambda done, total: seen.append((done, total)),
        )
    assert [completion.prompt_token_ids[0] for completion in found] == list(range(20))
    assert seen[-1] == (40, 40) and seen == sorted(seen)


def test_several_threads_at_once(tiny: Tiny) -> None:
    """Each gets its own answers, also where the others fill the queue."""
    limits = {"max_waiting_requests": 3, "max_waiting_tokens": 150, "max_num_seqs": 2}
    with LLM(str(tiny("llama")), **{**SMALL, **limits}) as llm:
        wanted = tokens(llm)
        found: dict[int, list[tuple[int, ...]]] = {}

        def ask(index: int) -> None:
            found[index] = tokens(llm, PROMPTS[index:] + PROMPTS[:index])

        threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == {index: wanted[index:] + wanted[:index] for index in range(5)}
        assert not llm._calls and llm.engine.stats().used_blocks == 0


def test_refusals_and_failures(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(tiny("llama")), **SMALL) as llm:
        assert llm.generate([], GREEDY) == []
        with pytest.raises(InvalidRequestError, match="prompt has 200 tokens"):
            llm.generate([[1], [1] * 200], GREEDY)
        with pytest.raises(ValueError, match="2 sampling parameters came for 1 prompts"):
            llm.generate([[1]], [GREEDY, GREEDY])
        with pytest.raises(InvalidRequestError, match="must not be empty"):
            llm.chat([])

        def fail(step: Any) -> Any:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(llm.ready.runner, "launch", fail)
            with pytest.raises(StepFailedError, match="the log says why"):
                llm.generate([[1]], GREEDY)
        assert len(llm.generate([[1]], GREEDY)[0].token_ids) == 12  # it goes on
        llm.close()
        with pytest.raises(EngineDeadError):
            llm.generate([[1]], GREEDY)
    with LLM("tiny", load_format="dummy", **SMALL) as llm, pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("text")


@pytest.mark.parametrize("is_closed", [True, False])
def test_nothing_of_an_engine_stays_when_its_llm_is_gone(tiny: Tiny, is_closed: bool) -> None:
    """Else the next model of the same program would find the memory taken."""
    llm = LLM(str(tiny("llama")), **SMALL)
    tokens(llm)
    engine = weakref.ref(llm.engine)
    weights = weakref.ref(llm.ready.model)
    if is_closed:
        llm.close()
        llm.close()
        # a daemon thread that held the weights could free them while the interpreter ends, which aborts the process
        assert not [t for t in threading.enumerate() if t.name.startswith("atom-")]
    del llm
    started = time.monotonic()
    while (engine() is not None or weights() is not None) and time.monotonic() - started < 20:
        gc.collect()
        time.sleep(0.05)
    assert engine() is None and weights() is None
    assert not [t for t in threading.enumerate() if t.name.startswith("atom-")]
