"""A model over the paged cache with the sm_90a kernels, run as PTX on a CPU: host code, plans, buffers and kernels."""

from typing import Any

import numpy as np
import pytest
import torch

from atom.errors import UnsupportedError
from atom.kernels import attention_sm90
from atom.kernels.append_sm90 import RopeAppendSm90
from atom.kernels.attention_config import DecodeConfig
from atom.kernels.attention_plan import plan_balanced
from atom.kernels.attention_refusals_sm90 import refuses_attention
from atom.kernels.paged_attention import PAGED_ATTENTION
from atom.kernels.registry import Problem
from atom.kernels.rope_append import ROPE_APPEND_KV
from atom.kernels.step_buffers_sm90 import REPLAN_AFTER, Scratch, StepBuffers
from atom.quant.presets import KV3, KV4, get_scheme
from atom.serving.kv_pool import KVPool, PagedKV, _has_key_offset
from atom.serving.recent import RecentRoom

from ..serving.test_kv_pool import RAW, SCHEMES, Cache, chunked, small_model
from .test_attention_sm90 import needs_dsl


@needs_dsl
@pytest.mark.slow
@pytest.mark.parametrize(
    "name,scheme,split_tokens,rows",
    [
        ("qwen2", "int4", None, False),
        ("gemma3", "16 bits", 32, False),
        ("qwen3", "int4, centred and turned", None, False),
        ("gemma3", "int8", None, True),
        ("qwen3", "newest exact", None, False),
        ("gemma3", "newest exact", 32, False),
        ("llama", "newest exact", None, True),
    ],
)
def test_a_model_with_the_kernels(emulator: None, name: str, scheme: str, split_tokens: int | None, rows: bool) -> None:
    """Chunks and decodes in one batch, window and full layers; logits as with the references, to rounding."""
    RAW["larger"] = {**RAW[name], "head_dim": 64, "sliding_window": 20}
    try:
        model = small_model("larger", {**SCHEMES, "newest exact": get_scheme("bf16+kv4r16")}[scheme]).bfloat16()
    finally:
        del RAW["larger"]
    steps = (((0, 40),), ((0, 1), (1, 3)), ((1, 1), (0, 1)))
    room = RecentRoom(2, 40, row_tokens=40)
    wanted = chunked(Cache(model, 16, room=room), steps)
    cache = Cache(model, 16, room=room)
    has_offset = name == "qwen2"  # its keys have a loud bias
    for ops, layout in zip(cache.kv._ops, dict.fromkeys(cache.pool.layouts), strict=True):
        ops.append = RopeAppendSm90(layout, rotates=model.scheme is not None and model.scheme.rotates_keys)
        ops.attend = attention_sm90.PagedAttentionSm90(layout, False, split_tokens, has_offset)
    cache.rows = rows
    found = chunked(cache, steps)
    for sequence, logits in wanted.items():
        error = (found[sequence] - logits).float().norm(dim=1) / logits.float().norm(dim=1)
        assert float(error.max()) < 0.1, f"sequence {sequence}"
    windows = len(set(model.config.windows))
    sizes = 3 if rows else 1  # of batches that decode: buffers keep their places
    assert all(len(ops.attend.buffers) == sizes * windows for ops in cache.kv._ops)


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
        ({"kv": KV3}, "int3 keys and values have no kernel; it reads int4, int8"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in (refuses_attention(problem(**changes)) or "")


def test_buffers_keep_their_place_from_step_to_step() -> None:
    config = DecodeConfig("int4", 64, 1)
    buffers = StepBuffers(3, 4, 20, Scratch(20, config, "cpu"), config, "cpu")
    places = [t.data_ptr() for t in (buffers.lengths, buffers.rows, buffers.work, buffers.segments)]
    assert all(place % 128 == places[0] % 128 for place in places)
    for lengths in ([5, 0, 400], [6, 1, 41]):
        plan = plan_balanced(np.array(lengths), 16, 2, 4)
        buffers.fill(np.array(lengths), np.arange(3), plan)
        assert buffers.lengths.tolist() == lengths and buffers.rows.tolist() == [0, 1, 2]
        assert np.array_equal(buffers.work.numpy(), plan.work)
        assert np.array_equal(buffers.segments[: len(plan.segments)].numpy(), plan.segments)
    assert places[3] == buffers.segments.data_ptr()


def test_a_plan_serves_steps_in_which_sequences_only_grow() -> None:
    """Lengths alone are brought to the device then; another row's token, a new sequence or 32 steps need a new plan."""
    config = DecodeConfig("int4", 64, 1)
    buffers = StepBuffers(3, 4, 20, Scratch(20, config, "cpu"), config, "cpu")
    lengths, rows = np.array([5, 0, 400]), np.arange(3)
    assert not buffers.go_on(lengths, rows), "nothing is there yet"
    buffers.fill(lengths, rows, plan_balanced(lengths, 16, 2, 4))
    segments = buffers.segments.clone()
    for other in (lengths, lengths + 1, lengths + np.array([1, 0, 2])):
        assert not buffers.go_on(other, rows)
    for step in range(1, REPLAN_AFTER + 1):
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
