"""What `atom bench kernels --op paged_attention` measures: decode steps over random caches, against torch in bf16.

Caches rotate, so that each is cold when it is read; their blocks are scattered.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import AtomError
from ..quant.presets import KV4, KV8, KVFP8
from ..quant.schemes import TensorSpec
from .attention_sm90 import PagedAttentionSm90
from .bounds import Gpu
from .dense_attention import AttentionSpec
from .kv_layout import KVLayout
from .paged_attention import PAGED_ATTENTION, PagedAttentionReference, RopeTable
from .paged_step import Ints, PagedStep, RecentLayer, RecentStep, Share
from .registry import Problem
from .timing import COLD_BYTES, time_calls

FORMATS: dict[str, TensorSpec | None] = {"int4": KV4, "int8": KV8, "fp8": KVFP8, "bf16": None}
BLOCK = 16


class WrongResultError(AtomError):
    """A kernel was measured that computes something else; nothing of it is recorded."""


@dataclass(frozen=True)
class Shape:
    """One cell: a batch of decodes. `context` is a number of tokens, or "ragged"."""

    batch: int
    context: int | str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    window: int | None = None
    has_offset: bool = False  # the default 4-bit cache leaves the mean key out
    shared: int = 0  # first tokens that all sequences have in the same blocks
    recent: int = 0  # last tokens of each sequence that are read exactly

    @property
    def name(self) -> str:
        extras = f" window {self.window}" * bool(self.window) + " offset" * self.has_offset
        extras += f" shared {self.shared}" * bool(self.shared) + f" recent {self.recent}" * bool(self.recent)
        return f"{self.context}, {self.heads}:{self.kv_heads} x {self.head_dim}{extras}"

    @property
    def is_dense(self) -> bool:
        """torch's attention computes the same without more ado."""
        return self.context != "ragged" and not self.window and not self.has_offset and not self.shared

    def lengths(self) -> Ints:
        if self.context != "ragged":
            return np.full(self.batch, int(self.context), dtype=np.int32)
        draws = np.random.default_rng(0).lognormal(0.0, 1.0, self.batch)
        lengths: Ints = np.clip(draws / draws.mean() * 1500, 1, 32768).astype(np.int32)
        return lengths


CELLS = (
    Shape(64, 1024),
    Shape(64, 4096),
    Shape(256, 1024),
    Shape(8, 32768),
    Shape(128, "ragged"),
    Shape(1, 8192),
    Shape(64, 1024, head_dim=64),
    Shape(64, 4096, head_dim=64),
    Shape(256, 1024, head_dim=64),
    Shape(8, 32768, head_dim=64),
    Shape(128, "ragged", head_dim=64),
    Shape(1, 8192, head_dim=64),
    Shape(64, 1024, kv_heads=32),
    Shape(64, 4096, window=1024),
    Shape(64, 1024, has_offset=True),
    Shape(64, 4096, has_offset=True),
    Shape(64, 4608, shared=4096),
    Shape(16, 4608, shared=4096),
    Shape(256, 1536, shared=1024),
)


def layout_of(kv: str, shape: Shape) -> KVLayout:
    return KVLayout(FORMATS[kv], torch.bfloat16, shape.kv_heads, shape.head_dim, BLOCK)


def read_bytes(layout: KVLayout, shape: Shape) -> int:
    """What must be read of the cache, filling left out, a shared prefix once."""
    lengths = shape.lengths()
    tokens = int(np.minimum(lengths, shape.window).sum() if shape.window else lengths.sum())
    tokens -= (shape.batch - 1) * shape.shared
    exact = int(np.minimum(lengths, shape.recent).sum())
    rows = (tokens - exact) * (layout.row_bytes + layout.word_bytes) + exact * 2 * shape.head_dim
    return rows * layout.num_kv_heads * 2


def random_layers(layout: KVLayout, blocks: int, copies: int) -> list[Tensor]:
    """Caches of random codes under one scale, as many as asked for."""
    layers = []
    for _ in range(copies):
        layer = torch.empty(layout.shape(blocks), dtype=torch.uint8, device="cuda")
        for part in (0, 1):
            codes = layout.codes(layer, part)
            if layout.spec is None:
                codes.view(torch.bfloat16).normal_()
                continue
            codes.random_(0, 120 if layout.spec.format == "fp8_e4m3" else 256)  # no NaN
            zero = {"int4": 8.0, "int8": 128.0}.get(layout.spec.format, 0.0) - layout.zero_bias
            layout.words(layer, part)[:] = torch.tensor([0.01, zero], dtype=torch.bfloat16, device="cuda")
        layers.append(layer)
    return layers


def step_of(lengths: Ints, blocks: int, shared: int = 0) -> PagedStep:
    """One query for each sequence; its blocks scattered over the pool, those of `shared` tokens the first one's."""
    draw = np.random.default_rng(1).permutation(blocks).astype(np.int32)
    counts = -(-lengths // BLOCK)
    tables = np.zeros((len(lengths), counts.max()), dtype=np.int32)
    starts = np.cumsum(counts) - counts
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        tables[row, :count] = draw[start : start + count]
    tables[:, : shared // BLOCK] = tables[:1, : shared // BLOCK]
    slots = torch.zeros(len(lengths), dtype=torch.int64, device="cuda")
    return PagedStep(np.arange(len(lengths) + 1), lengths, tables, slots, torch.from_numpy(tables).cuda())


def with_recent(step: PagedStep, shape: Shape, copies: int) -> tuple[PagedStep, list[RecentLayer | None]]:
    """The step with a ring for each sequence, if the shape has a recent window, and rings of `copies` layers."""
    if not shape.recent:
        return step, [None] * copies
    starts = np.random.default_rng(2).permutation(len(step.counts)).astype(np.int64) * shape.recent
    size = (len(starts) * shape.recent, 2, shape.kv_heads, shape.head_dim)
    rings = [torch.randn(size, device="cuda").bfloat16() for _ in range(copies)]
    slots = torch.from_numpy(starts + (step.seqlens_k - 1) % shape.recent).cuda()
    own = RecentStep(shape.recent, shape.recent, torch.from_numpy(starts.astype(np.int32)).cuda(), starts, slots, True)
    return replace(step, recent=own, _derived={}), [RecentLayer(ring, ring[:0]) for ring in rings]


def rope_table(head_dim: int, positions: int) -> RopeTable:
    angles = torch.arange(positions, device="cuda")[:, None] * 10000.0 ** -(
        torch.arange(0, head_dim, 2, device="cuda") / head_dim
    )
    return RopeTable(angles.cos(), angles.sin())


def decode_calls(kv: str, shape: Shape, share: Share = "auto") -> list[Callable[[], Tensor]]:
    """Calls that rotate over caches."""
    layout, lengths = layout_of(kv, shape), shape.lengths()
    blocks = int((-(-lengths // BLOCK)).sum())
    copies = max(2, -(-COLD_BYTES // read_bytes(layout, shape)))
    layers = random_layers(layout, blocks, copies)
    step, rings = with_recent(step_of(lengths, blocks, shape.shared), shape, copies)
    q = torch.randn(shape.batch, shape.heads, shape.head_dim, device="cuda").bfloat16()
    offset = torch.randn(shape.kv_heads, shape.head_dim, device="cuda").bfloat16() if shape.has_offset else None
    spec = AttentionSpec(shape.head_dim**-0.5, shape.window, None, offset)
    table = rope_table(shape.head_dim, int(lengths.max())) if shape.has_offset else None
    attend = PagedAttentionSm90(layout, False, None, shape.has_offset)
    attend.prepare(step, [shape.window], shape.heads // shape.kv_heads, share)
    torch.cuda.synchronize()  # no kernel comes between that would wait for the plan
    return [
        partial(attend, q, layers[i % copies], step, spec, table, rings[i % copies]) for i in range(max(copies, 24))
    ]


def fault(kv: str, shape: Shape) -> str | None:
    """What is wrong with the kernels of a cell on a smaller problem: against float64, and from run to run."""
    layout = layout_of(kv, shape)
    lengths = np.array([1, 15, 16, 17, 31, 33, 500, 2047], dtype=np.int32) + shape.shared
    blocks = int((-(-lengths // BLOCK)).sum())
    layer = random_layers(layout, blocks, 1)[0]
    step, rings = with_recent(step_of(lengths, blocks, shape.shared), shape, 1)
    q = torch.randn(len(lengths), shape.heads, shape.head_dim, device="cuda").bfloat16()
    offset = torch.randn(shape.kv_heads, shape.head_dim, device="cuda").bfloat16() if shape.has_offset else None
    spec = AttentionSpec(shape.head_dim**-0.5, shape.window, None, offset)
    table = rope_table(shape.head_dim, int(lengths.max())) if shape.has_offset else None
    attend = PagedAttentionSm90(layout, False, None, shape.has_offset)
    attend.prepare(step, [shape.window], shape.heads // shape.kv_heads, "always" if shape.shared else "auto")
    torch.cuda.synchronize()
    first = attend(q, layer, step, spec, table, rings[0])
    for _ in range(200):
        if not torch.equal(attend(q, layer, step, spec, table, rings[0]), first):
            return "differs between runs"
    exact = PagedAttentionReference(replace(layout, dtype=torch.float64) if layout.spec else layout)
    double = None if rings[0] is None else RecentLayer(rings[0].ring.double(), rings[0].scratch)
    wanted = exact(q.double(), layer, step, spec, table, double)
    error = float((first.double() - wanted).norm() / wanted.norm())
    return f"relative error {error:.1e}" if not error < 8e-3 else None


def dense_us(shape: Shape) -> float:
    """torch's attention in bf16 over contiguous keys and values, in the faster of its two forms.

    The query heads of a KV head stand as its queries, or torch groups them itself.
    """
    length = int(shape.context)
    copies = max(2, -(-COLD_BYTES // (4 * shape.batch * shape.kv_heads * length * shape.head_dim)))
    queries = shape.heads // shape.kv_heads
    q = torch.randn(shape.batch, shape.kv_heads, queries, shape.head_dim, device="cuda").bfloat16()
    size = (shape.batch, shape.kv_heads, length, shape.head_dim)
    pairs = [tuple(torch.randn(2, *size, device="cuda", dtype=torch.bfloat16)) for _ in range(copies)]
    calls: dict[str, list[Callable[[], Tensor]]] = {"grouped": [], "gqa": []}
    for i in range(max(copies, 12)):
        k, v = pairs[i % copies]
        calls["grouped"].append(partial(scaled_dot_product_attention, q, k, v))
        flat = q.flatten(1, 2).unsqueeze(2)
        calls["gqa"].append(partial(scaled_dot_product_attention, flat, k, v, enable_gqa=queries > 1))
    return min(time_calls(calls).values())


def problem_of(kv: str, shape: Shape) -> Problem:
    return Problem(
        "sm_90",
        kv=FORMATS[kv],
        head_dim=shape.head_dim,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        block_size=BLOCK,
        kv_recent=shape.recent,
    )


def attention_rows(
    gpu: Gpu, tell: Callable[[str], None] = lambda text: None, formats: tuple[str, ...] = tuple(FORMATS)
) -> list[dict[str, Any]]:
    """Rows of `atom bench kernels`: every cell in every cache format; times where a kernel runs and is right."""
    here = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    rows = []
    for shape in CELLS:
        base = dense_us(shape) if here and shape.is_dense else None
        for kv in formats:
            if shape.has_offset and FORMATS[kv] is None:
                continue
            tell(f"paged_attention {kv} {shape.name}")
            bytes_read = read_bytes(layout_of(kv, shape), shape)
            refusal = PAGED_ATTENTION.refusals(problem_of(kv, shape)).get(PAGED_ATTENTION.implementations[0].name)
            row = {
                "op": "paged_attention", "scheme": kv, "shape": shape.name, "M": shape.batch, "us": None, "gbps": None,
                "sol_us": bytes_read / gpu.bytes_per_s * 1e6, "bf16_us": base,
                "runs": refusal or PAGED_ATTENTION.implementations[0].name,
            }  # fmt: skip
            if here and refusal is None:
                if wrong := fault(kv, shape):
                    raise WrongResultError(
                        f"paged_attention {kv} {shape.name}: {wrong}; run pytest -m gpu tests/kernels"
                    )
                us = time_calls({kv: decode_calls(kv, shape)})[kv]
                row |= {"us": us, "gbps": bytes_read / us / 1e3}
            rows.append(row)
    return rows
