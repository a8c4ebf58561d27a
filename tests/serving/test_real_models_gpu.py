"""The engine through the GPU's kernels on real models, against the torch reference and against `atom eval`.

ATOM_TEST_MODELS names a directory whose sub-directories are models or Atom checkpoints; ATOM_TEST_TEXT a text file for
perplexity (the prompts below otherwise). What was found is printed: run with -s.
"""

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.eval.perplexity import make_windows, measure_perplexity
from atom.eval.texts import Text
from atom.models.generate import scheme_cache
from atom.models.loader import load_model, load_tokenizer
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams

from .test_real_models import MODELS, PROMPTS

NEW = 200
WINDOW, WINDOWS = 512, 32
MORE = [
    "Question: Why is the sky blue?\nAnswer:",
    "The three primary colours are",
    "In 1969, the first humans",
    "To make bread, you need flour, water,",
    "Dear Sir or Madam,\n\nI am writing to",
]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="ATOM_TEST_MODELS names no directory with models"),
]
each_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)


@dataclass(frozen=True)
class Agreement:
    """One text of the engine's, scored by the reference token by token.

    first   index of the first token that the reference would not have taken; None if there is none
    margins by how much the reference's logit of its own choice exceeds that of the engine's, where they differ
    noise   largest difference of the two log-probabilities of a token that both take
    """

    first: int | None
    margins: list[float]
    noise: float


def agreement(model: Any, prompt: list[int], answer: Any) -> Agreement:
    """The reference reads the prompt and the engine's own answer: each position is compared at equal context."""
    ids = torch.tensor([*prompt, *answer.token_ids[:-1]], device=model.device)
    kv = scheme_cache(model)
    with torch.inference_mode():
        hidden = model(ids, kv.positions(len(ids)), kv)
        logits = model.logits(hidden[len(prompt) - 1 :]).float()
    chosen = torch.tensor(answer.token_ids, device=model.device)
    best = logits.argmax(-1)
    differs = best != chosen
    margins = (logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0])[differs].tolist()
    engine = torch.tensor([token.logprob for token in answer.logprobs], device=model.device)
    found = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    noise = float((engine - found).abs()[~differs].max())
    first = int(differs.nonzero()[0]) if len(margins) else None
    return Agreement(first, margins, noise)


@each_model
def test_greedy_text_is_the_references(path: Path) -> None:
    """For 200 tokens on ten prompts; where a token differs, the reference's logits of the two all but tie.

    All but: the margin is within what rounding moves the difference of two logits, twice the largest difference seen in
    one that both agree on.
    """
    tokenizer = load_tokenizer(path)
    prompts = [tokenizer.encode(text) for text in (*PROMPTS, *MORE)]
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(str(path), device="cuda", max_model_len=2048, kv_cache_bytes="1GiB", max_num_seqs=16) as llm:
        answers = [completion.samples[0] for completion in llm.generate(prompts, params)]
        used = llm.engine.stats().used_blocks
        print(f"\n{path.name}: {llm.ready.facts['kernels']}")
    assert used == 0
    release()
    model = load_model(path, "cuda", torch.bfloat16, kernels="reference")
    found = [agreement(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    noise = max(each.noise for each in found)
    for index, each in enumerate(found):
        margins = ", ".join(f"{margin:.3f}" for margin in each.margins)
        what = f"first differs at {each.first}, margins {margins}" if each.margins else f"equal for {NEW} tokens"
        print(f"{path.name}, prompt {index}: {what}; logprobs differ by at most {each.noise:.3f}")
    assert max((m for each in found for m in each.margins), default=0.0) <= 2 * noise
    assert noise < 1.0, "that is no rounding"
    assert sum(len(each.margins) for each in found) < 0.05 * NEW * len(found)


@each_model
def test_perplexity_is_evaluations(path: Path) -> None:
    """Prompt logprobs through the engine, in chunks of other sizes, against `atom eval` on kernels and reference."""
    tokenizer = load_tokenizer(path)
    file = os.environ.get("ATOM_TEST_TEXT")
    text = Text("text", "test", Path(file).read_text() if file else " ".join((*PROMPTS, *MORE)) * 40)
    windows = make_windows(tokenizer, text, window=WINDOW, limit=WINDOWS).tokens.tolist()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    options: dict[str, Any] = {"max_num_seqs": 64, "max_num_batched_tokens": 1000, "kv_cache_bytes": "1GiB"}
    with LLM(str(path), device="cuda", max_model_len=2048, **options) as llm:
        scored = llm.generate(windows, params)
    nll = [-each.logprob for completion in scored for each in completion.prompt_logprobs or ()]
    engine = sum(nll) / len(nll)
    release()
    found = {}
    for kernels in ("auto", "reference"):
        model = load_model(path, "cuda", torch.bfloat16, kernels=kernels)  # type: ignore[arg-type]
        measured = measure_perplexity(model, tokenizer, text, window=WINDOW, limit=WINDOWS)
        assert measured.tokens == len(nll)
        found[kernels] = measured.nll
        del model
        release()
    line = ", ".join(f"{name} {value:.5f}" for name, value in found.items())
    print(f"\n{path.name}: mean nll of {len(nll)} tokens: engine {engine:.5f}, atom eval: {line}")
    assert engine == pytest.approx(found["auto"], abs=2e-3)
    assert engine == pytest.approx(found["reference"], abs=1e-2)


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
