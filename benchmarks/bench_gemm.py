"""The low-bit GEMMs on the linear layers of Llama-3-8B, against bf16 and FP8 of torch in the same run.

    python -m benchmarks.bench_gemm                   what users get; writes benchmarks/results/h200/gemm.json
    python -m benchmarks.bench_gemm --sweep           all candidate configs compete, cell by cell; writes no record
    python -m benchmarks.bench_gemm --compile-only    fill the kernel cache, no GPU needed
    python -m benchmarks.bench_gemm -o F; ... --record F    measure on a machine without the checkout's history

A config that does not match float64 in this run, or not bit for bit over 200 repetitions, is reported and left out.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atom.kernels.bench import SHAPES, records
from atom.kernels.bench_linear import baseline_us, copies_of, fault, tolerance
from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.bounds import GPUS, linear_bound_us
from atom.kernels.cache import compile_together
from atom.kernels.gemm import SCRATCH_WORDS, gemm_kernel, pack_weight, token_scales
from atom.kernels.gemm_choice import choose_config
from atom.kernels.gemm_config import GemmConfig
from atom.kernels.gemm_pack import PackedWeight
from atom.kernels.refusals_sm90 import weight_kind
from atom.kernels.timing import HEAVY, REST_S, calls_in_graph, time_products
from atom.quant.presets import PRESETS, get_scheme
from atom.quant.schemes import LinearScheme
from atom.quant.switches import Switches

from .timing import keep, save

LAYER = SHAPES["llama-3-8b"]
TOKENS = (1, 16, 64, 128, 192, 256, 1024, 8192)
# what competes for few tokens, by shape: fields of GemmConfig
MEETING = {"clustered": False}
FEW: dict[str, tuple[dict[str, Any], ...]] = {
    "qkv": (
        {"warpgroups": 4, "split": 4},
        {"warpgroups": 2, "split": 2, "ctas_per_sm": 2},
        {"warpgroups": 4, "ways": 4},
        {"warpgroups": 2, "ways": 2, "ctas_per_sm": 2, "bounded": True},
    ),
    "o": (
        {"warpgroups": 2, "split": 4, "ctas_per_sm": 2, "bounded": True},
        {"warpgroups": 4, "split": 4},
        {"warpgroups": 4, "ways": 4, "split": 2, **MEETING},
    ),
    "gate_up": ({"warpgroups": 4}, {"warpgroups": 2, "ctas_per_sm": 2, "bounded": True}),
    "down": (
        {"warpgroups": 2, "split": 4, **MEETING},
        {"warpgroups": 2, "split": 4, "ctas_per_sm": 2, **MEETING},
        {"warpgroups": 4, "split": 8, **MEETING},
        {"warpgroups": 4, "ways": 4, "split": 2, **MEETING},
    ),
}


def schemes() -> dict[str, LinearScheme]:
    """The presets, w4a4 with bfloat16 scales of groups, and FP8 whose sums the tensor cores keep."""
    found = {name: get_scheme(name).for_linear("x") for name in PRESETS if name not in ("bf16", "w3a3")}
    switches = {"w4a4-bf16-scales": Switches(group_scales="bf16"), "fp8-fast-sums": Switches(fast_sums=True)}
    return found | {n: s.apply(get_scheme(n.partition("-")[0])).for_linear("x") for n, s in switches.items()}


def chosen(linear: LinearScheme, shape: str, M: int) -> Iterator[GemmConfig]:
    """The config that the product runs in one cell."""
    N, units = LAYER[shape][0], unit_count(linear, LAYER[shape][1])
    kind, scales, outliers = weight_kind(linear), token_scales(linear), has_int8_units(linear)
    yield choose_config(kind, scales, min(M, 4096), N, units, outliers)


def candidates(linear: LinearScheme, shape: str, M: int) -> Iterator[GemmConfig]:
    """The configs that compete in one cell."""
    yield from chosen(linear, shape, M)
    kind = weight_kind(linear)
    make = partial(GemmConfig, kind, token_scales(linear), int8_units=has_int8_units(linear))
    weight = make(16, 2).kind
    is_bf16, sums_once = weight.operand == "bf16", not weight.promoted
    if M <= 64:
        tile = 16 if M <= 16 else 64
        for choice in FEW[shape]:
            spills = is_bf16 and tile == 64 and (choice["warpgroups"] == 4 or "ctas_per_sm" in choice)
            if not spills and not ("ways" in choice and (is_bf16 or token_scales(linear) == "group")):
                yield make(tile, **choice)
                if tile == 16 and weight.bits == 4 and not is_bf16 and "ways" not in choice:
                    yield make(tile, pairs=True, **choice)
        return
    if M <= 256:
        if 128 < M <= 192:
            yield make(96, 2)
            yield make(96, 2, split=2)
            if sums_once and not is_bf16:
                yield make(192, 2)
        tiles = -(-LAYER[shape][0] // 128) * -(-M // 128)
        for split in {max(1, min(4, 132 // tiles)), max(1, min(8, 132 // tiles))}:
            yield make(128, 2, split=split)
            if split > 1:
                yield make(128, 2, split=split, **MEETING)
        if sums_once and not is_bf16:
            yield make(128, 4, split=max(1, min(8, 264 // tiles)), **MEETING)
    if M >= 256:
        yield make(128, 2)
        yield make(128, 2, multicast=2)
        if kind == "e4m3":
            yield make(128, 2, pairs=True)
            yield make(128, 2, pairs=True, multicast=2)
            yield make(128, 3)
        if kind == "e4m3" or (is_bf16 and sums_once):
            yield make(192, 2)
            yield make(192, 2, multicast=2)
        if sums_once and not is_bf16:
            yield make(256, 2)
            yield make(256, 2, multicast=2)


def has_int8_units(linear: LinearScheme) -> bool:
    return linear.outliers.count > 0


def unit_count(linear: LinearScheme, K: int) -> int:
    """Units along K, see gemm_pack.py."""
    normal, outliers = linear.split(K)
    return -(-normal // 128) + -(-outliers // 64)


class Launcher:
    """Calls of one config on a packed weight."""

    def __init__(self, config: GemmConfig, weight: PackedWeight) -> None:
        self.kernel, self.weight = gemm_kernel(config), weight
        self.units = weight.units.view(torch.int32).view(torch.uint32)
        device = self.units.device
        self.channel = weight.channel_scale if weight.channel_scale.numel() else torch.empty(1, device=device)
        self.bias = torch.empty(1, dtype=torch.bfloat16, device=device)
        self.scratch = torch.zeros(SCRATCH_WORDS, device=device)
        self.ctas = config.most_ctas(torch.cuda.get_device_properties(device).multi_processor_count)

    def __call__(self, y: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        self.kernel(
            self.units, codes, scales, self.channel, self.bias, y, self.scratch, self.weight.int4_units, self.ctas
        )
        return y


def wrong(linear: LinearScheme, config: GemmConfig, M: int, N: int, K: int) -> str | None:
    """What is wrong with a config on a problem of this size: against float64, outside its output, between runs."""
    weight, x = random_weight(linear, N, K, "cuda"), random_activation(linear, M, K, "cuda")
    launch = Launcher(config, pack_weight(linear, weight))
    guarded = torch.empty(M * N + 4096, dtype=torch.bfloat16, device="cuda")

    def run(codes: Tensor, scales: Tensor) -> Tensor:
        guarded.fill_(float("nan"))
        return launch(guarded[2048 : 2048 + M * N].view(M, N), codes, scales)

    found = fault(run, x.codes, x.scales, product(x, weight, linear), tolerance(linear), 200)
    if not (guarded[:2048].isnan().all() and guarded[2048 + M * N :].isnan().all()):
        return "wrote outside its output"
    return found


Cells = Callable[[LinearScheme, str, int], Iterator[GemmConfig]]


def measure(names: list[str], tokens: list[int], cells: Cells) -> list[dict[str, Any]]:
    """The record's rows; few tokens come first, and many rest before (time_products)."""
    rows: list[dict[str, Any]] = []
    verdicts: dict[tuple[str, GemmConfig], str | None] = {}
    for part in ([M for M in tokens if M < HEAVY], [M for M in tokens if M >= HEAVY]):
        for shape in LAYER if part else ():
            rows += measure_shape(names, shape, part, verdicts, cells)
    rows.sort(key=lambda row: (list(LAYER).index(row["shape"]), names.index(row["scheme"]), row["M"]))
    found = records(rows)["gemm"]
    for row in found:
        if row["shape"] == "sum":
            print("{scheme:11} sum      M={M:<5}{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_us}".format(**row))
    return found


def measure_shape(
    names: list[str], shape: str, tokens: list[int], verdicts: dict[Any, str | None], cells: Cells
) -> Iterator[dict[str, Any]]:
    """The rows of one linear layer, torch's products before ours."""
    N, K = LAYER[shape]
    base: dict[int, dict[str, float]] = {}
    for M in tokens:
        base[M] = baseline_us(M, N, K)
        print(f"torch       {shape:8} M={M:<5}", {name: round(us, 2) for name, us in base[M].items()}, flush=True)
    for name in names:
        linear = schemes()[name]
        weights = copies_of(pack_weight(linear, random_weight(linear, N, K, "cuda")))
        torch.cuda.synchronize()
        time.sleep(REST_S)  # packing costs power too
        for M in tokens:
            row = best(name, linear, shape, M, weights, verdicts, cells)
            if row is None:
                continue
            row |= {"bf16_us": base[M].get("bf16"), "fp8_us": base[M].get("fp8"), "peer_us": base[M].get("peer")}
            print("{scheme:11} {shape:8} M={M:<5}{us:9.2f} us  floor {sol_us:8.2f}  bf16 {bf16_us}  fp8 {fp8_us}  "
                  "{note}".format(**row), flush=True)  # fmt: skip
            yield row


def best(
    name: str,
    linear: LinearScheme,
    shape: str,
    M: int,
    weights: list[PackedWeight],
    verdicts: dict[Any, str | None],
    cells: Cells,
) -> dict[str, Any] | None:
    """The row of the fastest correct config of one cell."""
    N, K = LAYER[shape]
    x = random_activation(linear, M, K, "cuda")
    y = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    contest: dict[str, list[Callable[[], Any]]] = {}
    for config in {c.with_most_stages() for c in cells(linear, shape, M)}:
        key = (name, config)
        if key not in verdicts:
            verdicts[key] = wrong(linear, config, min(M, 300), 1000, 2048)
            if verdicts[key]:
                print(f"LEFT OUT {name} {verdicts[key]}: {config}", flush=True)
        if verdicts[key] is None:
            launches = [Launcher(config, weight) for weight in weights]
            count = calls_in_graph(M, len(weights))
            contest[repr(config)] = [partial(launches[i % len(launches)], y, x.codes, x.scales) for i in range(count)]
    if not contest:
        return None
    times = time_products(contest, M)
    winner = min(times, key=lambda config: times[config])
    floor = linear_bound_us(GPUS["h200"], M, N, K, linear)
    return {"op": "linear", "scheme": name, "shape": shape, "M": M, "N": N, "K": K,
            "us": times[winner], "sol_us": floor, "note": winner}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="compile every kernel into the cache and stop")
    parser.add_argument("--sweep", action="store_true", help="let all candidate configs compete; no record")
    parser.add_argument("--schemes", nargs="+", default=list(schemes()), choices=list(schemes()))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("-o", "--out", help="write rows and circumstances there instead of a record")
    parser.add_argument("--record", metavar="FILE", help="write the record from what -o wrote")
    args = parser.parse_args()
    cells = candidates if args.sweep else chosen
    if args.record:
        save("gemm", args.record)
        return
    if args.compile_only:
        configs = {c.with_most_stages() for s in args.schemes for n in LAYER for m in args.tokens
                   for c in cells(schemes()[s], n, m)}  # fmt: skip
        compile_together([partial(gemm_kernel, config) for config in configs])
        print(f"{len(configs)} kernels in the cache")
        return
    keep("gemm", measure(args.schemes, args.tokens, cells), args.out, is_record=not args.sweep)


if __name__ == "__main__":
    main()
