"""The attention kernels on a GPU: against float64, against themselves, in a poisoned pool, in a graph."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.append_sm90 import RopeAppendSm90
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_attention import PagedAttentionReference, RopeTable
from atom.kernels.paged_step import PagedStep
from atom.kernels.rope_append import rope_append_kv_reference
from atom.kernels.rotate import rotate
from atom.models.rope import Rope, RopeConfig
from atom.quant.presets import KV4, KV4_WHOLE, KV8, KVFP8
from atom.quant.schemes import TensorSpec

from .test_cascade_sm90 import share
from .test_paged_attention import Case, expected, make_case

pytestmark = pytest.mark.gpu
captures = pytest.mark.skipif(
    os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") is not None,
    reason="without torch's caching allocator every tensor is a cudaMalloc, which a graph cannot capture",
)
SPECS: dict[str, TensorSpec | None] = {"int4": KV4, "int4 whole": KV4_WHOLE, "int8": KV8, "fp8": KVFP8, "bf16": None}


def to_gpu(case: Case) -> Case:
    step = case.step
    moved = PagedStep(step.cu_seqlens_q, step.seqlens_k, step.tables, step.slots.cuda(), step.block_tables.cuda())
    return replace(case, layer=case.layer.cuda(), q=case.q.cuda(), step=moved)


def run(case: Case, spec: AttentionSpec, split_tokens: int | None = None) -> Tensor:
    moved = to_gpu(case)
    return PagedAttentionSm90(case.layout, False, split_tokens)(moved.q, moved.layer, moved.step, spec).cpu()


def check(case: Case, spec: AttentionSpec, split_tokens: int | None = None) -> None:
    found = run(case, spec, split_tokens)
    exact = expected(case, spec)
    assert not found.isnan().any()
    within(found, exact, torch_error(exact, case, spec))


def torch_error(exact: Tensor, case: Case, spec: AttentionSpec) -> float:
    """The largest error of torch's attention in bfloat16 on the same keys and values."""
    in_torch = PagedAttentionReference(case.layout)(case.q, case.layer, case.step, spec)
    return float((in_torch.double() - exact).abs().max())


def within(found: Tensor, exact: Tensor, torch_s: float) -> None:
    """At most twice torch's error, or one rounding to bfloat16 where torch has none: of a single key's value."""
    errors = (found.cpu().double() - exact).abs().flatten(1).amax(1)
    bound = max(2 * torch_s, 2**-9 * float(exact.abs().max()))
    wrong = errors.gt(bound).nonzero()[:, 0].tolist()
    assert not wrong, f"tokens {wrong[:9]} by {float(errors.max()):.2e}, torch {torch_s:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_lengths_around_edges(kv: str, block_size: int) -> None:
    """Of blocks, stages and splits; scattered blocks in a pool of NaN; chunks and empty sequences beside decodes."""
    lengths = (1, block_size - 1, block_size, block_size + 1, 31, 32, 33, 127, 128, 129, 1000, 2047)
    ones = make_case(SPECS[kv], lengths, (1,) * 12, 8, 2, 128, block_size, dtype=torch.bfloat16)
    for split in (None, 128):
        check(ones, AttentionSpec(0.09), split)
    mixed = make_case(
        SPECS[kv], lengths, (1, 0, 1, 2, 0, 1, 1, 30, 1, 1, 77, 1), 8, 2, 128, block_size, dtype=torch.bfloat16
    )
    check(mixed, AttentionSpec(0.09))


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (32, 32), (8, 4), (14, 2), (8, 1), (16, 1)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_shapes_of_heads(kv: str, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case(SPECS[kv], (700, 33, 5), (1, 1, 1), heads, kv_heads, dim, dtype=torch.bfloat16)
    check(case, AttentionSpec(dim**-0.5))


@pytest.mark.parametrize("queries", range(1, 17))
def test_every_ratio_of_heads(queries: int) -> None:
    """Query heads of a KV head: 1 to 16."""
    check(make_case(KV4, (300, 33, 5), (1, 1, 1), 2 * queries, 2, 64, dtype=torch.bfloat16), AttentionSpec(0.125))


@pytest.mark.parametrize("window", [1, 16, 17, 100])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_windows_and_soft_caps(window: int, cap: float | None) -> None:
    check(make_case(KV4, (1, 33, 90, 640), (1,) * 4, dim=128, dtype=torch.bfloat16), AttentionSpec(0.3, window, cap))


@pytest.mark.parametrize("kv", SPECS)
def test_loud_key_channels(kv: str) -> None:
    check(make_case(SPECS[kv], (400, 33), (1, 1), dim=128, outliers=True, dtype=torch.bfloat16), AttentionSpec(0.01))


def test_shared_blocks() -> None:
    """Two sequences whose tables begin with the same blocks."""
    case = make_case(KV4, (64, 80), (1, 1), 8, 2, 128, dtype=torch.bfloat16)
    case.step.tables[1, :2] = case.step.tables[0, :2]
    case.step.block_tables.copy_(torch.from_numpy(case.step.tables))
    for x in (case.keys, case.values):
        x[1][:32] = x[0][:32]
    check(case, AttentionSpec(0.09))


def prefixed(kv: str, heads: int, kv_heads: int, dim: int, block_size: int) -> Case:
    """Decodes: two groups that share prefixes, and what shares nothing."""
    lengths = [700, 720, 690, 665, 40, 1200, 1049, 5, 1100, 1060, *range(710, 730)]
    case = make_case(SPECS[kv], tuple(lengths), (1,) * 30, heads, kv_heads, dim, block_size, dtype=torch.bfloat16)
    share(case, {0: ((1, 2, 3, *range(10, 30)), 640 // block_size), 5: ((6, 8, 9), 1024 // block_size)}, block_size)
    return case


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("heads,kv_heads,dim", [(8, 2, 128), (4, 4, 64), (16, 1, 128), (14, 2, 80), (4, 1, 256)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_prefixes_are_read_together(kv: str, heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    """As right as each sequence alone, and the same on every run."""
    case = prefixed(kv, heads, kv_heads, dim, block_size)
    spec, moved = AttentionSpec(dim**-0.5), to_gpu(case)
    attend = PagedAttentionSm90(case.layout)
    assert attend.prepare(moved.step, [None], heads // kv_heads, "always")
    torch.cuda.synchronize()
    found = attend(moved.q, moved.layer, moved.step, spec)
    for _ in range(200):
        assert torch.equal(attend(moved.q, moved.layer, moved.step, spec), found)
    exact = expected(case, spec)
    within(found, exact, torch_error(exact, case, spec))


@captures
@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("heads,kv_heads,dim", [(8, 2, 128), (4, 1, 256)])
def test_a_graph_reads_prefixes_together(kv: str, heads: int, kv_heads: int, dim: int) -> None:
    case = prefixed(kv, heads, kv_heads, dim, 16)
    spec, moved = AttentionSpec(dim**-0.5), to_gpu(case)
    attend = PagedAttentionSm90(case.layout)
    assert attend.prepare(moved.step, [None], heads // kv_heads, "always")
    torch.cuda.synchronize()
    found = attend(moved.q, moved.layer, moved.step, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = attend(moved.q, moved.layer, moved.step, spec)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, found)


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("dim", [64, 128])
def test_two_hundred_runs_are_bit_identical_and_alone_as_in_a_batch(kv: str, dim: int) -> None:
    """Where splits are fixed."""
    lengths = (3000, 17, 900, 64, 2048)
    case = to_gpu(make_case(SPECS[kv], lengths, (1,) * 5, 8, 2, dim, dtype=torch.bfloat16))
    attend, spec = PagedAttentionSm90(case.layout, False, 256), AttentionSpec(0.09)
    first = attend(case.q, case.layer, case.step, spec)
    for _ in range(200):
        assert torch.equal(attend(case.q, case.layer, case.step, spec), first)
    step = case.step
    for row in range(5):
        part = slice(row, row + 1)
        alone = PagedStep(
            np.array([0, 1]), step.seqlens_k[part], step.tables[part], step.slots[part], step.block_tables[part]
        )
        assert torch.equal(attend(case.q[part], case.layer, alone, spec), first[part])


@pytest.mark.parametrize("kv", SPECS)
def test_a_needle_in_128k_tokens(kv: str) -> None:
    """One key points where the query does; what attention gives it is found in its value."""
    length, dim = 131072, 128
    generator = torch.Generator().manual_seed(0)
    layout = KVLayout(SPECS[kv], torch.bfloat16, 1, dim, 16)
    q = torch.randn(1, 4, dim, generator=generator).bfloat16()
    k = torch.randn(length, 1, dim, generator=generator).bfloat16() * 0.1
    v = torch.zeros(length, 1, dim, dtype=torch.bfloat16)
    needle = 77_777
    k[needle, 0] = q[0, 0]
    v[needle, 0, 0] = 1.0
    layer = torch.full(layout.shape(length // 16), 255, dtype=torch.uint8)
    ones, zeros = torch.ones(length, dim // 2), torch.zeros(length, dim // 2)
    rope_append_kv_reference(layout)(q.expand(length, 4, dim), k, v, ones, zeros, torch.arange(length), layer)
    tables = np.arange(length // 16, dtype=np.int32)[None]
    step = PagedStep(
        np.array([0, 1]), np.array([length]), tables, torch.zeros(1).cuda(), torch.from_numpy(tables).cuda()
    )
    found = PagedAttentionSm90(layout)(q.cuda(), layer.cuda(), step, AttentionSpec(0.2)).cpu()[0, 0, 0]
    rounded = layout.read(layer, 0)[:, 0].flatten(0, 1).double()
    exact = torch.softmax(rounded @ q[0, 0].double() * 0.2, 0)[needle]
    assert exact > 0.5 and abs(float(found) - float(exact)) < 1e-2


@pytest.mark.parametrize("kv", SPECS)
def test_lengths_from_1_to_128k_in_one_batch(kv: str) -> None:
    """Each row against torch's error in that row: the longest has the smallest values."""
    case, spec = (
        make_case(SPECS[kv], (1, 131072, 40, 3000), (1,) * 4, 4, 1, 64, dtype=torch.bfloat16),
        AttentionSpec(0.3),
    )
    found, exact = run(case, spec), expected(case, spec)
    in_torch = PagedAttentionReference(case.layout)(case.q, case.layer, case.step, spec).double()
    for row in range(4):
        within(found[row : row + 1], exact[row : row + 1], float((in_torch[row] - exact[row]).abs().max()))


@captures
@pytest.mark.parametrize("kv", ["int4", "bf16"])
def test_a_graph_replays_other_steps(kv: str) -> None:
    """Buffers keep their places: what was captured over one step computes the next after `prepare`."""
    lengths = ((5, 100, 900), (900, 5, 101))
    steps = [to_gpu(make_case(SPECS[kv], each, (1,) * 3, 8, 2, 128, dtype=torch.bfloat16)) for each in lengths]
    spec, first = AttentionSpec(0.09), steps[0]
    attend = PagedAttentionSm90(first.layout)
    q, layer = first.q.clone(), torch.full(first.layout.shape(200), 255, dtype=torch.uint8, device="cuda")
    tables = torch.zeros(3, 64, dtype=torch.int32, device="cuda")

    def load(case: Case) -> PagedStep:
        q.copy_(case.q)
        layer[: len(case.layer)] = case.layer
        tables[:, : case.step.tables.shape[1]] = case.step.block_tables
        step = replace(case.step, block_tables=tables, _derived={})
        attend.prepare(step, [None], 4)
        torch.cuda.synchronize()
        return step

    step = load(first)
    attend(q, layer, step, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, layer, step, spec)
    for case in (steps[1], first):
        load(case)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, PagedAttentionSm90(case.layout)(case.q, case.layer, case.step, spec))


@captures
@pytest.mark.parametrize("kv", SPECS)
def test_rows_see_what_their_own_step_appends(kv: str) -> None:
    """Chunks as rows of one token each, in a graph of append and attention by turns: none reads a tile too soon."""
    lengths, counts, dim, layers = (700, 40, 33, 200, 17), (1, 40, 17, 150, 1), 128, 12
    case = make_case(SPECS[kv], lengths, counts, 8, 2, dim, dtype=torch.bfloat16)
    old = torch.full_like(case.layer, 255)
    turn = torch.ones(1024, dim // 2), torch.zeros(1024, dim // 2)
    slots, new = [], []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        places = torch.arange(length)
        found = torch.from_numpy(case.step.tables[row].astype(np.int64))[places // 16] * 16 + places % 16
        first = length - count
        k, v = case.keys[row][:first], case.values[row][:first]
        append = rope_append_kv_reference(case.layout)
        append(k.new_zeros(first, 8, dim), k, v, turn[0][:first], turn[1][:first], found[:first], old)
        slots.append(found[first:])
        new.append((case.keys[row][first:], case.values[row][first:]))
    owners = np.repeat(np.arange(5), counts)
    places = np.concatenate([np.arange(length - count, length) for length, count in zip(lengths, counts, strict=True)])
    ahead = np.concatenate([np.arange(count) for count in counts])
    tables = case.step.tables[owners]
    step = PagedStep(
        np.arange(len(owners) + 1), places + 1, tables, torch.cat(slots).cuda(), torch.from_numpy(tables).cuda(), ahead
    )
    k, v = (torch.cat(part).cuda() for part in zip(*new, strict=True))
    cos, sin = (x[: len(owners)].cuda() for x in turn)
    storage = torch.stack([old] * layers).cuda()
    append, attend = RopeAppendSm90(case.layout), PagedAttentionSm90(case.layout)
    spec, q = AttentionSpec(0.09), case.q.cuda()

    def run() -> list[Tensor]:
        return [attend(append(q, k, v, cos, sin, step.slots, x), x, step, spec) for x in storage]

    attend.prepare(step, [None], 4)
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        found = run()
    exact = expected(case, spec)
    torch_s = torch_error(exact, case, spec)
    for _ in range(20):
        storage.copy_(old)
        graph.replay()
        for out in found:
            within(out, exact, torch_s)


@pytest.mark.parametrize("kv", ["int4", "int8", "fp8"])
def test_key_offsets(kv: str) -> None:
    lengths, dim = (1, 17, 95, 900), 128
    case = make_case(SPECS[kv], lengths, (1,) * 4, 8, 2, dim, dtype=torch.bfloat16)
    offset = torch.randn(2, dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    offset[:, ::9] *= 20
    rotation = Rope(RopeConfig(), dim)(torch.arange(1024))
    common = rotate(offset.double().expand(1024, 2, dim), rotation.cos.double(), rotation.sin.double())
    spec = AttentionSpec(0.5 * dim**-0.5, None, None, offset.cuda())
    moved = to_gpu(case)
    table = RopeTable(rotation.cos.cuda(), rotation.sin.cuda())
    attend = PagedAttentionSm90(case.layout, has_offset=True)
    found = attend(moved.q, moved.layer, moved.step, spec, table).cpu().double()
    exact = expected(case, spec, common)
    rounded = expected(case, spec, common, bfloat16_keys=True)
    assert (found - exact).norm() < 2 * (rounded - exact).norm() + 4e-3 * exact.norm()
