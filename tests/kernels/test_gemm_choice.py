"""What the sm_90a GEMM claims and refuses, and whether the config of every problem fits the machine."""

from dataclasses import replace

import pytest
import torch

from atom.kernels.bench_operands import random_activation, random_weight
from atom.kernels.gemm import Gemm, pack_weight, token_scales
from atom.kernels.gemm_choice import SMS, choose_config
from atom.kernels.gemm_config import SHARED_BYTES
from atom.kernels.gemm_kinds import KINDS
from atom.kernels.refusals_sm90 import refuses_linear, refuses_scheme
from atom.kernels.registry import Problem
from atom.quant.granularity import Group
from atom.quant.presets import get_scheme
from atom.quant.schemes import LinearScheme, OutlierSpec, RotationSpec

from .linear_schemes import gemm_schemes, linear_scheme


@pytest.mark.parametrize("name", gemm_schemes())
def test_presets_that_the_kernel_claims(name: str) -> None:
    assert refuses_scheme(gemm_schemes()[name]) is None


@pytest.mark.parametrize("name", gemm_schemes())
def test_presets_run_unasked(name: str) -> None:
    """With any number of features, in and out."""
    for N, K in ((512, 512), (511, 509)):
        assert refuses_linear(Problem("sm_90", gemm_schemes()[name], N, K)) is None
    assert "built for sm_90" in str(refuses_linear(Problem("sm_100", gemm_schemes()[name], 512, 512)))


def refused() -> dict[str, tuple[LinearScheme, str]]:
    nvfp4, w4a4, fp8 = (get_scheme(name).for_linear("x") for name in ("nvfp4", "w4a4", "fp8"))
    assert w4a4.activation is not None and nvfp4.weight is not None and fp8.weight is not None
    return {
        "full precision": (LinearScheme(), "not quantized"),
        "rotated": (replace(nvfp4, rotation=RotationSpec("block_hadamard", 512)), "at most 256"),
        "fp8 weights, bf16 activations": (LinearScheme(fp8.weight), "fp8_e4m3 activations"),
        "fp8 outliers": (replace(w4a4, outliers=OutlierSpec(128, "fp8_e4m3")), "INT8 columns"),
        "nvfp4 with outliers": (replace(nvfp4, outliers=OutlierSpec(16), reorder=True), "INT4 activations"),
        "groups of 32 under e4m3": (LinearScheme(replace(nvfp4.weight, granularity=Group(32))), "no kernel yet"),
        "e2m1 in groups of 128": (LinearScheme(replace(nvfp4.weight, granularity=Group(128))), "no kernel yet"),
        "small weight groups, INT4 tokens": (LinearScheme(nvfp4.weight, w4a4.activation), "no kernel yet"),
    }


@pytest.mark.parametrize("name", refused())
def test_schemes_that_it_refuses_with_a_reason(name: str) -> None:
    linear, reason = refused()[name]
    assert reason in str(refuses_scheme(linear))


@pytest.mark.parametrize("features,units", [(576, 5), (4096, 33), (28672, 33), (4096, 112), (896, 70), (64, 1)])
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 4096])
@pytest.mark.parametrize("sms", [16, 78, 114, 132])  # a slice of an H100, an H20, an H100 on PCIe, an H100 and H200
@pytest.mark.parametrize("weight", KINDS)
def test_configs_fit_the_machine(weight: str, sms: int, tokens: int, features: int, units: int) -> None:
    config = choose_config(weight, "token", tokens, features, units, sms=sms)
    assert 2 <= config.stages <= 16
    assert config.ctas_per_sm * (config.pool_bytes + 2048) <= SHARED_BYTES + 2048
    assert config.split <= min(8, units), "a portable cluster, and a unit for every CTA of it"
    tiles = -(-features // (64 * config.warpgroups)) * -(-tokens // config.tile_m)
    assert config.clustered or tiles * config.split <= sms, "CTAs that wait for each other are all resident"
    assert config.tail == 1 or config.split == config.ways == config.multicast == config.ctas_per_sm == 1


WIDE = [  # tokens, features, and the tile's tokens and warpgroups
    (192, 12288, (192, 2)),  # Llama-2-7B's qkv: 96 tiles of 128 rows, one round of the SMs; 192 of 96 tokens are two
    (256, 12288, (256, 2)),
    (96, 22016, (96, 3)),  # its gate_up: 115 tiles of 192 rows are one round, 172 of 128 two
    (128, 22016, (128, 3)),
    (192, 22016, (192, 3)),
    (256, 22016, (128, 3)),  # two rounds, as 172 of 128 rows and 256 tokens, but smaller tiles
    (128, 28672, (128, 4)),  # Llama-3-8B's gate_up: 112 tiles of 256
    (192, 28672, (192, 2)),
    (256, 28672, (256, 2)),
]


@pytest.mark.parametrize("tokens,features,tile", WIDE)
def test_tiles_of_wide_products_fill_a_round_of_the_sms(tokens: int, features: int, tile: tuple[int, int]) -> None:
    config = choose_config("int4_uint4", "token", tokens, features, 34, int8_units=True)
    assert (config.tile_m, config.warpgroups) == tile and config.split == 1


@pytest.mark.parametrize("weight", ["int4_uint4", "int4_uint4_g32", "int8", "e4m3_fast"])
@pytest.mark.parametrize(
    ("features", "units", "warpgroups", "split"),
    [(28672, 32, 4, 1), (22016, 32, 3, 1), (12288, 32, 2, 1), (6144, 32, 2, 2), (4096, 112, 2, 4), (4096, 32, 2, 4)],
)
def test_65_to_96_tokens_are_a_tile_of_96(weight: str, features: int, units: int, warpgroups: int, split: int) -> None:
    config = choose_config(weight, "token", 96, features, units)
    assert (config.tile_m, config.warpgroups, config.split, config.ways) == (96, warpgroups, split, 1)


W4A16 = [  # of Llama-3-8B's qkv, o, gate_up and down
    (512, ((128, 3), (128, 2), (256, 2), (128, 2))),
    (8192, ((256, 2),) * 4),
    (192, ((192, 2),) * 4),
]


@pytest.mark.parametrize("tokens,tiles", W4A16)
def test_tiles_of_bfloat16_products(tokens: int, tiles: tuple[tuple[int, int], ...]) -> None:
    for (features, units), tile in zip(((6144, 32), (4096, 32), (28672, 32), (4096, 112)), tiles, strict=True):
        config = choose_config("int4_uint4_bf16", "none", tokens, features, units)
        assert (config.tile_m, config.warpgroups) == tile


W4A16_FEW = [  # tokens; (warpgroups, CTAs of a tile, in a cluster, CTAs of an SM) of Llama-3-8B's layer, as above
    (16, ((4, 4, True, 1), (2, 4, False, 1), (2, 1, True, 2), (2, 4, False, 1))),
    (32, ((2, 2, True, 2), (2, 4, False, 1), (2, 1, True, 2), (2, 4, False, 1))),
    (64, ((2, 2, True, 1), (2, 4, False, 1), (4, 1, True, 1), (4, 8, False, 1))),
]


@pytest.mark.parametrize("tokens,wanted", W4A16_FEW)
def test_bfloat16_products_of_few_tokens(tokens: int, wanted: tuple[tuple[int, int, bool, int], ...]) -> None:
    for (features, units), choice in zip(((6144, 32), (4096, 32), (28672, 32), (4096, 112)), wanted, strict=True):
        config = choose_config("int4_uint4_bf16", "none", tokens, features, units)
        assert (config.warpgroups, config.split, config.clustered, config.ctas_per_sm) == choice
        ctas = -(-features // (64 * config.warpgroups)) * config.split
        assert config.clustered or ctas <= SMS * config.ctas_per_sm, "those that wait for each other must all run"


def test_residuals_that_do_not_fit_are_refused() -> None:
    scheme = linear_scheme("w4a8")
    packed = pack_weight(scheme, random_weight(scheme, 64, 128, "cpu"))
    x = random_activation(scheme, 3, 128, "cpu")
    adding = Gemm(packed, token_scales(scheme), adds=True)
    with pytest.raises(ValueError, match="got none; use op linear"):
        adding(x.codes, x.scales)
    with pytest.raises(ValueError, match=r"must be bfloat16 \[3, 64\], got torch.float32"):
        adding(x.codes, x.scales, residual=torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"contiguous, got strides \(128, 1\)"):
        adding(x.codes, x.scales, residual=torch.zeros(3, 128, dtype=torch.bfloat16)[:, :64])
    with pytest.raises(ValueError, match="build it by op linear_add"):
        Gemm(packed, token_scales(scheme))(x.codes, x.scales, residual=torch.zeros(3, 64, dtype=torch.bfloat16))
