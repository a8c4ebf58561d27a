"""Every scheme and cache format through the engine on the GPU's kernels, against the engine on the torch reference.

Weights are random. What was found is printed: run with -s.
"""

import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.errors import UnsupportedError
from atom.models.dummy import SHAPES
from atom.quant.presets import KV_SUFFIXES, PRESETS
from atom.serving.llm import LLM
from atom.serving.sampling_params import SamplingParams

NEW = 40
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
DRAW = random.Random(7)
# one token; around a block of 16; one that is computed in chunks; two that begin alike
COMMON = [DRAW.randrange(258) for _ in range(40)]
PROMPTS = [[DRAW.randrange(258) for _ in range(length)] for length in (1, 3, 15, 16, 17, 90, 300)] + [
    [*COMMON, 7],
    [*COMMON, 9, 30],
]
CACHES = ("kv4", "kv8", "kvfp8")
REFUSED = [name for name in KV_SUFFIXES if name not in (*CACHES, "kv16")]
SCHEMES = (*PRESETS, *(f"bf16+{name}" for name in CACHES), "w4a8+kv8", "w4a4+kvfp8")
OPTIONS: dict[str, Any] = {"load_format": "dummy", "max_model_len": 512, "kv_cache_bytes": "64MiB"}


def scored(folder: Path, scheme: str, texts: list[list[int]], **options: Any) -> torch.Tensor:
    """Log-probabilities of all tokens of the texts but their first ones, from the torch reference."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with LLM(str(folder), scheme=scheme, kernels="reference", **OPTIONS, **options) as llm:
        found = llm.generate(texts, params)
    return torch.tensor([each.logprob for completion in found for each in completion.prompt_logprobs or ()])


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Of prompts in chunks beside decodes, and of decoded tokens; no further off than the reference in float32 is."""
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    compare(tmp_path, scheme, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("cache", REFUSED)
def test_caches_without_kernels_are_refused(tmp_path: Path, cache: str) -> None:
    write_model(tmp_path)
    with pytest.raises(UnsupportedError, match="Pass --kernels reference"):
        LLM(str(tmp_path), scheme=f"bf16+{cache}", device="cuda", dtype="bfloat16", **OPTIONS)


def write_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**SHAPES["tiny"], **SIZES, "head_dim": 128}))


def compare(folder: Path, scheme: str, device: str) -> None:
    write_model(folder)
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    with LLM(
        str(folder),
        scheme=scheme,
        device=device,
        dtype="bfloat16",
        max_num_seqs=8,
        max_num_batched_tokens=128,
        **OPTIONS,
    ) as llm:
        found = llm.generate(PROMPTS, params)
        kernels = llm.ready.facts["kernels"]
        assert llm.engine.stats().used_blocks == 0
    said = torch.tensor(
        [
            each.logprob
            for completion in found
            for each in (*(completion.prompt_logprobs or ()), *(completion.samples[0].logprobs or ()))
        ]
    )
    texts = [[*prompt, *completion.token_ids] for prompt, completion in zip(PROMPTS, found, strict=True)]
    assert len(said) == sum(map(len, texts)) - len(texts)
    gc.collect()
    reference, other = (scored(folder, scheme, texts, device=device, dtype=dtype) for dtype in ("bfloat16", "float32"))
    change, itself = (float((x - reference).abs().mean()) for x in (said, other))
    print(
        f"\n{scheme}: engine and reference {change:.5f} nats a token apart, the reference in bfloat16 and float32 "
        f"{itself:.5f}, tokens among each other {float(reference.std()):.3f}; {kernels}"
    )
    assert change <= 1.5 * itself + 2e-3 and itself < float(reference.std())
