"""A recent window in the paged attention of the reference, and of prefill on Hopper as far as a CPU can run it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.paged_attention import PagedAttentionReference
from atom.kernels.paged_step import RecentLayer, RecentStep
from atom.kernels.prefill_sm90 import Prefill, RecentOnDevice, recent_on_device
from atom.kernels.recent_plan import plan_recent
from atom.quant.presets import KV4

from .test_paged_attention import Case, dequantized, make_case
from .test_prefill_sm90 import EVERYTHING, LAYOUTS, gather, small_squares

__all__ = ["gather", "small_squares"]  # fixtures


def with_recent(case: Case, tokens: int, capacity: int) -> RecentLayer:
    """Give a case a recent window: rings hold what a step leaves there before attention, all else is NaN."""
    step, (heads, dim) = case.step, case.keys[0].shape[1:]
    lanes = np.random.default_rng(0).permutation(len(step.counts) + 1)[:-1]
    rings = lanes.astype(np.int64) * capacity
    nan = torch.full(((len(lanes) + 1) * capacity, 2, heads, dim), float("nan"), dtype=case.layout.dtype)
    layer = RecentLayer(nan, torch.full((step.num_tokens + 3, 2, heads, dim), float("nan"), dtype=case.layout.dtype))
    for row, (k, v) in enumerate(zip(case.keys, case.values, strict=True)):
        count, length = int(step.counts[row]), len(k)
        exact = torch.stack((k, v), 1)
        last = length if count == 1 else length - count
        for position in range(max(0, last - capacity), last):
            layer.ring[rings[row] + position % capacity] = exact[position]
        start = int(step.cu_seqlens_q[row])
        layer.scratch[start : start + count] = exact[length - count :]
    is_direct = bool((step.counts <= 1).all())
    slots = torch.arange(step.num_tokens)
    recent = RecentStep(tokens, capacity, torch.from_numpy(rings.astype(np.int32)), rings, slots, is_direct)
    case.step = replace(step, recent=recent, _derived={})
    return layer


def expected(case: Case, spec: AttentionSpec) -> Tensor:
    """Query by query in float64, each key exact or rounded as the query's distance says."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    kv, recent = case.layout.spec, case.step.recent
    assert kv is not None and recent is not None
    for row, both in enumerate(zip(case.keys, case.values, strict=True)):
        length, repeats = len(both[0]), case.q.shape[1] // both[0].shape[1]
        start, end = int(case.step.cu_seqlens_q[row]), int(case.step.cu_seqlens_q[row + 1])
        for token in range(start, end):
            last = length - (end - token)
            first = 0 if spec.window is None else max(0, last - spec.window + 1)
            near = max(first, last - recent.tokens + 1)
            k, v = (
                torch.cat((dequantized(x[first:near], kv), x[near : last + 1].double())).repeat_interleave(repeats, 1)
                for x in both
            )
            scores = torch.einsum("hd,lhd->hl", case.q[token].double(), k) * spec.scale
            out[token] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
    return out


LENGTHS = (1, 15, 16, 17, 33, 70, 100, 40)
STEPS = ((1,) * 8, (1, 0, 2, 17, 33, 7, 60, 40), (1, 15, 16, 1, 1, 2, 100, 1), (0,) * 6 + (50, 40))


@pytest.mark.parametrize("counts", STEPS)
@pytest.mark.parametrize(("tokens", "capacity"), [(16, 16), (16, 32), (32, 48)])
@pytest.mark.parametrize("window", [None, 40])
def test_the_reference(counts: tuple[int, ...], tokens: int, capacity: int, window: int | None) -> None:
    case, spec = make_case(KV4, LENGTHS, counts), AttentionSpec(0.125, window)
    layer = with_recent(case, tokens, capacity)
    found = PagedAttentionReference(case.layout)(case.q, case.layer, case.step, spec, None, layer)
    assert float((found.double() - expected(case, spec)).abs().max()) < 1e-5


def check(case: Case, spec: AttentionSpec, tokens: int, flops: int = EVERYTHING, most: float = 2e-2) -> RecentOnDevice:
    LAYOUTS[case.layout.head_dim] = case.layout
    layer = with_recent(case, tokens, tokens)
    prefill = Prefill(case.layout)
    plan = plan_recent(case.step, spec.window, case.layout.block_size, flops, True)
    assert plan is not None
    chunks = recent_on_device(plan, case.q.device)
    out = prefill(case.q, case.layer, chunks, spec, torch.zeros_like(case.q), recent=layer)
    is_chunk = np.repeat(case.step.counts > 1, case.step.counts)
    assert not out.isnan().any()
    assert float((out.double() - expected(case, spec))[is_chunk].abs().max()) < most
    assert plan.is_all or float(out[~is_chunk].abs().max()) == 0
    return chunks


@pytest.mark.usefixtures("small_squares", "gather")
@pytest.mark.parametrize("counts", [*STEPS[1:], (1, 0, 2, 17, 33, 70, 100, 40)])
@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("window", [None, 40, 33])
@pytest.mark.parametrize("flops", [1, EVERYTHING])
def test_chunks_of_all_lengths(counts: tuple[int, ...], tokens: int, window: int | None, flops: int) -> None:
    """Shorter than the window, as long, longer; at a text's beginning, near it, far from it; squares and ragged."""
    case = make_case(KV4, LENGTHS, counts, 4, 2, 64, dtype=torch.bfloat16)
    check(case, AttentionSpec(0.125, window), tokens, flops)


@pytest.mark.usefixtures("small_squares", "gather")
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_squares_with_and_without_prefix(block_size: int) -> None:
    """Far parts are squares of their own: the first queries of whole prompts are in none."""
    lengths = (64, 64, 96, 150, 80)
    case = make_case(KV4, lengths, (64, 64, 40, 37, 64), 4, 2, 64, block_size, dtype=torch.bfloat16)
    far = check(case, AttentionSpec(0.125), 16).far
    assert far is not None and far.plan.ragged is None
    assert [(part.count, part.queries, part.prefix, part.side) for part in far.plan.squares] == [
        (1, 48, 0, 64),
        (1, 48, 0, 64),
        (1, 40, 32, 64),
        (1, 37, 96, 64),
        (1, 64, 0, 64),
    ]


@pytest.mark.usefixtures("gather")
def test_a_short_prompt_reads_no_block() -> None:
    case = make_case(KV4, (12, 16), (12, 16), 4, 2, 64, dtype=torch.bfloat16)
    case.layer.fill_(255)
    chunks = check(case, AttentionSpec(0.125), 16)
    assert chunks.far is None and chunks.order is None and not len(chunks.ring_rows)


def test_a_step_of_decodes_has_no_plan() -> None:
    case = make_case(KV4, (12, 16), (1, 1), 4, 2, 64)
    with_recent(case, 16, 16)
    assert plan_recent(case.step, None, 16) is None


@pytest.mark.usefixtures("gather")
@pytest.mark.parametrize(("loud", "most"), [(8.0, 0.06), (40.0, 0.3), (0.01, 0.02)])
def test_scores_far_apart_are_merged(loud: float, most: float) -> None:
    """All weight on what is near, or far: neither drowns the other. Loud queries feel that keys are in bfloat16."""
    case = make_case(KV4, (64, 64), (64, 30), 2, 1, 64, dtype=torch.bfloat16)
    case.q = case.q * loud
    check(case, AttentionSpec(0.125), 16, most=most)
