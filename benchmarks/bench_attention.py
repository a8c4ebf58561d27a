"""Decode attention over the paged cache, prefill, appending and planning, against bf16 torch attention in the same run.

    python -m benchmarks.bench_attention                   writes benchmarks/results/h200/attention.json
    python -m benchmarks.bench_attention --compile-only    fill the kernel cache, no GPU needed
    python -m benchmarks.bench_attention --kv int4 --only decode
    python -m benchmarks.bench_attention --kv int4 --kv-recent 16
    python -m benchmarks.bench_attention -o F; ... --record F    measure on a machine without the checkout's history

A kernel that does not match float64 in this run, or whose results change from one run to the next, is reported and left
out.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from atom.kernels.append_sm90 import MANY_PARTS, RopeAppendSm90
from atom.kernels.attention_config import AppendConfig, DecodeConfig, choose_decode, choose_prefix
from atom.kernels.attention_kernels import append_kernel, decode_kernel, prefix_kernel, recent_kernel
from atom.kernels.attention_plan import plan_balanced
from atom.kernels.attention_sm90 import PagedAttentionSm90
from atom.kernels.bench_attention import (
    BLOCK,
    CELLS,
    FORMATS,
    Shape,
    decode_calls,
    dense_us,
    fault,
    layout_of,
    random_layers,
    read_bytes,
    step_of,
)
from atom.kernels.bounds import GPUS
from atom.kernels.cache import compile_together
from atom.kernels.dense_attention import AttentionSpec
from atom.kernels.kv_layout import zero_bias
from atom.kernels.recent_config import RECENT_TOKENS, RecentConfig
from atom.kernels.square_shapes import SquareShapes

from .timing import COLD_BYTES, keep, save, time_calls

GPU = GPUS["h200"]  # whose speed of light stands beside every row, as in its record


def cells(recent: int) -> tuple[Shape, ...]:
    """CELLS; with a recent window those that may have one."""
    if not recent:
        return CELLS
    return tuple(replace(shape, recent=recent) for shape in CELLS if not shape.has_offset and not shape.shared)


def decode_rows(formats: list[str], recent: int) -> Iterator[dict[str, Any]]:
    for shape in cells(recent):
        base = dense_us(shape) if shape.is_dense else None
        for kv in formats:
            if kv == "bf16" and (shape.has_offset or recent):
                continue
            wrong = fault(kv, shape)
            if wrong:
                print(f"LEFT OUT decode {kv} {shape}: {wrong}", flush=True)
                continue
            calls = {"auto": decode_calls(kv, shape)}
            if shape.shared:
                calls |= {"always": decode_calls(kv, shape, "always"), "never": decode_calls(kv, shape, "never")}
            us = time_calls(calls)
            floor = read_bytes(layout_of(kv, shape), shape) / GPU.bytes_per_s * 1e6
            found = row("decode", kv, shape, us.pop("auto"), floor, base)
            for name, each in us.items():
                print(f"{name:>40} {each:9.2f} us", flush=True)
            yield found | ({"shared": shape.shared, "alone_us": round(us["never"], 2)} if shape.shared else {})


def row(op: str, kv: str, shape: Shape, us: float, floor: float, base: float | None) -> dict[str, Any]:
    found = {
        "op": op, "kv": kv, "batch": shape.batch, "context": shape.context, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "window": shape.window, "us": round(us, 2),
        "sol_us": round(floor, 2), "bf16_sdpa_us": None if base is None else round(base, 2), "offset": shape.has_offset,
    } | ({"recent": shape.recent} if shape.recent else {})  # fmt: skip
    print("{op:11} {kv:5} {batch:>4} x {context:<7} {heads}:{kv_heads} x {head_dim:<4} window {window} offset {offset} "
          "{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_sdpa_us}".format(**found), f"{floor / us:4.0%}",
          flush=True)  # fmt: skip
    return found


def append_rows(formats: list[str], recent: int) -> Iterator[dict[str, Any]]:
    """With a recent window, keys and values are stored unrounded too."""
    for tokens in (64, 8192):
        shape = Shape(tokens, 1, recent=recent)
        for kv in formats:
            if kv == "bf16" and recent:
                continue
            layout = layout_of(kv, shape)
            append = RopeAppendSm90(layout)
            moved = tokens * shape.head_dim * (2 * 2 * shape.heads + 2 * 2 * shape.kv_heads)
            moved += tokens * (shape.head_dim * 4 + 2 * shape.kv_heads * (layout.row_bytes + layout.word_bytes))
            moved += tokens * shape.kv_heads * shape.head_dim * 4 * bool(recent)
            copies = min(64, max(2, COLD_BYTES // moved))
            q = [torch.randn(tokens, shape.heads, shape.head_dim, device="cuda").bfloat16() for _ in range(copies)]
            k = [
                torch.randn(2, tokens, shape.kv_heads, shape.head_dim, device="cuda").bfloat16() for _ in range(copies)
            ]
            layer = torch.empty(layout.shape(-(-tokens // BLOCK)), dtype=torch.uint8, device="cuda")
            cos, sin = torch.rand(2, tokens, shape.head_dim // 2, device="cuda")
            slots = torch.randperm(tokens, device="cuda") if tokens <= 64 else torch.arange(tokens, device="cuda")
            exact: tuple[Any, ...] = ()
            if recent:
                exact = (
                    None,
                    None,
                    None,
                    torch.empty(tokens, 2, shape.kv_heads, shape.head_dim).bfloat16().cuda(),
                    slots,
                )
            calls = [partial(append, q[i], *k[i].unbind(0), cos, sin, slots, layer, *exact) for i in range(copies)]
            us = time_calls({kv: calls})[kv]
            yield row("rope_append", kv, shape, us, moved / GPU.bytes_per_s * 1e6, None)


PREFILLS = ((1, 8192, 0), (8, 1024, 0), (1, 2048, 8192), (8, 512, 4096))  # chunks, new tokens, tokens before them


def prefill_rows(formats: list[str]) -> Iterator[dict[str, Any]]:
    """Equal chunks of prompts, with a prefix or none; the fastest of torch's attentions on dense bf16 beside them."""
    for count, new, before in PREFILLS:
        length = before + new
        shape = Shape(count, length)
        ends = np.arange(count + 1) * new
        q = torch.randn(count * new, shape.heads, shape.head_dim, device="cuda").bfloat16()
        k, v = torch.randn(2, count * length, shape.kv_heads, shape.head_dim, device="cuda").bfloat16()
        base = min(time_calls({name: [call] * 3 for name, call in dense_prefills(q, k, v, count).items()}).values())
        pairs = new * before + new * (new + 1) / 2
        floor = 4 * shape.heads * shape.head_dim * count * pairs / GPU.flops_16 * 1e6
        for kv in formats:
            layout = layout_of(kv, shape)
            blocks = count * length // BLOCK
            layer = random_layers(layout, blocks, 1)[0]
            step = replace(step_of(np.full(count, length, dtype=np.int32), blocks), cu_seqlens_q=ends)
            attend = PagedAttentionSm90(layout)
            attend.prefill.shapes = SquareShapes(prepare_s=0)  # as it is once the shapes are prepared
            us = time_calls({kv: [partial(attend, q, layer, step, AttentionSpec(shape.head_dim**-0.5))] * 3})[kv]
            yield row("prefill", kv, shape, us, floor, base) | {"queries": new}


def dense_prefills(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int) -> dict[str, Callable[[], Any]]:
    """Ways to attend over dense keys: ragged flash attention, and, where nothing is cached before, cuDNN's."""
    new, length, scale = len(q) // count, len(k) // count, q.shape[-1] ** -0.5
    ends = [torch.arange(count + 1, device="cuda", dtype=torch.int32) * n for n in (new, length)]
    flash = torch.ops.aten._flash_attention_forward
    calls: dict[str, Callable[[], Any]] = {
        "flash": partial(flash, q, k, v, *ends, new, length, 0.0, True, False, scale=scale)
    }
    if new == length:
        batched = [x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v)]
        calls["sdpa"] = partial(scaled_dot_product_attention, *batched, is_causal=True, enable_gqa=True, scale=scale)
    return calls


def plan_rows() -> Iterator[dict[str, Any]]:
    """On the host: the median of many, in the quietest of some rounds, since other programs may use its cores too."""
    lengths = np.random.default_rng(0).integers(1, 8000, 256).astype(np.int32)
    config = choose_decode("int4", 128, 4, BLOCK, False, False)
    ctas, sizes = config.ctas_per_sm * 132, (config.stage_blocks, config.overhead_blocks, config.least_blocks)
    rounds = []
    for _ in range(12):
        took = []
        for _ in range(200):
            start = time.perf_counter()
            plan_balanced(lengths, BLOCK, 8, ctas, None, *sizes)
            took.append(time.perf_counter() - start)
        rounds.append(float(np.median(took)) * 1e6)
        time.sleep(0.1)
    print("plan, rounds:", *(f"{us:.0f}" for us in rounds), "us", flush=True)
    yield row("plan", "int4", Shape(256, "ragged"), min(rounds), 0.0, None)


def compile_all(formats: list[str], recent: int) -> int:
    """Every decode and append kernel into the cache, in parallel; returns how many there are."""
    configs: dict[DecodeConfig | AppendConfig | RecentConfig, Callable[[Any], Any]] = {}
    prefixes: dict[DecodeConfig, Callable[[Any], Any]] = {}
    for kv in formats:
        if kv == "bf16" and recent:
            continue
        name = "fp8_e4m3" if kv == "fp8" else kv
        for shape in cells(recent):
            queries = shape.heads // shape.kv_heads
            spec = FORMATS[kv]
            bias = 0 if spec is None else zero_bias(spec)
            config = choose_decode(
                name, shape.head_dim, queries, BLOCK, shape.window is not None, False, shape.has_offset, bias, recent
            )
            configs[config] = decode_kernel
            if recent:
                configs[RecentConfig(recent, shape.head_dim, queries)] = recent_kernel
            if shape.shared:
                prefixes[choose_prefix(name, shape.head_dim, queries, BLOCK, False, bias)] = prefix_kernel
        for parts in (1, MANY_PARTS):
            append = AppendConfig(name, 128, BLOCK, 1.0, False, parts, zero_bias=bias, has_recent=recent > 0)
            configs[append] = append_kernel
    jobs = [partial(kernel, config) for config, kernel in (*configs.items(), *prefixes.items())]
    compile_together(jobs)
    return len(jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("--kv", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument(
        "--only", nargs="+", choices=["decode", "rope_append", "prefill", "plan"], help="no record then"
    )
    parser.add_argument(
        "--kv-recent", type=int, default=0, choices=(0, *RECENT_TOKENS),
        help="last tokens of each sequence that are read exactly: decodes and appends of the cells that may; no record",
    )  # fmt: skip
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    if args.compile_only:
        print(f"{compile_all(args.kv, args.kv_recent)} kernels in the cache")
        return
    if args.record:
        save("attention", args.record)
        return
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "plan": plan_rows,
        "rope_append": partial(append_rows, args.kv, args.kv_recent),
        "decode": partial(decode_rows, args.kv, args.kv_recent),
        "prefill": partial(prefill_rows, args.kv),
    }
    if args.kv_recent:
        parts = {name: parts[name] for name in ("rope_append", "decode")}
    rows: list[dict[str, Any]] = []
    for name in (name for name in args.only or parts if name in parts):
        rows += parts[name]()
        if args.out:  # part by part, so that a time limit takes the last one alone
            keep("attention", rows, args.out)
    if not args.out:
        keep("attention", rows, None, is_record=not args.only and not args.kv_recent)


if __name__ == "__main__":
    main()
