"""A model over the paged cache with the sm_90a kernels, run as PTX on a CPU: host code, plans, buffers and kernels."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atom.errors import UnsupportedError
from atom.kernels import attention_sm90, prefill_sm90
from atom.kernels.attention_config import SHARED_BYTES, AppendConfig, DecodeConfig, GatherConfig
from atom.kernels.attention_plan import SEGMENT_FIELDS
from atom.kernels.attention_refusals_sm90 import refuses_attention
from atom.kernels.paged_attention import PAGED_ATTENTION
from atom.kernels.registry import Problem
from atom.kernels.rope_append import ROPE_APPEND_KV
from atom.quant.presets import KV4
from atom.serving.kv_pool import KVPool, PagedKV, _has_key_offset

from ..serving.test_kv_pool import RAW, SCHEMES, Cache, chunked, small_model
from .ptx_emulator import Kernel
from .ptx_emulator import Tensor as Argument
from .test_attention_sm90 import needs_dsl

DECODE_STATIC = {0: (2,), 1: (2,), 8: (2,), 9: (1, 2)} | dict.fromkeys((6, 7, 10, 12, 13, 14, 15), (1,))
GATHER_STATIC = {0: (2,), 1: (1,), 2: (2,), 3: (2,)}
APPEND_STATIC = {0: (2,), 1: (2,), 2: (2,), 3: (1,), 4: (1,), 6: (1,), 7: (1,), 8: (1,), 9: (2,), 10: (2,)}


def emulated(
    kernel: Kernel, static: dict[int, tuple[int, ...]], sizes: set[int], shape: Callable[..., Any]
) -> Callable[..., None]:
    """A compiled kernel's stand-in: takes its arguments, runs its PTX, writes into the tensors.

    sizes  that constant dimensions may have
    """

    def run(*arguments: Any) -> None:
        grid, threads, shared = shape(*arguments)
        passed = []
        for index, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                assert all(argument.shape[dim] in sizes for dim in static.get(index, ())), f"argument {index}"
                signed = argument.view(torch.int32) if argument.dtype == torch.uint32 else argument
                signed = signed.view(torch.int16) if signed.dtype == torch.bfloat16 else signed
                assert signed.is_contiguous()
                passed.append(Argument(signed.numpy(), static.get(index, ())))
            else:
                passed.append(argument)
        kernel.launch(grid, threads, passed, shared)

    return run


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled as ever, and their PTX is run."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from atom.kernels.kv_gather_sm90 import compile_gather
    from atom.kernels.paged_decode_sm90 import compile_decode
    from atom.kernels.rope_append_sm90 import compile_append

    options = f"--keep-ptx --dump-dir {tmp_path}"

    @lru_cache
    def decode(config: DecodeConfig) -> Callable[..., None]:
        kernel = Kernel(compile_decode(config, options).__ptx__)  # type: ignore[attr-defined]
        shared = SHARED_BYTES // config.ctas_per_sm
        sizes = {config.head_dim, config.head_dim // 2, config.tile_bytes, config.queries, SEGMENT_FIELDS, 4}
        return emulated(kernel, DECODE_STATIC, sizes, lambda *a: ((len(a[5]) - 1, 1), config.threads, shared))

    @lru_cache
    def append(config: AppendConfig) -> Callable[..., None]:
        kernel = Kernel(compile_append(config, options).__ptx__)  # type: ignore[attr-defined]
        threads = 32 * config.warps

        def shape(*a: Any) -> Any:
            return (config.ctas(len(a[0]), a[0].shape[1], a[1].shape[1]), 1), threads, 1024

        return emulated(kernel, APPEND_STATIC, {config.head_dim, config.head_dim // 2, config.cache.tile_bytes}, shape)

    @lru_cache
    def gather(config: GatherConfig) -> Callable[..., None]:
        kernel = Kernel(compile_gather(config, options).__ptx__)  # type: ignore[attr-defined]
        sizes = {4, config.head_dim // 2, config.cache.tile_bytes}
        return emulated(kernel, GATHER_STATIC, sizes, lambda *a: ((len(a[1]), a[0].shape[1]), config.threads, 1024))

    monkeypatch.setattr(prefill_sm90, "gather_kernel", gather)
    monkeypatch.setattr(attention_sm90, "decode_kernel", decode)
    monkeypatch.setattr(attention_sm90, "append_kernel", append)
    monkeypatch.setattr(attention_sm90, "multiprocessors", lambda device: 2)  # six CTAs: rows are split


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize(
    "name,scheme,split_tokens,rows",
    [
        ("qwen2", "int4", None, False),
        ("gemma3", "16 bits", 32, False),
        ("qwen3", "int4, centred and turned", None, False),
        ("gemma3", "int8", None, True),
    ],
)
def test_a_model_with_the_kernels(emulator: None, name: str, scheme: str, split_tokens: int | None, rows: bool) -> None:
    """Chunks and decodes in one batch, window and full layers; logits as with the references, to rounding."""
    RAW["larger"] = {**RAW[name], "head_dim": 64, "sliding_window": 20}
    try:
        model = small_model("larger", SCHEMES[scheme]).bfloat16()
    finally:
        del RAW["larger"]
    steps = (((0, 40),), ((0, 1), (1, 3)), ((1, 1), (0, 1)))
    wanted = chunked(Cache(model, 16), steps)
    cache = Cache(model, 16)
    cache.kv._append = attention_sm90.RopeAppendSm90(cache.pool.layout, rotates="turned" in scheme)
    has_offset = name == "qwen2"  # its keys have a loud bias
    cache.kv._attend = attention_sm90.PagedAttentionSm90(cache.pool.layout, False, split_tokens, has_offset)
    cache.rows = rows
    found = chunked(cache, steps)
    for sequence, logits in wanted.items():
        error = (found[sequence] - logits).float().norm(dim=1) / logits.float().norm(dim=1)
        assert float(error.max()) < 0.1, f"sequence {sequence}"
    windows = len(set(model.config.windows))
    sizes = 3 if rows else 1  # of batches that decode: buffers keep their places
    assert len(cache.kv._attend.buffers) == sizes * windows


def problem(**changes: Any) -> Problem:
    return Problem(**{"arch": "sm_90", "kv": KV4, "head_dim": 128, "num_heads": 32, "num_kv_heads": 8, **changes})


def test_the_kernels_run_unasked() -> None:
    assert PAGED_ATTENTION.choose(problem()).name == "paged_decode_sm90"
    assert ROPE_APPEND_KV.choose(problem()).name == "rope_append_sm90"
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        PAGED_ATTENTION.choose(problem(head_dim=72))


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"arch": "sm_100"}, "built for sm_90"),
        ({"head_dim": 72}, "multiple of 16"),
        ({"num_kv_heads": 1}, "at most 16 query heads"),
        ({"kv_pre_rope": True}, "before RoPE"),
        ({"dtype": "float16"}, "must be bfloat16"),
        ({"block_size": 8}, "16, 32 or 64"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in (refuses_attention(problem(**changes)) or "")


def test_buffers_keep_their_place_from_step_to_step() -> None:
    config = DecodeConfig("int4", 64, 1)
    buffers = attention_sm90.StepBuffers(3, 4, 20, 6, 6, config, "cpu")
    places = [t.data_ptr() for t in (buffers.lengths, buffers.rows, buffers.work, buffers.segments, buffers.merges)]
    assert all(place % 128 == places[0] % 128 for place in places)
    for lengths in ([5, 0, 400], [6, 1, 41]):
        plan = attention_sm90.plan_balanced(np.array(lengths), 16, 2, 4)
        buffers.fill(np.array(lengths), np.arange(3), plan)
        assert buffers.lengths.tolist() == lengths and buffers.rows.tolist() == [0, 1, 2]
        assert np.array_equal(buffers.work.numpy(), plan.work)
        assert np.array_equal(buffers.segments[: len(plan.segments)].numpy(), plan.segments)
        assert np.array_equal(buffers.merges[: len(plan.merges)].numpy(), plan.merges)
        assert not buffers.merges[len(plan.merges) :].any(), "rows that were split in an earlier step are gone"
    assert places[3] == buffers.segments.data_ptr()


def test_a_plan_serves_steps_in_which_sequences_only_grow() -> None:
    """Lengths alone are brought to the device then; another row's token, a new sequence or 32 steps need a new plan."""
    buffers = attention_sm90.StepBuffers(3, 4, 20, 6, 6, DecodeConfig("int4", 64, 1), "cpu")
    lengths, rows = np.array([5, 0, 400]), np.arange(3)
    assert not buffers.go_on(lengths, rows), "nothing is there yet"
    buffers.fill(lengths, rows, attention_sm90.plan_balanced(lengths, 16, 2, 4))
    segments = buffers.segments.clone()
    for other in (lengths, lengths + 1, lengths + np.array([1, 0, 2])):
        assert not buffers.go_on(other, rows)
    for step in range(1, attention_sm90.REPLAN_AFTER + 1):
        grown = lengths + step * (lengths > 0)
        assert buffers.go_on(grown, rows[::-1])
        assert buffers.lengths.tolist() == grown.tolist() and buffers.rows.tolist() == [2, 1, 0]
    assert torch.equal(buffers.segments, segments)
    assert not buffers.go_on(lengths + 33 * (lengths > 0), rows)


def test_the_pool_says_whether_keys_have_an_offset() -> None:
    """What reaches the builder: qwen2's biased keys have one, llama's do not, qwen3's bias stands before a norm."""
    for name, scheme, has_offset in (
        ("llama", "int4", False),
        ("qwen2", "int4", True),
        ("qwen3", "int4", False),
        ("qwen2", "int4, offset inside", False),
        ("qwen2", "16 bits", False),
    ):
        model = small_model(name, SCHEMES[scheme])
        kv = PagedKV(KVPool(model.config, model.scheme, 2))
        assert (kv.offset_apart and _has_key_offset(model.config, model.scheme)) == has_offset
