"""Decode attention over the paged cache, prefill, appending and planning, against bf16 torch attention in the same run.

    python -m benchmarks.bench_attention                   writes benchmarks/results/h200/attention.json
    python -m benchmarks.bench_attention --compile-only    fill the kernel cache, no GPU needed
    python -m benchmarks.bench_attention --kv int4 --only decode
    python -m benchmarks.bench_attention -o F; ... --record F    measure on a machine without the checkout's history

Needs ATOM_UNVERIFIED_KERNELS=1 until the kernels have been verified. A kernel that does not match float64 in this run,
or whose results change from one run to the next, is reported and left out. Times are of decode and merge together.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atom.kernels.attention_config import AppendConfig, MergeConfig, choose_decode
from atom.kernels.attention_plan import plan_balanced
from atom.kernels.attention_sm90 import PagedAttentionSm90, RopeAppendSm90, append_kernel, decode_kernel, merge_kernel
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_attention import PagedAttentionReference, RopeTable
from atom.kernels.paged_step import PagedStep
from atom.quant.presets import KV4, KV8, KVFP8
from atom.quant.schemes import TensorSpec

from .timing import BANDWIDTH, COLD_BYTES, RATE, keep, save, time_calls

FORMATS: dict[str, TensorSpec | None] = {"int4": KV4, "int8": KV8, "fp8": KVFP8, "bf16": None}
BLOCK = 16


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

    def lengths(self) -> np.ndarray:
        if self.context != "ragged":
            return np.full(self.batch, int(self.context), dtype=np.int32)
        draws = np.random.default_rng(0).lognormal(0.0, 1.0, self.batch)
        return np.clip(draws / draws.mean() * 1500, 1, 32768).astype(np.int32)


CELLS = (
    Shape(64, 1024),
    Shape(64, 4096),
    Shape(256, 1024),
    Shape(8, 32768),
    Shape(128, "ragged"),
    Shape(1, 8192),
    Shape(64, 1024, head_dim=64),
    Shape(64, 4096, head_dim=64),
    Shape(64, 1024, kv_heads=32),
    Shape(64, 4096, window=1024),
    Shape(64, 1024, has_offset=True),
    Shape(64, 4096, has_offset=True),
)


def layout_of(kv: str, shape: Shape) -> KVLayout:
    return KVLayout(FORMATS[kv], torch.bfloat16, shape.kv_heads, shape.head_dim, BLOCK)


def read_bytes(layout: KVLayout, lengths: np.ndarray, window: int | None) -> int:
    """What must be read of the cache, filling left out."""
    tokens = int(np.minimum(lengths, window).sum() if window else lengths.sum())
    return tokens * layout.num_kv_heads * 2 * (layout.row_bytes + layout.word_bytes)


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
            zero = {"int4": 8.0, "int8": 128.0}.get(layout.spec.format, 0.0)
            layout.words(layer, part)[:] = torch.tensor([0.01, zero], dtype=torch.bfloat16, device="cuda")
        layers.append(layer)
    return layers


def step_of(lengths: np.ndarray, blocks: int) -> PagedStep:
    """One query for each sequence; its blocks scattered over the pool."""
    draw = np.random.default_rng(1).permutation(blocks).astype(np.int32)
    counts = -(-lengths // BLOCK)
    tables = np.zeros((len(lengths), counts.max()), dtype=np.int32)
    starts = np.cumsum(counts) - counts
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        tables[row, :count] = draw[start : start + count]
    slots = torch.zeros(len(lengths), dtype=torch.int64, device="cuda")
    return PagedStep(np.arange(len(lengths) + 1), lengths, tables, slots, torch.from_numpy(tables).cuda())


def rope_table(head_dim: int, positions: int) -> RopeTable:
    angles = torch.arange(positions, device="cuda")[:, None] * 10000.0 ** -(
        torch.arange(0, head_dim, 2, device="cuda") / head_dim
    )
    return RopeTable(angles.cos(), angles.sin())


def decode_calls(kv: str, shape: Shape) -> tuple[list[Callable[[], Tensor]], float]:
    """Calls that rotate over caches, and the floor in microseconds."""
    layout, lengths = layout_of(kv, shape), shape.lengths()
    blocks = int((-(-lengths // BLOCK)).sum())
    bytes_read = read_bytes(layout, lengths, shape.window)
    copies = max(2, -(-COLD_BYTES // bytes_read))
    layers, step = random_layers(layout, blocks, copies), step_of(lengths, blocks)
    q = torch.randn(shape.batch, shape.heads, shape.head_dim, device="cuda").bfloat16()
    offset = torch.randn(shape.kv_heads, shape.head_dim, device="cuda").bfloat16() if shape.has_offset else None
    spec = AttentionSpec(shape.head_dim**-0.5, shape.window, None, offset)
    table = rope_table(shape.head_dim, int(lengths.max())) if shape.has_offset else None
    attend = PagedAttentionSm90(layout, False, None, shape.has_offset)
    calls = [partial(attend, q, layers[i % copies], step, spec, table) for i in range(max(copies, 24))]
    return calls, bytes_read / BANDWIDTH * 1e6


def fault(kv: str, shape: Shape) -> str | None:
    """What is wrong with the kernels of a cell on a smaller problem: against float64, and from run to run."""
    layout = layout_of(kv, shape)
    lengths = np.array([1, 15, 16, 17, 31, 33, 500, 2047], dtype=np.int32)
    blocks = int((-(-lengths // BLOCK)).sum())
    layer, step = random_layers(layout, blocks, 1)[0], step_of(lengths, blocks)
    q = torch.randn(len(lengths), shape.heads, shape.head_dim, device="cuda").bfloat16()
    offset = torch.randn(shape.kv_heads, shape.head_dim, device="cuda").bfloat16() if shape.has_offset else None
    spec = AttentionSpec(shape.head_dim**-0.5, shape.window, None, offset)
    table = rope_table(shape.head_dim, 2048) if shape.has_offset else None
    attend = PagedAttentionSm90(layout, False, None, shape.has_offset)
    first = attend(q, layer, step, spec, table)
    for _ in range(200):
        if not torch.equal(attend(q, layer, step, spec, table), first):
            return "differs between runs"
    exact = PagedAttentionReference(replace(layout, dtype=torch.float64) if layout.spec else layout)
    wanted = exact(q.double(), layer, step, spec, table)
    error = float((first.double() - wanted).norm() / wanted.norm())
    return f"relative error {error:.1e}" if not error < 8e-3 else None


def dense_calls(shape: Shape) -> list[Callable[[], Tensor]]:
    """torch's attention in bf16 over contiguous keys and values; the query heads of a KV head stand as its queries."""
    length = int(shape.context)
    copies = max(2, -(-COLD_BYTES // (4 * shape.batch * shape.kv_heads * length * shape.head_dim)))
    queries = shape.heads // shape.kv_heads
    q = torch.randn(shape.batch, shape.kv_heads, queries, shape.head_dim, device="cuda").bfloat16()
    size = (shape.batch, shape.kv_heads, length, shape.head_dim)
    kv = [torch.randn(2, *size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [partial(scaled_dot_product_attention, q, *kv[i % copies].unbind(0)) for i in range(max(copies, 12))]


def decode_rows(formats: list[str]) -> Iterator[dict[str, Any]]:
    for shape in CELLS:
        base = None
        if shape.context != "ragged" and not shape.window and not shape.has_offset:
            base = time_calls({"sdpa": dense_calls(shape)})["sdpa"]
        for kv in formats:
            if shape.has_offset and kv == "bf16":
                continue
            wrong = fault(kv, shape)
            if wrong:
                print(f"LEFT OUT decode {kv} {shape}: {wrong}", flush=True)
                continue
            calls, floor = decode_calls(kv, shape)
            us = time_calls({kv: calls})[kv]
            yield row("decode", kv, shape, us, floor, base)


def row(op: str, kv: str, shape: Shape, us: float, floor: float, base: float | None) -> dict[str, Any]:
    found = {
        "op": op, "kv": kv, "batch": shape.batch, "context": shape.context, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "window": shape.window, "us": round(us, 2),
        "sol_us": round(floor, 2), "bf16_sdpa_us": None if base is None else round(base, 2), "offset": shape.has_offset,
    }  # fmt: skip
    print("{op:11} {kv:5} {batch:>4} x {context:<7} {heads}:{kv_heads} x {head_dim:<4} window {window} offset {offset} "
          "{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_sdpa_us}".format(**found), f"{floor / us:4.0%}",
          flush=True)  # fmt: skip
    return found


def append_rows(formats: list[str]) -> Iterator[dict[str, Any]]:
    for tokens in (64, 8192):
        shape = Shape(tokens, 1)
        for kv in formats:
            layout = layout_of(kv, shape)
            append = RopeAppendSm90(layout)
            moved = tokens * shape.head_dim * (2 * 2 * shape.heads + 2 * 2 * shape.kv_heads)
            moved += tokens * (shape.head_dim * 4 + 2 * shape.kv_heads * (layout.row_bytes + layout.word_bytes))
            copies = min(64, max(2, COLD_BYTES // moved))
            q = [torch.randn(tokens, shape.heads, shape.head_dim, device="cuda").bfloat16() for _ in range(copies)]
            k = [
                torch.randn(2, tokens, shape.kv_heads, shape.head_dim, device="cuda").bfloat16() for _ in range(copies)
            ]
            layer = torch.empty(layout.shape(-(-tokens // BLOCK)), dtype=torch.uint8, device="cuda")
            cos, sin = torch.rand(2, tokens, shape.head_dim // 2, device="cuda")
            slots = torch.randperm(tokens, device="cuda") if tokens <= 64 else torch.arange(tokens, device="cuda")
            calls = [partial(append, q[i], *k[i].unbind(0), cos, sin, slots, layer) for i in range(copies)]
            us = time_calls({kv: calls})[kv]
            yield row("rope_append", kv, shape, us, moved / BANDWIDTH * 1e6, None)


def prefill_rows(formats: list[str]) -> Iterator[dict[str, Any]]:
    """One prompt of 8192 tokens, all of it new; torch's causal attention on dense bf16 beside it."""
    shape = Shape(1, 8192)
    length = 8192
    size = (1, shape.kv_heads, length, shape.head_dim)
    q = torch.randn(length, shape.heads, shape.head_dim, device="cuda").bfloat16()
    k, v = torch.randn(2, *size, device="cuda").bfloat16()
    dense = partial(scaled_dot_product_attention, q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True)
    base = time_calls({"dense": [dense] * 3})["dense"]
    floor = 4 * shape.heads * shape.head_dim * length * length / 2 / RATE["bf16"] * 1e6
    for kv in formats:
        layout = layout_of(kv, shape)
        blocks = length // BLOCK
        layer = random_layers(layout, blocks, 1)[0]
        step = replace(step_of(np.array([length], dtype=np.int32), blocks), cu_seqlens_q=np.array([0, length]))
        attend = PagedAttentionSm90(layout)
        us = time_calls({kv: [partial(attend, q, layer, step, AttentionSpec(shape.head_dim**-0.5))] * 3})[kv]
        yield row("prefill", kv, shape, us, floor, base)


def plan_rows() -> Iterator[dict[str, Any]]:
    """On the host: the median of many."""
    lengths = np.random.default_rng(0).integers(1, 8000, 256).astype(np.int32)
    took = []
    for _ in range(500):
        start = time.perf_counter()
        plan_balanced(lengths, BLOCK, 8, 396, None, 2)
        took.append(time.perf_counter() - start)
    yield row("plan", "int4", Shape(256, "ragged"), float(np.median(took)) * 1e6, 0.0, None)


def compile_all(formats: list[str]) -> int:
    done = set()
    for kv in formats:
        name = "fp8_e4m3" if kv == "fp8" else kv
        for shape in CELLS:
            queries = shape.heads // shape.kv_heads
            config = choose_decode(
                name, shape.head_dim, queries, BLOCK, shape.window is not None, False, shape.has_offset
            )
            if config not in done:
                decode_kernel(config)
                merge_kernel(MergeConfig(config.head_dim, queries))
                done.add(config)
        for rows in (1, 4):
            append_kernel(AppendConfig(name, 128, BLOCK, 1.0, False, rows))
    return len(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("--kv", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--only", nargs="+", choices=["decode", "rope_append", "prefill", "plan"], help="no record then"
    )
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.compile_only:
        print(f"{compile_all(args.kv)} decode kernels in the cache")
        return
    if args.record:
        save("attention", args.record)
        return
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "plan": plan_rows,
        "rope_append": partial(append_rows, args.kv),
        "decode": partial(decode_rows, args.kv),
        "prefill": partial(prefill_rows, args.kv),
    }
    rows = [found for name in args.only or parts for found in parts[name]()]
    keep("attention", rows, args.out, is_record=not args.only)


if __name__ == "__main__":
    main()
