"""Decodes whose newest tokens are exact, on a GPU: against float64, twice, and in a graph while sequences grow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.append_sm90 import RopeAppendSm90
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.merge_parts import Part, merge_into
from atom.kernels.paged_step import PagedStep, RecentLayer, RecentStep
from atom.quant.presets import KV4, KV4_WHOLE, KV8, KVFP8
from atom.quant.schemes import TensorSpec

from .test_attention_gpu import captures, to_gpu, torch_error, within
from .test_merge_parts import PLACES, make
from .test_merge_parts import expected as merged
from .test_paged_attention import Case, make_case
from .test_recent_decode_sm90 import expected_recent, fill_ring
from .test_recent_prefill import expected, with_recent

pytestmark = pytest.mark.gpu
SPECS: dict[str, TensorSpec] = {"int4": KV4, "int4 whole": KV4_WHOLE, "int8": KV8, "fp8": KVFP8}


def on_gpu(case: Case, recent: int, capacity: int) -> tuple[Tensor, Tensor, PagedStep, RecentLayer]:
    """Queries, cache, step and rings of `case`, whose sequences have one query each."""
    step, numbers = case.step, list(reversed(range(1, len(case.q) + 1)))
    ring = fill_ring(case, capacity, numbers).cuda()
    starts = np.array(numbers, dtype=np.int32) * capacity
    slots = torch.from_numpy(starts + (step.seqlens_k - 1) % capacity)
    own = RecentStep(recent, capacity, torch.from_numpy(starts).cuda(), starts.astype(np.int64), slots.cuda(), True)
    moved = PagedStep(
        step.cu_seqlens_q, step.seqlens_k, step.tables, step.slots.cuda(), step.block_tables.cuda(), recent=own
    )
    return case.q.cuda(), case.layer.cuda(), moved, RecentLayer(ring, ring[:0])


def check(case: Case, spec: AttentionSpec, recent: int, capacity: int, split: int | None = None) -> None:
    q, layer, step, rings = on_gpu(case, recent, capacity)
    attend = PagedAttentionSm90(case.layout, False, split)
    torch.full_like(q, float("nan"))  # what the outputs are allocated from next
    found = attend(q, layer, step, spec, None, rings)
    for _ in range(20):
        assert torch.equal(attend(q, layer, step, spec, None, rings), found)
    exact = expected_recent(case, spec, recent)
    assert not found.isnan().any()
    within(found, exact, torch_error(exact, replace(case), spec))


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("recent,capacity", [(16, 16), (16, 32), (32, 32), (64, 80)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_lengths_around_edges(kv: str, recent: int, capacity: int, block_size: int) -> None:
    """Of the window, of blocks behind it, of stages and splits; scattered blocks and rings among NaN."""
    edges = sorted(
        {n + d for n in (recent, recent + 16, 2 * recent + 32, 128, 1000) for d in (-1, 0, 1)} | {1, 2, 2047}
    )
    case = make_case(SPECS[kv], tuple(edges), (1,) * len(edges), 8, 2, 128, block_size, dtype=torch.bfloat16)
    for split in (None, 128):
        check(case, AttentionSpec(0.09), recent, capacity, split)


@pytest.mark.parametrize("kv", ["int4", "int8"])
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (32, 32), (8, 2), (14, 2), (8, 1), (16, 1)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_shapes_of_heads(kv: str, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case(SPECS[kv], (700, 33, 5), (1, 1, 1), heads, kv_heads, dim, dtype=torch.bfloat16)
    for recent in (16, 64):
        check(case, AttentionSpec(dim**-0.5), recent, recent)


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 129, 257])
def test_batches(batch: int) -> None:
    lengths = tuple(1 + 37 * i % 300 for i in range(batch))
    case = make_case(KV4, lengths, (1,) * batch, 8, 2, 64, dtype=torch.bfloat16)
    for split in (None, 128):
        check(case, AttentionSpec(0.125), 16, 16, split)


@pytest.mark.parametrize("window", [33, 40, 100, 512])
def test_windows(window: int) -> None:
    case = make_case(KV4, (1, 33, 34, 90, 640), (1,) * 5, 4, 1, 256, dtype=torch.bfloat16)
    for split in (None, 128):
        check(case, AttentionSpec(0.0625, window), 32, 32, split)


@pytest.mark.parametrize("split", [None, 256])
def test_none_is_older(split: int | None) -> None:
    """No sequence is longer than the window: the decode kernel has nothing to read, and what follows still waits."""
    case = make_case(KV4, (1, 16, 9), (1,) * 3, 8, 2, 128, dtype=torch.bfloat16)
    check(case, AttentionSpec(0.09), 16, 16, split)


def test_beside_those_that_have_no_window() -> None:
    """One object, steps with and without: plans and buffers of the one are not the other's."""
    case = make_case(KV4, (40, 90, 17), (1,) * 3, 8, 2, 128, dtype=torch.bfloat16)
    spec, (q, layer, step, rings) = AttentionSpec(0.09), on_gpu(case, 16, 16)
    plain = replace(step, recent=None, _derived={})
    attend = PagedAttentionSm90(case.layout)
    wanted = attend(q, layer, plain, spec)
    for _ in range(3):
        found = attend(q, layer, replace(step, _derived={}), spec, None, rings)
        within(found, expected_recent(case, spec, 16), torch_error(expected_recent(case, spec, 16), case, spec))
        assert torch.equal(attend(q, layer, replace(plain, _derived={}), spec), wanted)


COUNTS = ((1, 0, 2, 1, 33, 1, 600, 1), (0, 1, 16, 17, 1, 1, 1, 40), (1, 15, 16, 17, 33, 70, 900, 40))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dim", [64, 128])
def test_chunks_beside_decodes(counts: tuple[int, ...], window: int | None, dim: int) -> None:
    """Each token of a step in its place, whichever kernel gave it."""
    case = make_case(KV4, (1, 15, 16, 17, 33, 70, 900, 40), counts, 8, 2, dim, dtype=torch.bfloat16)
    layer, spec = with_recent(case, 16, 32), AttentionSpec(0.125, window)
    exact, own = expected(case, spec), case.step.recent
    assert own is not None
    on_device = replace(own, rings=own.rings.cuda(), slots=own.slots.cuda())
    step = replace(to_gpu(case).step, recent=on_device, _derived={})
    recent = RecentLayer(layer.ring.cuda(), layer.scratch.cuda())
    found = PagedAttentionSm90(case.layout)(case.q.cuda(), case.layer.cuda(), step, spec, None, recent).cpu()
    assert not found.isnan().any()
    errors = (found.double() - exact).abs()
    assert float(errors.max()) < 2e-2 and float(errors.norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("places", PLACES, ids=("indices", "range"))
def test_parts_are_merged(dim: int, places: Tensor) -> None:
    out, sums, other, other_sums = make(dim)
    wanted = merged(out, sums, other, other_sums, places)
    tokens = places.cuda() if int(places[0]) == 7 else slice(2, 7)
    found = out.cuda()
    merge_into(found, sums.cuda(), Part(tokens, other.cuda(), other_sums.cuda()))
    assert float((found.cpu().double() - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())


@captures
@pytest.mark.parametrize("recent,capacity", [(16, 16), (32, 48)])
@pytest.mark.parametrize("are_lengths_there", [False, True])
def test_a_graph_while_sequences_grow(recent: int, capacity: int, are_lengths_there: bool) -> None:
    """Append and attention of two layers, captured once, over 40 steps: rings go round, windows fill, plans go on."""
    dim, heads, kv_heads, begin = 128, 8, 2, (1, recent - 3, 200, 15, 1000)
    steps, batch = 40, len(begin)
    generator = torch.Generator().manual_seed(0)
    lengths = [n + steps for n in begin]
    layout = KVLayout(KV4, torch.bfloat16, kv_heads, dim, 16)
    q = torch.randn(steps, batch, heads, dim, generator=generator).bfloat16().cuda()
    keys, values = ([torch.randn(n, kv_heads, dim, generator=generator).bfloat16() for n in lengths] for _ in range(2))
    blocks = -(-max(lengths) // 16)
    tables = np.arange(1, batch * blocks + 1, dtype=np.int32).reshape(batch, blocks)
    layers = [torch.full(layout.shape(batch * blocks + 1), 255, dtype=torch.uint8, device="cuda") for _ in range(2)]
    store = torch.full(((batch + 1) * capacity, 2, kv_heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    rings = [store.clone() for _ in layers]
    starts = np.arange(1, batch + 1, dtype=np.int64) * capacity
    on_device = torch.from_numpy(tables).cuda(), torch.from_numpy(starts.astype(np.int32)).cuda()
    append, attend, spec = RopeAppendSm90(layout), PagedAttentionSm90(layout), AttentionSpec(0.09)

    def turn(count: int) -> tuple[Tensor, Tensor]:
        return torch.ones(count, dim // 2, device="cuda"), torch.zeros(count, dim // 2, device="cuda")

    for row, first in enumerate(begin):  # what was there before
        places = np.arange(first)
        slots = torch.from_numpy(tables[row, places // 16].astype(np.int64) * 16 + places % 16).cuda()
        exact = torch.from_numpy(np.where(places >= first - capacity, starts[row] + places % capacity, -1)).cuda()
        k, v = keys[row][:first].cuda(), values[row][:first].cuda()
        for layer, ring in zip(layers, rings, strict=True):
            append(k.new_zeros(first, heads, dim), k, v, *turn(first), slots, layer, None, None, None, ring, exact)
    buffers = [
        torch.zeros(batch, *x, dtype=torch.bfloat16, device="cuda") for x in ((heads, dim), *[(kv_heads, dim)] * 2)
    ]
    slots, exact_slots = (torch.zeros(batch, dtype=torch.int64, device="cuda") for _ in range(2))
    on_gpu_lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")

    def load(number: int) -> PagedStep:
        places = np.array(begin) + number
        found = [torch.stack([x[row][place] for row, place in enumerate(places)]) for x in (keys, values)]
        for buffer, new in zip(buffers, (q[number], *found), strict=True):
            buffer.copy_(new)
        slots.copy_(torch.from_numpy(tables[np.arange(batch), places // 16].astype(np.int64) * 16 + places % 16))
        exact_slots.copy_(torch.from_numpy(starts + places % capacity))
        on_gpu_lengths.copy_(torch.from_numpy(places + 1))
        own = RecentStep(recent, capacity, on_device[1], starts, exact_slots, True)
        step = PagedStep(
            np.arange(batch + 1), places + 1, tables, slots, on_device[0],
            lengths=on_gpu_lengths if are_lengths_there else None, recent=own,
        )  # fmt: skip
        attend.prepare(step, [None], heads // kv_heads)
        torch.cuda.synchronize()
        return step

    def run(step: PagedStep) -> list[Tensor]:
        found = []
        for layer, ring in zip(layers, rings, strict=True):
            turned = append(*buffers, *turn(batch), slots, layer, None, None, None, ring, exact_slots)
            found.append(attend(turned, layer, step, spec, None, RecentLayer(ring, ring[:0])))
        return found

    step = load(0)
    run(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(step)
    for number in range(steps):
        step = load(number)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found[0], found[1])
        grown = [n + number + 1 for n in begin]
        parts = [[x[row][:n] for row, n in enumerate(grown)] for x in (keys, values)]
        case = Case(layout, layers[0].cpu(), *parts, q[number].cpu(), step)
        within(found[0], expected_recent(case, spec, recent), 8e-3)
