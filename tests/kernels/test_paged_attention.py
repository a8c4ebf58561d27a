"""The references of rope_append_kv and paged_attention against attention written out in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout, code_floats, encode_rows, zero_bias
from atom.kernels.paged_attention import (
    PAGED_ATTENTION,
    PagedAttentionReference,
    RopeTable,
    decode_groups,
    padded_blocks,
)
from atom.kernels.paged_step import PagedStep
from atom.kernels.registry import Problem
from atom.kernels.rope_append import ROPE_APPEND_KV, rope_append_kv_reference
from atom.kernels.rotate import rotate
from atom.quant.formats import get_format
from atom.quant.presets import KV4, KV4_WHOLE, KV8, KVFP8
from atom.quant.rounding import fake_quantize
from atom.quant.schemes import TensorSpec

SPECS: dict[str, TensorSpec | None] = {"16 bits": None, "int4": KV4, "int4 whole": KV4_WHOLE, "int8": KV8, "fp8": KVFP8}
NAN = float("nan")


@dataclass
class Case:
    """A filled cache and a step over it: queries of `counts` at the ends of sequences of `lengths`."""

    layout: KVLayout
    layer: Tensor
    keys: list[Tensor]  # of each sequence, before rounding [length, num_kv_heads, head_dim]
    values: list[Tensor]
    q: Tensor
    step: PagedStep


def make_case(
    spec: TensorSpec | None,
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    outliers: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Blocks are scattered; everything that is not a stored token is NaN."""
    generator = torch.Generator().manual_seed(len(lengths) + dim)
    layout = KVLayout(spec, dtype, kv_heads, dim, block_size)
    blocks = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(blocks) + 5, generator=generator).tolist()
    tables = np.zeros((len(lengths), max(blocks)), dtype=np.int32)
    layer = torch.full(layout.shape(len(free)), 255, dtype=torch.uint8)
    keys, values = [], []
    nothing = torch.ones(0, dim // 2)
    append = rope_append_kv_reference(layout)
    for row, length in enumerate(lengths):
        tables[row, : blocks[row]] = [free.pop() for _ in range(blocks[row])]
        k, v = torch.randn(2, length, kv_heads, dim, generator=generator).to(dtype)
        if outliers:
            k[..., 3] *= 100
        places = np.arange(length)
        slots = torch.from_numpy(tables[row, places // block_size].astype(np.int64) * block_size + places % block_size)
        turn = nothing.new_ones(length, dim // 2), nothing.new_zeros(length, dim // 2)  # no rotation
        append(torch.zeros(length, heads, dim, dtype=dtype), k, v, *turn, slots, layer)
        keys.append(k)
        values.append(v)
    cu = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    q = torch.randn(int(cu[-1]), heads, dim, generator=generator).to(dtype)
    step = PagedStep(
        cu, np.array(lengths, dtype=np.int32), tables, torch.zeros(len(q), dtype=torch.int64), torch.from_numpy(tables)
    )
    return Case(layout, layer, keys, values, q, step)


def dequantized(x: Tensor, kv: TensorSpec) -> Tensor:
    """What the cache's codes, scales and zero points say of x [..., D], in float64 and not rounded once more."""
    codes, words = encode_rows(x, kv)
    values = code_floats(codes, kv, x.shape[-1]).double()
    if get_format(kv.format).is_integer:
        values -= words[..., 1:].double() + zero_bias(kv)
    return values * words[..., :1].double()


def expected(case: Case, spec: AttentionSpec, common: Tensor | None = None, bfloat16_keys: bool = False) -> Tensor:
    """Query by query in float64, from the rounded keys and values; `common` [positions, KV heads, D] adds to keys.

    bfloat16_keys  the sum is rounded, as torch's attention in bfloat16 would have it
    """
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    kv = case.layout.spec
    for row, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        repeats = case.q.shape[1] // keys.shape[1]
        k, v = (x.double() if kv is None else dequantized(x, kv) for x in (keys, values))
        k = k if common is None else k + common[: len(k)].double()
        k = k.bfloat16().double() if bfloat16_keys else k
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        start, end = int(case.step.cu_seqlens_q[row]), int(case.step.cu_seqlens_q[row + 1])
        for token in range(start, end):
            last = len(keys) - (end - token)
            first = 0 if spec.window is None else max(0, last - spec.window + 1)
            seen = slice(first, last + 1)
            scores = torch.einsum("hd,lhd->hl", case.q[token].double(), k[seen]) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            out[token] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v[seen])
    return out


def check(case: Case, spec: AttentionSpec) -> None:
    run = PagedAttentionReference(case.layout)
    found = run(case.q, case.layer, case.step, spec)
    error = (found.double() - expected(case, spec)).abs().max() if len(found) else torch.tensor(0.0)
    assert float(error) < (1e-5 if case.layout.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_lengths_around_edges(name: str, block_size: int) -> None:
    """Decodes, chunks, whole prompts and sequences without a query, below, at and beyond a block's edge."""
    lengths = (1, block_size - 1, block_size, block_size + 1, 3 * block_size, 70, 2 * block_size + 5, 20)
    for counts in ((1,) * 8, (1, 0, 2, 1, 3 * block_size, 7, block_size + 5, 20), (0,) * 7 + (1,)):
        check(make_case(SPECS[name], lengths, counts, block_size=block_size), AttentionSpec(0.125))


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (8, 1), (16, 1), (12, 4), (10, 2), (7, 1)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_shapes_of_heads(heads: int, kv_heads: int, dim: int) -> None:
    case = make_case(KV4_WHOLE, (33, 18, 5), (1, 3, 1), heads, kv_heads, dim)
    check(case, AttentionSpec(dim**-0.5))


@pytest.mark.parametrize("window", [1, 5, 15, 16, 17, 32, 100])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_windows_and_soft_caps(window: int, cap: float | None) -> None:
    case = make_case(KV4_WHOLE, (1, 16, 33, 50, 64, 40), (1, 1, 1, 20, 2, 40))
    check(case, AttentionSpec(0.5, window, cap))


@pytest.mark.parametrize("name", SPECS)
def test_loud_key_channels(name: str) -> None:
    check(make_case(SPECS[name], (40, 33), (1, 9), outliers=True), AttentionSpec(0.02))


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16(name: str) -> None:
    check(make_case(SPECS[name], (40, 33), (1, 9), dtype=torch.bfloat16), AttentionSpec(0.125))


def test_keys_are_stored_turned_and_the_offset_comes_back() -> None:
    """rope(k - offset) is rounded; what is read is that plus rope(offset). Before RoPE, all is turned on reading."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 20, 2, 64, generator=generator)
    q = torch.randn(20, 4, 64, generator=generator)
    offset = torch.randn(2, 64, generator=generator) * 5
    k = k + offset
    angles = torch.rand(20, 32, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    step = PagedStep(np.array([0, 20]), np.array([20]), np.array([[2, 0]]), torch.arange(20), torch.tensor([[0, 1]]))
    spec = AttentionSpec(0.125, key_offset=offset)
    for pre_rope in (False, True):
        layout = KVLayout(KV4_WHOLE, torch.float32, 2, 64, 16)
        layer = torch.full(layout.shape(2), 255, dtype=torch.uint8)
        turned = rope_append_kv_reference(layout, pre_rope)(q, k, v, cos, sin, step.slots, layer, offset)
        assert torch.equal(turned, rotate(q, cos, sin))
        rest = fake_quantize(k - offset if pre_rope else rotate(k - offset, cos, sin), KV4_WHOLE)
        read = rotate(rest + offset, cos, sin) if pre_rope else rest + rotate(offset.expand(20, 2, 64), cos, sin)
        attend = PagedAttentionReference(layout, pre_rope)
        found = attend(turned, layer, step, spec, RopeTable(cos, sin))
        heads = [x.repeat_interleave(2, 1).transpose(0, 1) for x in (read, fake_quantize(v, KV4_WHOLE))]
        exact = torch.nn.functional.scaled_dot_product_attention(
            turned.transpose(0, 1)[None], heads[0][None], heads[1][None], is_causal=True, scale=0.125
        )
        torch.testing.assert_close(found, exact[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_the_layout_byte_by_byte() -> None:
    """What the kernels rely on: where in a tile a code, a scale and a zero point stand."""
    layout = KVLayout(KV4_WHOLE, torch.float32, 2, 64, 16)
    assert (layout.row_bytes, layout.tile_bytes, layout.block_bytes) == (32, 128 + 2 * 16 * 32, 2 * 1152)
    layer = torch.zeros(layout.shape(3), dtype=torch.uint8)
    k, v = torch.randn(2, 1, 2, 64)
    turn = torch.ones(1, 32), torch.zeros(1, 32)
    rope_append_kv_reference(layout)(torch.zeros(1, 2, 64), k, v, *turn, torch.tensor([2 * 16 + 5]), layer)
    for part, x in ((0, k), (1, v)):
        codes, words = encode_rows(x[0], KV4_WHOLE)
        for head in range(2):
            tile = layer[2, head]
            at = part * 64 + 4 * 5
            assert torch.equal(tile[at : at + 4], words[head].view(torch.uint8))
            row = 128 + part * 16 * 32 + 5 * 32
            assert torch.equal(tile[row : row + 32], codes[head])
            scale, zero = words[head].float()
            low_first = torch.stack((codes[head] & 15, codes[head] >> 4), -1).flatten().float()
            assert torch.equal((low_first - zero) * scale, fake_quantize(x[0, head], KV4_WHOLE))
    assert int((layer != 0).sum()) <= 2 * 2 * (32 + 4)


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_extremes_round_as_everywhere(bits: str) -> None:
    """Zeros, one loud channel, all positive, all negative, the largest finite values."""
    spec = {"int4": KV4_WHOLE, "int8": KV8}[bits]
    x = torch.zeros(6, 64)
    x[1, 7] = 1e4
    x[2] = torch.rand(64) + 3
    x[3] = -x[2]
    x[4, ::2] = torch.finfo(torch.float32).max
    x[5] = -0.0
    codes, words = encode_rows(x, spec)
    scale, zero = words.float().unbind(-1)
    assert torch.equal((code_floats(codes, spec, 64) - zero[:, None]) * scale[:, None], fake_quantize(x, spec))


def test_decode_groups_follow_from_each_length_alone() -> None:
    counts = np.arange(1, 4000)
    padded = padded_blocks(counts)
    assert (padded >= counts).all() and (padded <= counts * 1.25 + 1).all()
    assert len(np.unique(padded[:1024])) < 40
    assert np.array_equal(padded_blocks(counts[::-1]), padded[::-1])
    layout = KVLayout(None, torch.float32, 8, 128, 16)
    lengths = np.full(300, 1000)
    tables = np.zeros((300, 63), dtype=np.int32)
    step = PagedStep(np.arange(301), lengths, tables, torch.zeros(300), torch.from_numpy(tables))
    groups = decode_groups(step, None, layout)
    assert sum(len(g.rows) for g in groups) == 300 and len(groups) > 10, "memory of a group is bounded"
    assert sorted(int(r) for g in groups for r in g.rows) == list(range(300))


@pytest.mark.parametrize("op", [ROPE_APPEND_KV, PAGED_ATTENTION], ids=lambda op: op.name)
def test_cpu_runs_the_reference(op: object) -> None:
    from atom.kernels.registry import Op

    assert isinstance(op, Op)
    choice = op.choose(Problem("cpu", kv=KV4_WHOLE, head_dim=128, num_heads=32, num_kv_heads=8))
    assert choice.name == "reference" and choice.build is op.reference
