"""Attention of prompts and chunks on a GPU: against float64, in squares, in a batch and alone."""

import numpy as np
import pytest
import torch

from atom.kernels import prefill_plan, square_shapes
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.paged_step import PagedStep
from atom.quant.presets import KV4

from .test_attention_gpu import SPECS, check, to_gpu
from .test_paged_attention import make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_prefill(kv: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole prompts, chunks behind prefixes, decodes and empty sequences between them, ragged and in squares."""
    lengths, counts = (130, 90, 256, 300, 300, 17, 33, 70), (130, 1, 128, 100, 100, 17, 0, 69)
    case = make_case(SPECS[kv], lengths, counts, 8, 2, 128, block_size, dtype=torch.bfloat16)
    check(case, AttentionSpec(0.09))
    monkeypatch.setattr(prefill_plan, "SQUARE", 64)
    monkeypatch.setattr(prefill_plan, "SQUARE_FLOPS", 1)
    monkeypatch.setattr(prefill_plan, "PREFIX_FLOPS", 1)
    monkeypatch.setattr(square_shapes, "PREPARE_S", 0.0)
    check(case, AttentionSpec(0.09))
    check(case, AttentionSpec(0.09, 40))


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (32, 32), (14, 2), (16, 1)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_prefill_of_shapes_of_heads(heads: int, kv_heads: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(KV4, (70, 33, 5, 150), (70, 3, 5, 20), heads, kv_heads, dim, dtype=torch.bfloat16)
    check(case, AttentionSpec(dim**-0.5))
    monkeypatch.setattr(prefill_plan, "SQUARE", 64)
    monkeypatch.setattr(prefill_plan, "SQUARE_FLOPS", 1)
    monkeypatch.setattr(prefill_plan, "PREFIX_FLOPS", 1)
    monkeypatch.setattr(square_shapes, "PREPARE_S", 0.0)
    check(case, AttentionSpec(dim**-0.5))


@pytest.mark.parametrize("window", [1, 16, 17, 100])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_prefill_with_windows_and_soft_caps(window: int, cap: float | None) -> None:
    case = make_case(KV4, (2, 33, 90, 240), (2, 30, 20, 130), dim=128, dtype=torch.bfloat16)
    check(case, AttentionSpec(0.3, window, cap))


def test_a_chunk_is_the_same_alone_and_in_a_batch_where_splits_are_fixed() -> None:
    case = to_gpu(make_case(KV4, (300, 900, 2300), (300, 400, 2300), 8, 2, 128, dtype=torch.bfloat16))
    attend, spec, step = PagedAttentionSm90(case.layout, False, 256), AttentionSpec(0.09), case.step
    together = attend(case.q, case.layer, step, spec)
    for row in range(3):
        part = slice(row, row + 1)
        tokens = slice(int(step.cu_seqlens_q[row]), int(step.cu_seqlens_q[row + 1]))
        alone = PagedStep(
            np.array([0, step.counts[row]]), step.seqlens_k[part], step.tables[part], step.slots[tokens],
            step.block_tables[part],
        )  # fmt: skip
        assert torch.equal(attend(case.q[tokens], case.layer, alone, spec), together[tokens])
