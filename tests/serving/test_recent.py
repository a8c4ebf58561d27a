"""The recent window over the paged cache: against the dense cache, in every way a step can run."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.calibration.config import CalibrationConfig
from atom.calibration.stream import quantize_model
from atom.errors import UnsupportedError
from atom.models.family import model_config
from atom.models.generate import generate
from atom.models.loader import load_model
from atom.models.model import Model
from atom.quant.presets import KV8, get_scheme
from atom.quant.schemes import CacheOverride, Scheme
from atom.serving.batch import Inherited
from atom.serving.engine_config import EngineConfig
from atom.serving.kv_pool import KVPool
from atom.serving.llm import LLM
from atom.serving.memory import plan_cache
from atom.serving.recent import RecentRoom, RecentTokens
from atom.serving.rows import MOST_TOKENS
from atom.serving.sampling_params import SamplingParams

from . import test_kv_pool
from .driven_steps import PROMPTS, drive
from .test_kv_pool import LLAMA, RAW, Cache, chunked, dense_logits, small_model, text

Tiny = Callable[[str], Path]

RECENT = replace(get_scheme("bf16+kv4"), kv_recent=16)
SCHEMES = {
    "centred and turned": RECENT,
    "32 tokens": replace(RECENT, kv_recent=32),
    "as keys come": replace(RECENT, kv_offset="none", kv_rotation="none"),
    "two bits": replace(get_scheme("bf16+kv2"), kv_recent=16),
    "fp8": replace(get_scheme("bf16+kvfp8"), kv_recent=16),
    "one layer in int8": replace(RECENT, kv_overrides=(CacheOverride(1, KV8),)),
}
MODELS = {
    **{name: RAW[name] for name in ("llama", "mqa", "qwen2", "qwen3", "yarn")},
    "sliding": {**RAW["gemma3"], "sliding_window": 40},
    "close": {**RAW["mistral"], "sliding_window": 33},
}
# prompts at once and in chunks below, of and beyond the window and the ring; decodes beside them, and alone
STEPS = (
    ((0, 45), (1, 16)),
    ((0, 1), (2, 4), (3, 1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((0, 17), (1, 0), (2, 1)),
    ((1, 20), (0, 1), (2, 1), (3, 15)),
    ((0, 1), (1, 33), (2, 50), (3, 1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((0, 2), (1, 3), (2, 1), (3, 30)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
)


TIGHT = 1_196_000  # bytes: ten blocks beside the exact tokens, where a text has six


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in MODELS.items():
        monkeypatch.setitem(test_kv_pool.RAW, name, {**raw, "max_position_embeddings": 256})


def cache_of(model: Model, drafts: int = 0, **options: Any) -> Cache:
    return Cache(model, room=RecentRoom(8, 128, drafts), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_and_decodes_equal_the_dense_cache(name: str, scheme: str) -> None:
    model = small_model(name, SCHEMES[scheme])
    for sequence, logits in chunked(cache_of(model), STEPS).items():
        expected = dense_logits(model, text(sequence, logits.shape[0]))
        check(logits, expected)
        rounded = dense_logits(replaced(model, kv_recent=0), text(sequence, logits.shape[0]))
        assert float(is_off(logits, rounded).float().mean()) > 0.4, "the window changed nothing"


def is_off(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs() > 2e-4 + 1e-4 * expected.abs()


def check(found: Tensor, expected: Tensor) -> None:
    """Equal to float rounding, but where it made the second layer's keys or values round to another code."""
    assert float(is_off(found, expected).float().mean()) < 0.05 and float((found - expected).abs().max()) < 0.05


def replaced(model: Model, **fields: Any) -> Model:
    """The same model with another scheme."""
    twin = copy.copy(model)
    assert model.scheme is not None
    twin.scheme = replace(model.scheme, **fields)
    return twin


@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 64])
def test_any_block_size(block_size: int) -> None:
    model = small_model("sliding", RECENT)
    cache = cache_of(model, block_size=block_size, num_blocks=512)
    for sequence, logits in chunked(cache, STEPS).items():
        check(logits, dense_logits(model, text(sequence, len(logits))))


def test_what_is_stored_in_blocks_is_what_it_is_without_a_window() -> None:
    model = small_model("llama", RECENT)
    cache, plain = cache_of(model), Cache(replaced(model, kv_recent=0))
    for each in (cache, plain):
        each.run([(0, text(0, 37))])
    assert torch.equal(cache.pool.layer(0), plain.pool.layer(0))


@pytest.mark.parametrize(
    "scheme", [RECENT, SCHEMES["32 tokens"], SCHEMES["one layer in int8"]], ids=["16", "32", "two"]
)
def test_tokens_as_rows_equal_the_dense_cache(scheme: Scheme) -> None:
    """Prompts and chunks shorter and longer than window and ring, beside decodes; then decodes alone."""
    model = small_model("llama", scheme)
    cache = Cache(model, room=RecentRoom(8, 1, row_tokens=128))
    cache.rows = True
    for sequence, logits in chunked(cache, STEPS).items():
        check(logits, dense_logits(model, text(sequence, len(logits))))


def test_which_steps_fit_as_rows() -> None:
    """What is new in texts of several tokens, and what lies before them, has to fit the area; decodes do not count."""
    cache = Cache(small_model("llama", RECENT), room=RecentRoom(8, 1, row_tokens=20))
    recent = cache.pool.recent
    assert recent is not None and recent.area_rows == 40
    assert recent.holds(cache.batch([(0, [1] * 40)])) and not recent.holds(cache.batch([(1, [1] * 41)]))
    assert recent.holds(cache.batch([(0, [1] * 25), (2, [5])])) and not recent.holds(cache.batch([(0, [1] * 26)]))
    assert not cache_of(cache.model).pool.recent.holds(cache.batch([(3, [1, 2])]))  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["centred and turned", "32 tokens", "one layer in int8"])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_behind_shared_blocks_the_ring_says_what_the_blocks_say(scheme: str, block_size: int, count: int) -> None:
    """The next tokens then read the newest of the prefix rounded: as if the window began with the prefix's end."""
    model = small_model("llama", SCHEMES[scheme])
    cache = cache_of(model, block_size=block_size, num_blocks=128)
    prefix = text(0, 64)
    cache.run([(0, [*prefix, 3])])
    recent = cache.pool.recent
    assert recent is not None
    cache.tables[1], cache.done[1] = cache.tables[0][: 64 // block_size], 64
    recent.rings[:, recent.capacity : 2 * recent.capacity] = float("nan")
    batch = cache.batch([(0, [5]), (1, text(1, count))])
    tables = batch.block_tables[1:]
    cache.kv.begin(replace(batch, inherited=Inherited(np.array([1]), np.array([64]), tables)))
    places = recent.capacity + torch.arange(64 - recent.tokens + 1, 64) % recent.capacity
    for layer, layout in enumerate(cache.pool.layouts):
        blocks = torch.tensor(cache.tables[0][: 64 // block_size])
        for part in (0, 1):
            rounded = layout.read(cache.pool.layer(layer)[blocks], part).transpose(1, 2).flatten(0, 1)
            assert torch.equal(recent.rings[layer, places, part], rounded[64 - recent.tokens + 1 :])
    hidden = model(torch.from_numpy(batch.token_ids).long(), torch.from_numpy(batch.positions).long(), cache.kv)
    found = model.logits(hidden)
    check(found[:1], dense_logits(model, [*prefix, 3, 5])[-1:])
    assert not found.isnan().any()


def test_wrong_drafts_leave_no_trace() -> None:
    """Five tokens are computed, one is kept: the next ones overwrite the others, and what they read is still there."""
    model = small_model("llama", RECENT)
    cache = cache_of(model, drafts=4)
    tokens = text(0, 60)
    cache.run([(0, tokens[:40])])
    for length in range(40, 60):
        found = cache.run([(0, [tokens[length], 9, 8, 7, 6])])[0]
        check(found[:1], dense_logits(model, tokens[: length + 1])[-1:])
        cache.done[0] = length + 1


@pytest.mark.parametrize("cache", [RECENT, SCHEMES["one layer in int8"]], ids=["one format", "two formats"])
@pytest.mark.parametrize(
    ("buckets", "pieces"), [((1, 2, 4, 8), ()), ((1, 2, 4, 8, 16, 24), ()), ((3,), ()), ((), (8, 24)), ((8,), (16, 32))]
)
def test_buckets_rows_and_pieces_change_no_token(
    tiny: Tiny, buckets: tuple[int, ...], pieces: tuple[int, ...], cache: Scheme
) -> None:
    """Preempted on the way, two steps under way; the same tokens as from steps that run as they are."""
    folder = tiny("llama")
    cache = replace(cache, kv_offset="none")  # of a checkpoint without centres
    expected, _ = drive(folder, "cpu", (), cache=cache)
    found, runner = drive(folder, "cpu", buckets, pieces=pieces, cache=cache)
    assert found == expected and runner.kv.pool.recent is not None


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they are, a 2-bit cache with a recent window: what is rounded, and what is not, changes tokens."""
    folder = tmp_path_factory.mktemp("recent") / "checkpoint"
    config = CalibrationConfig(calib=str(text_file), windows=4, window_length=32, gptq=False, device="cpu")
    quantize_model(str(tiny("llama")), SCHEMES["two bits"], folder, config)
    return folder


def greedy(model: Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    return [list(generate(model, prompt, count, eos=())) for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"kv_cache_bytes": TIGHT, "watermark": 0.0, "growth_blocks": 0, "max_model_len": 96},
        {"num_speculative_tokens": 4},
        {"attention_split_tokens": 32},
    ],
    ids=["plain", "in chunks", "preempted", "drafts", "split"],
)
def test_the_engine_equals_the_dense_cache(checkpoint: Path, options: dict[str, Any]) -> None:
    """Without prefixes of others: with them, the first tokens behind a prefix find it rounded."""
    prompts = [[*p, *p, *p][:60] for p in PROMPTS]
    model = load_model(checkpoint)
    assert model.scheme is not None and model.scheme.kv_recent == 16
    expected = greedy(model, prompts, 24)
    assert expected != greedy(replaced(model, kv_recent=0), prompts, 24)
    options = {"max_num_seqs": 4, "enable_prefix_caching": False, **options}
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with LLM(str(checkpoint), device="cpu", dtype="float32", **options) as llm:
        found = [list(completion.token_ids) for completion in llm.generate(prompts, params)]
        stats = llm.engine.stats()
    assert found == expected
    assert (stats.num_preemptions > 0) == ("growth_blocks" in options)
    assert (stats.num_accepted_tokens > 0) == ("num_speculative_tokens" in options)


def test_prefix_caching_serves_and_split_results_refuse_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever begins behind blocks of others has its ring filled: an equal prompt, and a second sample of one."""
    prompt, filled = [*PROMPTS[4], *PROMPTS[5]], []
    held = len(prompt) // 16 * 16
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    inherit = RecentTokens.inherit

    def watched(self: RecentTokens, inherited: Inherited, runs: Any) -> None:
        filled.append(inherited.starts.tolist())
        inherit(self, inherited, runs)

    monkeypatch.setattr(RecentTokens, "inherit", watched)
    with LLM(str(checkpoint), device="cpu", dtype="float32", max_num_seqs=2) as llm:
        first = llm.generate(prompt, params)[0]
        assert not filled
        again = llm.generate(prompt, params)[0]
        assert (first.cached_tokens, again.cached_tokens) == (0, held)
        assert len(again.token_ids) == 8 and filled == [[held]]
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "enable_prefix_caching": False, "max_num_seqs": 2}
    for split, count in ((None, 1), (32, 0)):
        filled.clear()
        with LLM(str(checkpoint), attention_split_tokens=split, **options) as llm:
            llm.generate(prompt, replace(params, n=2, temperature=1.0, seed=1))
        assert filled == [[held]] * count
    with pytest.raises(UnsupportedError, match=r"kv_recent.*enable_prefix_caching=False"):
        LLM(str(checkpoint), device="cpu", dtype="float32", attention_split_tokens=32)


def test_rings_are_counted() -> None:
    config = model_config({**LLAMA, "num_hidden_layers": 3})
    options = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, num_speculative_tokens=2)
    plan = plan_cache(config, RECENT, torch.bfloat16, options, 2**20, is_cpu=True)
    room = RecentRoom(4, 64, 2)
    pool = KVPool(config, RECENT, plan.num_blocks, 16, torch.bfloat16, room=room)
    row = 2 * config.num_kv_heads * config.head_dim * 2
    assert plan.recent_bytes == row * (3 * (4 + 1) * 32 + 64)  # rings of 16 + 2 rows, in sixteens
    assert pool.num_bytes == plan.num_bytes <= 2**20 < plan.num_bytes + plan.block_bytes
    assert pool.recent is not None and pool.recent.num_bytes == plan.recent_bytes
    with_rows = plan_cache(config, RECENT, torch.bfloat16, options, 2**22)  # on a GPU
    assert with_rows.recent_bytes == plan.recent_bytes + row * 3 * 2 * MOST_TOKENS
    without = plan_cache(config, replace(RECENT, kv_recent=0), torch.bfloat16, options, 2**20)
    assert without.recent_bytes == 0 and without.num_blocks > plan.num_blocks
    with pytest.raises(UnsupportedError, match=r"beside .* of exact tokens of 4 sequences; .* lower max_num_seqs"):
        plan_cache(config, RECENT, torch.bfloat16, options, plan.recent_bytes + 10, is_cpu=True)


def test_models_that_cannot_are_refused() -> None:
    narrow = model_config({**RAW["mistral"], "sliding_window": 16})
    with pytest.raises(UnsupportedError, match=r"sliding window of 16.*smaller --kv-recent"):
        KVPool(narrow, RECENT, 4, room=RecentRoom(1, 1))
