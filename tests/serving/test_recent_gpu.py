"""A recent window through the GPU's kernels: against the torch reference; captured, in pieces, alone, together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.kernels.registry import Kernels
from atom.models.generate import scheme_cache
from atom.models.model import Model
from atom.quant.presets import KV8, get_scheme
from atom.quant.schemes import CacheOverride, Scheme
from atom.serving.kv_pool import PagedKV
from atom.serving.llm import LLM
from atom.serving.recent import RecentRoom
from atom.serving.sampling_params import SamplingParams

from . import test_kv_pool
from .driven_steps import PROMPTS, drive
from .test_kv_pool import LLAMA, Cache, chunked, small_model, text
from .test_recent import MODELS, STEPS

Tiny = Callable[[str], Path]
pytestmark = pytest.mark.gpu

RECENT = replace(get_scheme("bf16+kv4r16"), kv_offset="none")
SCHEMES = {
    "int4": get_scheme("bf16+kv4r16"),
    "32 tokens": get_scheme("bf16+kv4r32"),
    "as keys come": replace(RECENT, kv_rotation="none"),
    "int8": get_scheme("bf16+kv8r16"),
    "fp8": get_scheme("bf16+kvfp8r16"),
    "two formats": replace(get_scheme("bf16+kv4r16"), kv_overrides=(CacheOverride(1, KV8),)),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_UNVERIFIED_KERNELS", "1")
    for name, raw in MODELS.items():
        monkeypatch.setitem(test_kv_pool.RAW, name, {**raw, "max_position_embeddings": 256})


def on_gpu(name: str, scheme: Scheme, dtype: torch.dtype) -> Model:
    model = small_model(name, scheme).to("cuda", dtype)
    for layer in model.model.decoder_layers():
        attention = layer.self_attn
        attention.key_centre = None if attention.key_centre is None else attention.key_centre.to("cuda")
    return model


def run(model: Model, kernels: Kernels) -> dict[int, torch.Tensor]:
    cache = Cache(model, device="cuda", kernels=kernels, room=RecentRoom(8, 128))
    return {name: logits.float() for name, logits in chunked(cache, STEPS).items()}


@pytest.mark.parametrize("name", ["llama", "qwen3", "sliding"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_chunks_and_decodes_equal_the_reference(name: str, scheme: str) -> None:
    """No further from float32 than torch's own bfloat16 is; a window that is not read would be."""
    found, plain = (run(on_gpu(name, SCHEMES[scheme], torch.bfloat16), kernels) for kernels in ("auto", "reference"))
    model = on_gpu(name, SCHEMES[scheme], torch.float32)
    blind = on_gpu(name, replace(SCHEMES[scheme], kv_recent=0), torch.float32)
    for sequence, logits in found.items():
        tokens = torch.tensor(text(sequence, len(logits)), device="cuda")
        exact, rounded = (dense(each, tokens) for each in (model, blind))
        error, usual, change = ((x - exact).norm() / exact.norm() for x in (logits, plain[sequence], rounded))
        print(f"{name}, {scheme}, sequence {sequence}: {error:.4f}, reference {usual:.4f}, blind {change:.4f}")
        assert not logits.isnan().any() and error < 1.5 * usual + 2e-3


def dense(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    kv = scheme_cache(model)
    return model.logits(model(tokens, kv.positions(len(tokens)), kv)).float()


@pytest.mark.parametrize("cache", [RECENT, replace(RECENT, kv_overrides=(CacheOverride(1, KV8),))], ids=["one", "two"])
@pytest.mark.parametrize(("buckets", "pieces"), [((1, 2, 4, 8, 16, 24), ()), ((1, 2, 4, 8), (12, 24))])
@pytest.mark.parametrize("num_blocks", [12, 60])
def test_graphs_change_no_token(
    tiny: Tiny, buckets: tuple[int, ...], pieces: tuple[int, ...], num_blocks: int, cache: Scheme
) -> None:
    """The same steps captured and not, with preemptions and without."""
    wanted, _ = drive(tiny("llama"), "cuda", buckets, False, pieces, num_blocks=num_blocks, cache=cache)
    found, runner = drive(tiny("llama"), "cuda", buckets, True, pieces, num_blocks=num_blocks, cache=cache)
    assert found == wanted and runner.kv.pool.recent is not None
    assert all(choice.name.endswith("sm90") for choice in runner.kv.choices)


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recent") / "checkpoint"
    config = CalibrationConfig(calib=str(text_file), windows=4, window_length=32, gptq=False, device="cpu")
    quantize_model(str(tiny("llama")), get_scheme("bf16+kv4r16"), folder, config)
    return folder


def test_a_text_is_the_same_alone_and_batched(checkpoint: Path) -> None:
    """With attention in fixed parts and no prefix cache; two samples of a prompt are two texts of their own."""
    prompts = [[*p, *p, *p][:60] for p in PROMPTS]
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    options: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_bytes": "64MiB", "enable_prefix_caching": False}
    with LLM(str(checkpoint), device="cuda", attention_split_tokens=32, **options) as llm:
        together = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
        alone = [list(llm.generate(prompt, params)[0].token_ids) for prompt in prompts]
        pairs = [c.samples for c in llm.generate(prompts[4:6], replace(params, n=2))]
    assert together == alone
    assert [[list(s.token_ids) for s in pair] for pair in pairs] == [[text] * 2 for text in together[4:6]]


@pytest.mark.parametrize("eager", [False, True])
def test_drafts_and_prefixes_serve(checkpoint: Path, eager: bool) -> None:
    prompts = [[*p, *p, *p][:60] for p in PROMPTS]
    params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    options: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_bytes": "64MiB", "enforce_eager": eager}
    with LLM(str(checkpoint), device="cuda", num_speculative_tokens=4, **options) as llm:
        first = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
        again = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
        stats = llm.engine.stats()
    agree = sum(a == b for texts in zip(first, again, strict=True) for a, b in zip(*texts, strict=True))
    print(f"\n{stats.num_prefix_hits} hits, {stats.num_accepted_tokens} guesses; {agree} of {50 * len(prompts)} alike")
    assert stats.num_prefix_hits > 0 and stats.num_accepted_tokens > 0 and stats.used_blocks == 0


def test_the_kernels_take_it() -> None:
    model = on_gpu("llama", RECENT, torch.bfloat16)
    cache = Cache(model, device="cuda", room=RecentRoom(8, 128))
    assert isinstance(cache.kv, PagedKV) and LLAMA["head_dim"] == 16
    assert [choice.name for choice in cache.kv.choices] == ["rope_append_sm90", "paged_decode_sm90"]
