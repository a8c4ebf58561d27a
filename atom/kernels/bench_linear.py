"""The GEMM of a scheme against torch's bf16 and FP8 products in the same run, and against the speed of light."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..quant.schemes import LinearScheme
from .bench_operands import product, random_activation, random_weight
from .gemm import Gemm, pack_weight, token_scales
from .gemm_pack import PackedWeight
from .refusals_sm90 import weight_kind
from .timing import COLD_BYTES, calls_in_graph, time_calls


def copies_of(weight: PackedWeight) -> list[PackedWeight]:
    """A weight so many times over that the L2 cannot hold all of it."""
    count = max(2, -(-COLD_BYTES // weight.units.numel()))
    return [weight, *(replace(weight, units=weight.units.clone()) for _ in range(count - 1))]


def linear_us(linear: LinearScheme, M: int, N: int, K: int) -> dict[str, float]:
    """Median microseconds: "ours", "bf16" and "fp8" (per-row scales, without quantization; where torch has it)."""
    weights = copies_of(pack_weight(linear, random_weight(linear, N, K, "cuda")))
    gemms = [Gemm(weight, token_scales(linear)) for weight in weights]
    x = random_activation(linear, M, K, "cuda")
    count = calls_in_graph(M, len(gemms))
    contest: dict[str, list[Callable[[], Any]]] = {
        "ours": [partial(gemms[i % len(gemms)], x.codes, x.scales) for i in range(count)]
    }
    found = time_calls(contest)
    for name, calls in baselines(M, N, K).items():
        try:
            found |= time_calls({name: calls})
        except RuntimeError:  # this torch or GPU has no such product
            continue
    return found


def baselines(M: int, N: int, K: int) -> dict[str, list[Callable[[], Any]]]:
    """bf16 cuBLAS and FP8 `_scaled_mm` (per-row scales, no quantization) over cold weights."""
    x = torch.randn(M, K, device="cuda").bfloat16()
    copies = max(2, -(-COLD_BYTES // (2 * N * K)))
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    wide: list[Callable[[], Any]] = [
        partial(torch.mm, x, weights[i % copies].t(), out=y) for i in range(calls_in_graph(M, copies))
    ]
    copies = max(2, -(-COLD_BYTES // (N * K)))
    x8 = torch.randn(M, K, device="cuda").to(torch.float8_e4m3fn)
    eight = [torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    a, b = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
    multiply = partial(torch._scaled_mm, out_dtype=torch.bfloat16)
    narrow: list[Callable[[], Any]] = [
        partial(multiply, x8, eight[i % copies].t(), a, b) for i in range(calls_in_graph(M, copies))
    ]
    return {"bf16": wide, "fp8": narrow}


def linear_fault(linear: LinearScheme, M: int, N: int, K: int, repetitions: int = 200) -> str | None:
    """What is wrong with the product that would run: against float64, or between runs; None if nothing."""
    weight = random_weight(linear, N, K, "cuda")
    gemm = Gemm(pack_weight(linear, weight), token_scales(linear))
    x = random_activation(linear, M, K, "cuda")
    return fault(gemm, x.codes, x.scales, product(x, weight, linear), tolerance(linear), repetitions)


def tolerance(linear: LinearScheme) -> float:
    """Of errors beside bfloat16's own, as a share of the mean result: FP8 wgmma adds with some 14 bits.

    torch's _scaled_mm without fast accumulation errs just as much: as many elements miss 1e-3 (10 in a million, H200).
    """
    return 5e-3 if weight_kind(linear) == "e4m3" else 1e-5


def fault(
    run: Callable[[Tensor, Tensor], Tensor], codes: Tensor, scales: Tensor, expected: Tensor, coarse: float, times: int
) -> str | None:
    """What is wrong with `run(codes, scales)`, called again and again; None if nothing."""
    first = run(codes, scales).clone()
    for _ in range(times - 1):
        if not torch.equal(first.view(torch.int16), run(codes, scales).view(torch.int16)):
            return "differs between runs"
    error = (first.double() - expected).abs()
    bad = ~(error <= expected.abs() * 2**-8 + coarse * expected.abs().mean())
    return f"{int(bad.sum())} of {bad.numel()} elements are wrong" if bool(bad.any()) else None
