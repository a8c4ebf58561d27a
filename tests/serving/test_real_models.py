"""The engine on real models, where a directory of them is at hand: against transformers, and against `atom eval`.

ATOM_TEST_MODELS names a directory whose sub-directories are models (config, safetensors, tokenizer).
"""

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.eval.perplexity import make_windows, measure_perplexity
from atom.eval.texts import Text
from atom.models.loader import load_model, load_tokenizer
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams

ROOT = os.environ.get("ATOM_TEST_MODELS", "")
MODELS = sorted(path.parent for path in Path(ROOT).glob("*/config.json")) if ROOT else []
PROMPTS = [
    "The capital of France is",
    "The aurochs was a large wild ox that lived in Europe, Asia and North Africa. It is the ancestor of domestic "
    "cattle. The last known animal died in the forest of Jaktorów in Poland in 1627, after a long decline in which",
    "def fibonacci(n):\n",
    "Once upon a time",
    "1, 2, 3, 4, 5,",
]
NEW = 24
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODELS, reason="ATOM_TEST_MODELS names no directory with models"),
]
each_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)


def transformers_greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        found.append(out[0, len(prompt) :].tolist())
    del model
    gc.collect()
    return found


@each_model
def test_greedy_equals_transformers(path: Path) -> None:
    prompts = [load_tokenizer(path).encode(text) for text in PROMPTS]
    wanted = transformers_greedy(path, prompts)
    params = SamplingParams(max_tokens=NEW, temperature=0)
    longest = max(map(len, prompts)) + NEW
    # the cache holds one long sequence and a little more: some are preempted
    for limits in ({}, {"enable_prefix_caching": False, "max_num_batched_tokens": 16}, {"max_model_len": longest}):
        options: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_bytes": "256MiB", **limits}
        if "max_model_len" in limits:
            options.update(
                kv_cache_bytes=_blocks_for(path, longest) * _block_bytes(path), watermark=0.0, growth_blocks=0
            )
        with LLM(str(path), dtype="float32", device="cpu", **options) as llm:
            together = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
            alone = [list(llm.generate(prompt, params)[0].token_ids) for prompt in prompts] if not limits else wanted
            assert (llm.engine.stats().num_preemptions > 0) == ("max_model_len" in limits)
        assert together == alone == wanted


def _blocks_for(path: Path, tokens: int) -> int:
    return -(-tokens // 16)


def _block_bytes(path: Path) -> int:
    from atom.models.family import model_config
    from atom.models.source import read_config
    from atom.serving.kv_pool import bytes_per_block

    return bytes_per_block(model_config(*read_config(path)), None, torch.float32, 16)


@each_model
def test_perplexity_equals_evaluations(path: Path) -> None:
    """Prompt logprobs through the engine, in chunks, against the measure of `atom eval`."""
    tokenizer = load_tokenizer(path)
    text = Text("aurochs", "test", " ".join(PROMPTS) * 3)
    measured = measure_perplexity(load_model(path), tokenizer, text, window=96)
    windows = make_windows(tokenizer, text, window=96).tokens.tolist()
    gc.collect()
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    options: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "kv_cache_bytes": "256MiB"}
    with LLM(str(path), dtype="float32", device="cpu", **options) as llm:
        found = llm.generate(windows, params)
    nll = [-each.logprob for completion in found for each in completion.prompt_logprobs or ()]
    assert len(nll) == measured.tokens
    assert sum(nll) / len(nll) == pytest.approx(measured.nll, abs=1e-4)  # float32, on logits of up to 30
