"""The compiled GEMM, run on a CPU: its PTX in the emulator, against float64.

What this cannot see: what ptxas makes of the PTX, memory order, timing, and how coarsely FP8 wgmma adds up.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from atom.kernels.bench_operands import product, random_activation, random_weight
from atom.kernels.gemm import pack_weight, token_scales
from atom.kernels.gemm_config import COUNTER_WORDS, GemmConfig
from atom.quant.presets import PRESETS

from .linear_schemes import linear_scheme
from .machine_code import needs_dsl
from .ptx_memory import Tensor as Argument
from .ptx_operands import as_array, bf16, ptx
from .ptx_wgmma import Sizes, TensorCoreKernel, TensorMap

pytestmark = [pytest.mark.slow, needs_dsl]
LOW_BIT = [name for name in PRESETS if name != "bf16"]


ODD = (("w4a4", 333), ("w4a8", 325), ("w8a8", 129), ("fp8", 257), ("w4a16", 131), ("nvfp4", 141), ("mxfp4", 255))  # K
# tiles of few and many tokens; the last tile of rows and of tokens is cut, one CTA takes several tiles, N is odd
CASES = [(name, 19, 75, 328, 16, 2, True) for name in LOW_BIT if name != "w3a3"] + [
    ("fp8", 200, 72, 136, 192, 2, False),
    ("w8a8", 260, 72, 136, 256, 2, False),
    ("fp8-fast", 260, 72, 136, 256, 2, False),
    ("w4a16", 130, 72, 136, 128, 2, False),
    ("w4a16", 200, 72, 328, 192, 2, False),
    ("w4a16", 260, 136, 328, 256, 2, False),
    ("w4a16", 130, 200, 328, 128, 3, False),
    ("w4a4", 130, 264, 328, 128, 3, False),
    ("w4a16-bf16", 130, 72, 136, 128, 2, False),
    ("nvfp4", 70, 72, 136, 64, 2, False),
    ("w4a4-bf16", 19, 75, 328, 16, 2, True),
    ("w4a4", 130, 72, 328, 128, 2, False),
    ("w4a4", 260, 72, 328, 256, 2, True),
    ("w4a4", 200, 72, 328, 192, 2, False),
    ("w4a4", 200, 264, 328, 192, 3, False),
    ("w4a4-g32", 19, 75, 328, 16, 2, True),
    ("w4a4-g64", 64, 75, 328, 64, 2, False),
    ("w4a8", 60, 75, 328, 64, 2, True),
    ("w4a4", 90, 72, 328, 96, 2, False),
    ("w4a8-g32", 130, 72, 328, 128, 2, False),
    *((name, 19, 75, K, 16, 2, True) for name, K in ODD),
]


@pytest.mark.parametrize("name,M,N,K,tile,warpgroups,bias", CASES)
def test_gemm(name: str, M: int, N: int, K: int, tile: int, warpgroups: int, bias: bool, tmp_path: Path) -> None:
    """Every code and scale of random operands, every output element; outputs begin as NaN."""
    check(name, M, N, K, tmp_path, 1, GemmConfig("", "", tile, warpgroups, bias=bias))


SHARED = {
    "split": GemmConfig("", "", 16, 2, split=3),
    "split over units of a pair": GemmConfig("", "", 16, 2, split=2, pairs=True),
    "split without clusters": GemmConfig("", "", 16, 2, split=3, clustered=False),
    "multicast": GemmConfig("", "", 32, 2, multicast=2),
    "warpgroups share rows": GemmConfig("", "", 16, 2, ways=2),
    "four of them, several tiles a CTA": GemmConfig("", "", 16, 4, ways=4),
    "shared rows of many tokens": GemmConfig("", "", 128, 2, ways=2, split=2, clustered=False),
    "shared rows and a split": GemmConfig("", "", 16, 2, ways=2, split=2, clustered=False, pairs=True),
    "residual": GemmConfig("", "", 16, 2, residual=True),
    "residual and a split": GemmConfig("", "", 32, 2, split=2, residual=True, bias=True),
    "alternating sums": GemmConfig("", "", 64, 2, split=3, pairs=True),  # of one and of two units
}


@pytest.mark.parametrize(
    "name,how",
    [
        ("w4a4-bf16", "split"),
        ("w4a4-bf16", "split over units of a pair"),
        ("w4a4", "split"),
        ("w4a4", "split over units of a pair"),
        ("w4a8-g32", "split over units of a pair"),
        ("w4a4", "split without clusters"),
        ("nvfp4", "split"),
        ("fp8", "split without clusters"),
        ("fp8", "multicast"),
        ("fp8", "alternating sums"),
        ("nvfp4", "multicast"),
        ("fp8-fast", "multicast"),
        ("w4a4", "warpgroups share rows"),
        ("w8a8", "warpgroups share rows"),
        ("w4a4", "four of them, several tiles a CTA"),
        ("w4a4", "shared rows of many tokens"),
        ("w4a8", "shared rows and a split"),
        ("w4a4", "residual"),
        ("w4a16", "residual and a split"),
        ("w4a4", "shared rows and a split"),
    ],
)
def test_gemm_of_several_ctas(name: str, how: str, tmp_path: Path) -> None:
    """A tile of K shared by CTAs that add up; a tile of tokens loaded by one CTA for two."""
    check(name, 37, 136, 456, tmp_path, 2, SHARED[how])


LAST_ROUNDS = (  # rows: tiles for three CTAs, of which the last round has so many
    ("w4a4", 72, 1),
    ("w4a16", 200, 2),  # two tiles are too many for three CTAs: nothing is shared
    ("w8a8", 456, 1),  # behind a whole round
)


@pytest.mark.parametrize("name,N,left", LAST_ROUNDS)
def test_last_round_is_shared(name: str, N: int, left: int, tmp_path: Path) -> None:
    """Tiles behind the last whole round, each along K by two CTAs, where the CTAs suffice."""
    assert left == -(-N // 128) % 3
    check(name, 21, N, 456, tmp_path, 3, GemmConfig("", "", 32, 2, tail=2))


def check(name: str, M: int, N: int, K: int, folder: Path, grid: int, config: GemmConfig) -> None:
    """Run the kernel of `config`, its kind and stages filled in, on random operands against float64."""
    from atom.kernels.gemm_sm90 import PackedWeightGemm, compile_gemm

    torch.manual_seed(0)
    linear = linear_scheme(name)
    weight, x = random_weight(linear, N, K, "cpu"), random_activation(linear, M, K, "cpu")
    packed = pack_weight(linear, weight)
    outliers = packed.int4_units < packed.units.shape[1]
    config = replace(
        config,
        weight=packed.kind,
        token_scales=token_scales(linear),
        int8_units=outliers,
        aligned=N % 8 == 0,
        stages=2,
    )
    row_tiles = -(-N // (64 * config.warpgroups // config.ways * config.multicast))
    token_tiles = -(-M // config.tile_m)
    if config.split > 1:
        grid = row_tiles * token_tiles * config.split  # one tile each
    tiles = row_tiles * token_tiles
    left = tiles % grid if config.tail > 1 else 0
    offset = torch.randn(N).bfloat16()
    residual = 30 * torch.randn(M, N).bfloat16()
    y = np.full((M, N), 0x7FFF, np.uint16)
    codes = as_array(x.codes)
    scratch = np.zeros(COUNTER_WORDS + grid * config.tile_m * 64 * config.warpgroups, np.float32)
    TensorCoreKernel(ptx(compile_gemm, config, folder)).launch_all(
        grid,
        PackedWeightGemm(config).threads,
        [
            TensorMap(codes, config.tile_m // config.multicast),
            Sizes(codes.shape),
            Argument(as_array(packed.units.view(torch.int32)), (2,)),
            Argument(as_array(x.scales)),
            Argument(as_array(packed.channel_scale) if packed.channel_scale.numel() else np.zeros(1, np.float32)),
            Argument(as_array(offset)),
            Argument(y),
            Argument(as_array(residual)),
            Argument(scratch),
            packed.int4_units,
            row_tiles,
            token_tiles,
            tiles - left if left * config.tail <= grid else tiles,
        ],
        together=grid if config.meets_at_counter else config.split * config.multicast,
    )
    expected = product(x, weight, linear) + (offset.double() if config.bias else 0.0)
    if config.residual:
        expected = expected.bfloat16().double() + residual.double()
    error = (bf16(y).double() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 + 1e-5 * expected.abs().mean()).all())
