"""The low-bit GEMMs on the linear layers of Llama-3-8B, against bf16 and FP8 of torch in the same run.

    python -m benchmarks.bench_gemm                   what users get; writes benchmarks/results/h200/gemm.json
    python -m benchmarks.bench_gemm --sweep           all candidate configs compete, cell by cell; writes no record
    python -m benchmarks.bench_gemm --compile-only    fill the kernel cache, no GPU needed
    python -m benchmarks.bench_gemm -o F; ... --record F    measure on a machine without the checkout's history

A config that does not match float64 in this run, or not bit for bit over 200 repetitions, is reported and left out.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atom.kernels.gemm import SCRATCH_WORDS, gemm_kernel
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.gemm_pack import pack_channel_scaled, pack_group_scaled, pack_int8_units

from .timing import COLD_BYTES, gemm_floor_us, keep, save, time_calls

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 16, 64, 128, 256, 1024, 8192)
# scheme -> (weight kind, token scales, INT4 columns a unit or 0, outliers); w4a8-uint4: two-level integer weight scales
KINDS = {
    "w4a4": ("int4", "group", 128, 128),
    "w4a8": ("int4", "token", 128, 0),
    "w4a8-uint4": ("int4_uint4", "token", 128, 0),
    "w8a8": ("int4_uint4", "token", 0, 0),
}
SMALL = {"qkv": (4, 5), "o": (8,), "gate_up": (1,), "down": (8,)}  # splits that fill 132 SMs with tiles of 256 rows
NARROW = {"qkv": (2,), "o": (4,), "gate_up": (1,), "down": (4,)}  # of 128 rows, two CTAs an SM


def chosen(scheme: str, shape: str, M: int) -> Iterator[GemmConfig]:
    """The config that the product runs in one cell."""
    weight, token_scales, int4, outliers = KINDS[scheme]
    N, K = SHAPES[shape]
    units = (K - outliers) // 128 + outliers // 64 if int4 else K // 64
    yield choose_config(weight, token_scales, min(M, 4096), N, units, bool(outliers) or not int4)


def candidates(scheme: str, shape: str, M: int) -> Iterator[GemmConfig]:
    """The configs that compete in one cell."""
    weight, token_scales, _, _ = KINDS[scheme]
    make = partial(GemmConfig, weight, token_scales, int8_units=scheme in ("w4a4", "w8a8"))
    if M <= 64:
        tile = 16 if M <= 16 else 64
        for split in SMALL[shape]:
            yield make(tile, 4, split=split)
            if split > 1:
                yield make(tile, 4, split=split, clustered=False)
        for split in NARROW[shape]:
            yield make(tile, 2, split=split, ctas_per_sm=2)
        if M <= 16 and scheme != "w8a8":
            yield make(tile, 4, split=SMALL[shape][0], pairs=True)
        return
    if M <= 256:
        tiles = -(-SHAPES[shape][0] // 128) * -(-M // 128)
        for split in {max(1, min(4, 132 // tiles)), max(1, min(8, 132 // tiles))}:
            yield make(128, 2, split=split)
        if weight == "int4_uint4":
            tiles = -(-SHAPES[shape][0] // 256) * -(-M // 128)
            yield make(128, 4, split=max(1, min(8, 132 // tiles)))
    if M >= 256 and weight == "int4_uint4":
        yield make(256, 2, split=2 if shape in ("o", "down") and M == 256 else 1)
        yield make(256, 2, multicast=2)
    elif M > 256:
        yield make(128, 2)
        yield make(128, 2, multicast=2)


def operands(scheme: str, M: int, N: int, K: int, device: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(packed weight, codes, token scales, float64 result) on random codes over the whole range, -8 included."""
    _, _, int4, outliers = KINDS[scheme]
    normal = K - outliers
    low, high = (-8, 8) if scheme == "w4a4" else (-128, 128)
    x = torch.randint(low, high, (M, normal), device=device, dtype=torch.int8)
    if not int4:
        w = torch.randint(-128, 128, (N, K), device=device, dtype=torch.int8)
        channel = torch.rand(N, 1, device=device) * 1e-2 + 1e-3
        token = torch.rand(1, M, device=device) + 0.1
        return (
            pack_int8_units(w, channel),
            x,
            token,
            token.T.double() * (x.double() @ (w.double() * channel.double()).T),
        )
    w = torch.randint(-8, 8, (N, normal), device=device, dtype=torch.int8)
    groups = -(-normal // 128)
    wide = torch.nn.functional.pad(x, (0, groups * 128 - normal))
    if scheme == "w4a8-uint4":
        factor = torch.randint(0, 16, (N, groups), device=device, dtype=torch.uint8)
        channel = torch.rand(N, 1, device=device) * 1e-3 + 1e-4
        packed, weight_scale = pack_channel_scaled(w, factor, channel), factor.double() * channel.double()
    else:
        bf16 = (torch.rand(N, groups, device=device) * 1e-2 + 1e-3).bfloat16()
        packed, weight_scale = pack_group_scaled(w, bf16, None, None), bf16.double()
    dense = w.double() * weight_scale.repeat_interleave(128, 1)[:, :normal]
    if scheme != "w4a4":
        token = torch.rand(1, M, device=device) + 0.1
        return packed, wide.contiguous(), token, token.T.double() * (x.double() @ dense.T)
    outlier = torch.randint(-128, 128, (N, outliers), device=device, dtype=torch.int8)
    outlier_scale = (torch.rand(N, 1, device=device) * 1e-2 + 1e-3).bfloat16()
    packed = pack_group_scaled(w, bf16, outlier, outlier_scale)
    tail = torch.randint(-128, 128, (M, outliers), device=device, dtype=torch.int8)
    units = packed.units.shape[1]
    scale = torch.full((units, -(-M // 16) * 16), float("nan"), device=device)
    scale[:groups, :M] = torch.rand(groups, M, device=device) + 0.1
    scale[groups:, :M] = torch.rand(1, M, device=device) * 0.1
    expanded = scale[:groups, :M].T.double().repeat_interleave(128, 1)[:, :normal]
    result = (x.double() * expanded) @ dense.T
    result += scale[groups, :M, None].double() * (tail.double() @ (outlier.double() * outlier_scale.double()).T)
    return packed, torch.cat((wide, tail), 1).contiguous(), scale, result


class Launcher:
    """Calls of one config on given operands."""

    def __init__(self, config: GemmConfig, features: int, device: str) -> None:
        self.config, self.kernel = config, gemm_kernel(config)
        self.channel = torch.rand(features, device=device) * 1e-3
        self.bias = torch.empty(1, dtype=torch.bfloat16, device=device)
        self.scratch = torch.zeros(SCRATCH_WORDS, device=device)
        self.ctas = torch.cuda.get_device_properties(device).multi_processor_count * config.ctas_per_sm

    def __call__(self, units: Tensor, x: Tensor, scales: Tensor, y: Tensor, int4_units: int) -> None:
        words = units.view(torch.int32).view(torch.uint32)
        self.kernel(words, x, scales, self.channel, self.bias, y, self.scratch, int4_units, self.ctas)


def wrong(scheme: str, config: GemmConfig, M: int, N: int, K: int, repetitions: int = 200) -> str | None:
    """What is wrong with a config on a problem of this size: against float64, outside its output, between runs."""
    packed, x, scales, expected = operands(scheme, M, N, K, "cuda")
    launch = Launcher(config, N, "cuda")
    if packed.channel_scale.numel():
        launch.channel = packed.channel_scale
    guarded = torch.empty(M * N + 4096, dtype=torch.bfloat16, device="cuda")
    first = None
    for _ in range(repetitions):
        guarded.fill_(float("nan"))
        y = guarded[2048 : 2048 + M * N].view(M, N)
        launch(packed.units, x, scales, y, packed.int4_units)
        if first is None:
            first = y.clone()
        if not torch.equal(first.view(torch.int16), y.view(torch.int16)):
            return "differs between runs"
    assert first is not None
    if not (guarded[:2048].isnan().all() and guarded[2048 + M * N :].isnan().all()):
        return "wrote outside its output"
    error = (first.double() - expected).abs()
    bad = ~(error <= expected.abs() * 2**-8 + 1e-5 * expected.abs().mean())
    return f"{int(bad.sum())} of {bad.numel()} elements are wrong" if bool(bad.any()) else None


def rotating(scheme: str, M: int, N: int, K: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """(units [copies, ...], codes, scales, INT4 units) of random bits, more weights than the L2 holds."""
    _, token_scales, int4, outliers = KINDS[scheme]
    int4_units = (K - outliers) // 128 if int4 else 0
    units = int4_units + (outliers // 64 if int4 else K // 64)
    tiles = N // 64
    copies = max(2, -(-COLD_BYTES // (tiles * units * 4224)))
    weight = torch.randint(0, 256, (copies, tiles, units, 4224), dtype=torch.uint8, device="cuda")
    small = (torch.rand(copies, tiles, units, 64, device="cuda") * 1e-2).bfloat16().view(torch.uint8)
    weight[..., 4096:] = small & 15 if KINDS[scheme][0] == "int4_uint4" else small
    high = 8 if scheme == "w4a4" else 128
    x = torch.randint(-high, high, (M, K), device="cuda", dtype=torch.int8)
    shape = (units, -(-M // 16) * 16) if token_scales == "group" else (1, M)
    return weight, x, torch.rand(shape, device="cuda") + 0.1, int4_units


def baselines(M: int, N: int, K: int) -> dict[str, list[Callable[[], Any]]]:
    """bf16 cuBLAS and FP8 `_scaled_mm` (per-row scales, no quantization) over cold weights."""
    x = torch.randn(M, K, device="cuda").bfloat16()
    copies = max(2, -(-COLD_BYTES // (2 * N * K)))
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, list[Callable[[], Any]]] = {"bf16": [], "fp8": []}
    for i in range(calls_of(M, copies)):
        calls["bf16"].append(partial(torch.mm, x, weights[i % copies].t(), out=y))
    copies = max(2, -(-COLD_BYTES // (N * K)))
    x8 = torch.randn(M, K, device="cuda").to(torch.float8_e4m3fn)
    eight = [torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    a, b = torch.ones(M, 1, device="cuda"), torch.ones(1, N, device="cuda")
    for i in range(calls_of(M, copies)):
        calls["fp8"].append(partial(torch._scaled_mm, x8, eight[i % copies].t(), a, b, out_dtype=torch.bfloat16))
    return calls


def calls_of(M: int, copies: int) -> int:
    return max(copies, 3 if M > 2000 else 32)


Cells = Callable[[str, str, int], Iterator[GemmConfig]]


def measure(schemes: list[str], tokens: list[int], cells: Cells) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    verdicts: dict[tuple[str, GemmConfig], str | None] = {}
    for shape, (N, K) in SHAPES.items():
        weights = {scheme: rotating(scheme, 1, N, K) for scheme in schemes}
        for M in tokens:
            try:
                base = time_calls(baselines(M, N, K))
            except RuntimeError as error:
                print(f"baseline {shape} M={M}: {error}", file=sys.stderr)
                base = {}
            for scheme in schemes:
                row = best(scheme, shape, M, weights[scheme][0], verdicts, cells)
                if row is None:
                    continue
                row |= {"bf16_us": rounded(base.get("bf16")), "fp8_us": rounded(base.get("fp8")), "peer_us": None}
                rows.append(row)
                print("{scheme:11} {shape:8} M={M:<5}{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_us}  fp8 {fp8_us}  "
                      "{note}".format(**row), flush=True)  # fmt: skip
    return rows + sums(rows)


def best(
    scheme: str, shape: str, M: int, weight: Tensor, verdicts: dict[Any, str | None], cells: Cells
) -> dict[str, Any] | None:
    """The row of the fastest correct config of one cell."""
    N, K = SHAPES[shape]
    x, scales, int4_units = activations(scheme, M, K)
    y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    contest: dict[str, list[Callable[[], Any]]] = {}
    for config in {c.with_most_stages() for c in cells(scheme, shape, M)}:
        key = (scheme, config)
        if key not in verdicts:
            verdicts[key] = wrong(scheme, config, min(M, 300), 1000, 2048)
            if verdicts[key]:
                print(f"LEFT OUT {scheme} {verdicts[key]}: {config}", flush=True)
        if verdicts[key] is None:
            launch = Launcher(config, N, "cuda")
            count = calls_of(M, weight.shape[0])
            contest[repr(config)] = [
                partial(launch, weight[i % weight.shape[0]], x, scales, y, int4_units) for i in range(count)
            ]
    if not contest:
        return None
    times = time_calls(contest)
    winner = min(times, key=lambda name: times[name])
    bits = 4224 / 4096 / (2 if KINDS[scheme][2] else 1)
    return {
        "model": "llama-3-8b", "scheme": scheme, "shape": shape, "M": M, "N": N, "K": K,
        "us": rounded(times[winner]), "sol_us": rounded(gemm_floor_us(M, N, K, N * K * bits)),
        "note": winner,
    }  # fmt: skip


def activations(scheme: str, M: int, K: int) -> tuple[Tensor, Tensor, int]:
    _, x, scales, int4_units = rotating(scheme, M, 64, K)
    return x, scales, int4_units


def sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per scheme and M: the four layers together."""
    total = []
    for scheme, M in dict.fromkeys((r["scheme"], r["M"]) for r in rows):
        four = [r for r in rows if (r["scheme"], r["M"]) == (scheme, M)]
        if len(four) != len(SHAPES):
            continue
        row = {"model": "llama-3-8b", "scheme": scheme, "shape": "sum", "M": M, "N": 0, "K": 0}
        for key in ("us", "sol_us", "bf16_us", "fp8_us", "peer_us"):
            row[key] = None if any(r[key] is None for r in four) else rounded(sum(r[key] for r in four))
        total.append(row)
        print(
            "{scheme:11} sum      M={M:<5}{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_us}  fp8 {fp8_us}".format(**row)
        )
    return total


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("--sweep", action="store_true", help="let all candidate configs compete; no record")
    parser.add_argument("--schemes", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    cells = candidates if args.sweep else chosen
    if args.compile_only:
        configs = {c.with_most_stages() for s in args.schemes for n in SHAPES for m in args.tokens
                   for c in cells(s, n, m)}  # fmt: skip
        for config in configs:
            gemm_kernel(config)
        print(f"{len(configs)} kernels in the cache")
        return
    if args.record:
        save("gemm", args.record)
        return
    keep("gemm", measure(args.schemes, args.tokens, cells), args.out, is_record=not args.sweep)


if __name__ == "__main__":
    main()
