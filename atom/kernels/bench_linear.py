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
from .gemm_kinds import KINDS
from .gemm_pack import PackedWeight
from .refusals_sm90 import weight_kind
from .timing import COLD_BYTES, calls_in_graph, time_products


def copies_of(weight: PackedWeight) -> list[PackedWeight]:
    """A weight so many times over that the L2 cannot hold all of it."""
    count = max(2, -(-COLD_BYTES // weight.units.numel()))
    return [weight, *(replace(weight, units=weight.units.clone()) for _ in range(count - 1))]


def linear_us(linear: LinearScheme, M: int, N: int, K: int) -> dict[str, float]:
    """Median microseconds: "ours", and those of baseline_us."""
    weights = copies_of(pack_weight(linear, random_weight(linear, N, K, "cuda")))
    gemms = [Gemm(weight, token_scales(linear)) for weight in weights]
    x = random_activation(linear, M, K, "cuda")
    count = calls_in_graph(M, len(gemms))
    contest: dict[str, list[Callable[[], Any]]] = {
        "ours": [partial(gemms[i % len(gemms)], x.codes, x.scales) for i in range(count)]
    }
    return time_products(contest, M) | baseline_us(M, N, K)


def baseline_us(M: int, N: int, K: int) -> dict[str, float]:
    """Median microseconds of torch's products (see baselines), where this torch and GPU have them.

    And "peer", the least of those of 8 bits.
    """
    found = time_products({name: calls for name, calls in baselines(M, N, K).items() if _runs(calls[0])}, M)
    eight = [us for name, us in found.items() if name != "bf16"]
    return found | ({"peer": min(eight)} if eight else {})


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


def baselines(M: int, N: int, K: int) -> dict[str, list[Callable[[], Any]]]:
    """Calls of torch's products over cold weights; none quantizes, none but "bf16" takes more than 8 bits.

    bf16         cuBLAS
    fp8          `_scaled_mm` with a scale for each token and channel, exact accumulation
    fp8_fast     the same with fast accumulation
    fp8_tensor   `_scaled_mm` with one scale an operand, fast accumulation
    int8         `_int_mm`: INT32 sums without scales, more than 16 tokens
    """
    x = torch.randn(M, K, device="cuda").bfloat16()
    copies = max(2, -(-COLD_BYTES // (2 * N * K)))
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    wide: list[Callable[[], Any]] = [
        partial(torch.mm, x, weights[i % copies].t(), out=y) for i in range(calls_in_graph(M, copies))
    ]
    copies = max(2, -(-COLD_BYTES // (N * K)))
    eight = [torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    codes = [w.view(torch.int8) for w in eight]
    x8, one = torch.randn(M, K, device="cuda").to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    a, b = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
    sums = torch.empty(M, N, dtype=torch.int32, device="cuda")
    multiply = partial(torch._scaled_mm, out_dtype=torch.bfloat16)

    def rotate(call: Callable[[int], Any]) -> list[Callable[[], Any]]:
        return [partial(call, i % copies) for i in range(calls_in_graph(M, copies))]

    return {
        "bf16": wide,
        "fp8": rotate(lambda i: multiply(x8, eight[i].t(), a, b)),
        "fp8_fast": rotate(lambda i: multiply(x8, eight[i].t(), a, b, use_fast_accum=True)),
        "fp8_tensor": rotate(lambda i: multiply(x8, eight[i].t(), one, one, use_fast_accum=True)),
        "int8": rotate(lambda i: torch._int_mm(x8.view(torch.int8), codes[i].t(), out=sums)),
    }


def linear_fault(linear: LinearScheme, M: int, N: int, K: int, repetitions: int = 200) -> str | None:
    """What is wrong with the product that would run: against float64, or between runs; None if nothing."""
    weight = random_weight(linear, N, K, "cuda")
    gemm = Gemm(pack_weight(linear, weight), token_scales(linear))
    x = random_activation(linear, M, K, "cuda")
    return fault(gemm, x.codes, x.scales, product(x, weight, linear), tolerance(linear), repetitions)


def tolerance(linear: LinearScheme) -> float:
    """Of errors beside bfloat16's own, as a share of the mean result.

    FP8 wgmma adds with some 14 bits. torch's _scaled_mm errs just as much, without fast accumulation (10 elements in a
    million miss 1e-3, H200) as with it (31 to 144 thousand, 0.14 at worst). Sums of bfloat16 products are cut to
    float32 every 16 columns: of 14336 columns two elements in a million miss 1e-5, and cutting, imitated, makes 5e-5
    at worst.
    """
    kind = weight_kind(linear)
    if KINDS[kind].operand == "bf16":
        return 1e-4
    return {"e4m3": 5e-3, "e4m3_fast": 0.25}.get(kind, 1e-5)


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
