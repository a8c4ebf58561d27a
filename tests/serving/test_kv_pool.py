"""Models over the paged cache against the same models over the dense one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.errors import UnsupportedError
from atom.kernels.registry import Kernels
from atom.models.family import model_config
from atom.models.generate import scheme_cache
from atom.models.model import Model, build_model
from atom.quant.granularity import Group
from atom.quant.presets import KV4, KV4_WHOLE, KV8, KVFP8, get_scheme
from atom.quant.schemes import CacheOverride, Scheme
from atom.serving.batch import Batch, unsampled
from atom.serving.kv_pool import KVPool, PagedKV, bytes_per_block
from atom.serving.recent import RecentRoom
from atom.serving.rows import as_rows

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
RAW: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mqa": {**LLAMA, "num_key_value_heads": 1},
    "qwen2": {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7},
    "gemma3": {
        **LLAMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
    "yarn": {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
SCHEMES = {
    "16 bits": get_scheme("bf16"),
    "int4": get_scheme("bf16").with_kv(KV4),
    "int4, whole zero points": get_scheme("bf16").with_kv(KV4_WHOLE),
    "int8": get_scheme("bf16").with_kv(KV8),
    "fp8": get_scheme("bf16").with_kv(KVFP8),
    "int3": get_scheme("bf16+kv3"),
    "int2": get_scheme("bf16+kv2"),
    "int4 symmetric": get_scheme("bf16").with_kv(replace(KV4_WHOLE, symmetric=True)),
    "int4 before RoPE": replace(get_scheme("bf16").with_kv(KV4_WHOLE), kv_pre_rope=True),
    "int4, offset inside": replace(get_scheme("bf16").with_kv(KV4_WHOLE), kv_offset="none"),
    "int4, centred and turned": get_scheme("bf16+kv4"),
    "int4, one layer in int8": replace(get_scheme("bf16+kv4"), kv_overrides=(CacheOverride(1, KV8),)),
    "fp8, turned": replace(get_scheme("bf16+kvfp8"), kv_offset="none"),
}
LENGTHS = (37, 16, 5, 1)  # beyond two blocks, a whole one, a part, one token
BLOCK = 16


def small_model(name: str, scheme: Scheme | None = None) -> Model:
    model = build_model(model_config(RAW[name])).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise + 1 if key.endswith("norm.weight") else noise
        if key.endswith("k_proj.bias"):
            parameter.data[::5] += 20.0
    model.scheme = scheme
    if scheme is not None and scheme.stores_key_centre:
        for layer in model.model.decoder_layers():
            shape = (model.config.num_kv_heads, model.config.head_dim)
            layer.self_attn.key_centre = torch.randn(shape, generator=generator) * 0.5
    return model.requires_grad_(False)


class Cache:
    """A poisoned pool and, for each sequence, scattered blocks and what has been computed of it.

    rows  every token runs as a sequence of its own
    """

    rows = False

    def __init__(
        self,
        model: Model,
        block_size: int = BLOCK,
        num_blocks: int = 64,
        seed: int = 0,
        device: str = "cpu",
        kernels: Kernels = "auto",
        room: RecentRoom | None = None,
    ) -> None:
        self.pool = KVPool(model.config, model.scheme, num_blocks, block_size, model.dtype, device, room)
        for layer in range(model.config.num_layers):
            self.pool.layer(layer).fill_(255)  # NaN in every float, bfloat16 words included
        self.kv = PagedKV(self.pool, kernels)
        self.model = model
        self.free = np.random.default_rng(seed).permutation(num_blocks).tolist()
        self.tables: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}

    def run(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """One step: for each (sequence, its next tokens) the logits of these tokens."""
        batch = self.batch(work)
        self.kv.begin(as_rows(batch) if self.rows else batch)
        positions = torch.from_numpy(batch.positions).long().to(self.pool.device)
        hidden = self.model(torch.from_numpy(batch.token_ids).long().to(self.pool.device), positions, self.kv)
        self.kv.finish()
        logits = self.model.logits(hidden)
        return [logits[a:b] for a, b in zip(batch.cu_seqlens_q[:-1], batch.cu_seqlens_q[1:], strict=True)]

    def batch(self, work: Sequence[tuple[int, Sequence[int]]]) -> Batch:
        size = self.pool.block_size
        starts = [self.done.get(name, 0) for name, _ in work]
        ends = [start + len(tokens) for start, (_, tokens) in zip(starts, work, strict=True)]
        for (name, _), end in zip(work, ends, strict=True):
            table = self.tables.setdefault(name, [])
            while len(table) * size < end:
                table.append(self.free.pop())
            self.done[name] = end
        tables = np.zeros((len(work), max(len(self.tables[name]) for name, _ in work)), dtype=np.int32)
        for row, (name, _) in enumerate(work):
            tables[row, : len(self.tables[name])] = self.tables[name]
        positions = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in zip(starts, ends, strict=True)])
        owner = np.repeat(np.arange(len(work)), np.array(ends) - np.array(starts))
        slots = tables[owner, positions // size].astype(np.int64) * size + positions % size
        return unsampled(
            token_ids=np.concatenate([np.array(tokens, dtype=np.int32) for _, tokens in work]),
            positions=positions,
            slots=slots,
            cu_seqlens_q=np.concatenate(([0], np.cumsum([len(t) for _, t in work]))).astype(np.int32),
            seqlens_k=np.array(ends, dtype=np.int32),
            block_tables=tables,
            lanes=np.array([name for name, _ in work], dtype=np.int32),
        )


def text(name: int, length: int) -> list[int]:
    return [(7 * i + 13 * name + i * i) % 61 for i in range(length)]


def dense_logits(model: Model, tokens: list[int]) -> Tensor:
    kv = scheme_cache(model)
    return model.logits(model(torch.tensor(tokens), kv.positions(len(tokens)), kv))


def chunked(cache: Cache, steps: Sequence[Sequence[tuple[int, int]]]) -> dict[int, Tensor]:
    """Logits of sequences run in steps of (sequence, number of tokens), joined."""
    found: dict[int, list[Tensor]] = {}
    for step in steps:
        work = []
        for name, count in step:
            start = cache.done.get(name, 0)
            work.append((name, text(name, start + count)[start:]))
        for (name, _), logits in zip(work, cache.run(work), strict=True):
            found.setdefault(name, []).append(logits)
    return {name: torch.cat(parts) for name, parts in found.items()}


# decodes beside chunks; chunks that end at, before and after a block's edge; a sequence without tokens in a step
STEPS = (
    ((0, 15), (1, 16)),
    ((0, 1), (2, 4), (3, 1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((0, 17), (1, 0), (2, 1)),
    ((1, 1), (0, 1), (2, 1), (3, 15)),
    ((0, 1), (1, 14), (2, 10), (3, 1)),
)


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_and_decodes_equal_the_dense_cache(name: str, scheme: str) -> None:
    model = small_model(name, SCHEMES[scheme])
    for sequence, logits in chunked(Cache(model), STEPS).items():
        expected = dense_logits(model, text(sequence, logits.shape[0]))
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4, msg=lambda m: f"sequence {sequence}: {m}")  # noqa: B023


@pytest.mark.parametrize("name", RAW)
def test_tokens_as_rows_equal_the_dense_cache(name: str) -> None:
    model = small_model(name, SCHEMES["int4"])
    cache = Cache(model)
    cache.rows = True
    for sequence, logits in chunked(cache, STEPS).items():
        torch.testing.assert_close(logits, dense_logits(model, text(sequence, len(logits))), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_stored_equals_the_dense_cache_bit_for_bit(scheme: str) -> None:
    model = small_model("llama", SCHEMES[scheme])
    cache = Cache(model)
    tokens = text(0, 37)
    cache.run([(0, tokens)])
    dense = scheme_cache(model)
    model(torch.tensor(tokens), dense.positions(37), dense)
    blocks = torch.tensor(cache.tables[0])
    for part, stored in ((0, dense._keys[0]), (1, dense._values[0])):  # of layer 0: later ones carry rounding
        rows = cache.pool.layouts[0].read(cache.pool.layer(0)[blocks], part).transpose(0, 1).flatten(1, 2)
        assert torch.equal(rows[:, :37], stored[0])


@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 64])
def test_any_block_size(block_size: int) -> None:
    model = small_model("gemma3", SCHEMES["int4"])
    cache = Cache(model, block_size, num_blocks=128)
    for sequence, logits in chunked(cache, STEPS).items():
        torch.testing.assert_close(logits, dense_logits(model, text(sequence, len(logits))), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["16 bits", "int4", "fp8"])
def test_a_decode_is_the_same_alone_and_in_a_batch(scheme: str) -> None:
    """Bit for bit, as far as attention goes; torch's matrix products differ with the number of rows."""
    model = small_model("llama", SCHEMES[scheme])
    cache = Cache(model)
    for name, length in enumerate(LENGTHS):
        cache.run([(name, text(name, length))])
    pool, kv = cache.pool, cache.kv
    layer = next(model.model.decoder_layers()).self_attn
    names = list(range(len(LENGTHS)))
    batch = cache.batch([(name, [1]) for name in names])
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(names), 4, 16, generator=generator)
    k, v = torch.randn(2, len(names), 2, 16, generator=generator)
    rope = next(model.model.decoder_layers()).rope
    kv.begin(batch)
    together = kv.attend(0, q, k, v, rope(torch.from_numpy(batch.positions).long()), layer._spec())
    for row in names:
        one = replace(
            batch,
            positions=batch.positions[row : row + 1],
            slots=batch.slots[row : row + 1],
            cu_seqlens_q=np.array([0, 1], dtype=np.int32),
            seqlens_k=batch.seqlens_k[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
        )
        kv.begin(one)
        rotation = rope(torch.from_numpy(one.positions).long())
        part = slice(row, row + 1)
        assert torch.equal(kv.attend(0, q[part], k[part], v[part], rotation, layer._spec()), together[part])
    assert pool.num_bytes == sum(pool.layer(i).numel() for i in range(model.config.num_layers))


def test_shared_blocks_are_read_by_both() -> None:
    model = small_model("llama", SCHEMES["int4"])
    cache = Cache(model)
    prefix = text(0, 32)
    cache.run([(0, [*prefix, 3])])
    cache.tables[1] = cache.tables[0][:2]
    cache.done[1] = 32
    logits = cache.run([(0, [5]), (1, [9, 8, 7])])
    torch.testing.assert_close(logits[1], dense_logits(model, [*prefix, 9, 8, 7])[-3:], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[0], dense_logits(model, [*prefix, 3, 5])[-1:], atol=2e-4, rtol=1e-4)


def test_nothing_outside_the_slots_is_written() -> None:
    model = small_model("llama", SCHEMES["int4"])
    cache = Cache(model)
    cache.run([(0, text(0, 17))])
    written = torch.zeros(64, dtype=torch.bool)
    written[cache.tables[0]] = True
    storage = torch.stack([cache.pool.layer(index) for index in range(model.config.num_layers)])
    assert bool((storage[:, ~written] == 255).all())
    tail = storage[:, cache.tables[0][1]]
    layout = cache.pool.layouts[0]
    assert bool((layout.codes(tail, 0)[:, :, 1:] == 255).all() and layout.words(tail, 1)[:, :, 1:].isnan().all())


def test_dynamic_rope_follows_each_sequence_alone() -> None:
    """Beyond the pretrained length the frequencies follow the text's length: its own, not the batch's longest."""
    raw = {**LLAMA, "max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    RAW["dynamic"] = raw
    try:
        model = small_model("dynamic", SCHEMES["16 bits"])
    finally:
        del RAW["dynamic"]
    logits = chunked(Cache(model), [((0, 30), (1, 12)), ((0, 1), (1, 1))])
    for sequence, count in ((0, 30), (1, 12)):
        kv = scheme_cache(model)
        parts = [model.logits(model(torch.tensor(part), kv.positions(len(part)), kv))
                 for part in (text(sequence, count), text(sequence, count + 1)[-1:])]  # fmt: skip
        torch.testing.assert_close(logits[sequence], torch.cat(parts), atol=2e-4, rtol=1e-4)
    with pytest.raises(UnsupportedError, match=r"keys before dynamic RoPE is not supported.*kv_pre_rope=False"):
        PagedKV(KVPool(model.config, SCHEMES["int4 before RoPE"], 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_per_block_is_what_a_pool_takes(scheme: str) -> None:
    config = model_config(LLAMA)
    for dtype in (torch.float32, torch.bfloat16):
        pool = KVPool(config, SCHEMES[scheme], 3, 16, dtype)
        assert pool.num_bytes == 3 * bytes_per_block(config, SCHEMES[scheme], dtype, 16)


def test_bytes_of_a_real_shape() -> None:
    """Llama-3-8B: 4.25 bits an element at head_dim 128, 34,816 bytes a token; nothing is lost to filling."""
    raw = {**LLAMA, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = model_config(raw)
    assert bytes_per_block(config, SCHEMES["int4"], torch.bfloat16, 16) == 16 * 34816
    assert bytes_per_block(config, SCHEMES["16 bits"], torch.bfloat16, 16) == 16 * 131072
    assert bytes_per_block(config, None, torch.bfloat16, 16) == 16 * 131072
    assert bytes_per_block(config, SCHEMES["int8"], torch.bfloat16, 16) == 16 * 2 * 32 * 8 * (128 + 4)


def test_formats_without_a_layout_are_refused() -> None:
    config = model_config(LLAMA)
    for spec, reason in (
        (replace(KV4_WHOLE, format="e2m1", symmetric=True), "e2m1.*choose one of"),
        (replace(KV4_WHOLE, scale_format="fp32"), "bf16 scales"),
        (replace(KV4_WHOLE, granularity=Group(8)), "one scale per token and head"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            bytes_per_block(config, SCHEMES["int4"].with_kv(spec), torch.float32, 16)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        KVPool(config, None, 0)
