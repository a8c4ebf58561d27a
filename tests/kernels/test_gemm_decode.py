"""The kernel's own decoding code, run in numpy on packed weights: every code under every scale, exactly.

The functions of gemm_decode_sm90.py are taken as they stand, without the compiler; the few instructions they use are
replaced by numpy. Where a thread's values belong is taken from the DSL's description of wgmma, not from the packing.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atom.kernels.gemm import pack_weight
from atom.kernels.gemm_pack import pack_channel_scaled, pack_group_scaled, pack_verbatim
from atom.kernels.gemm_pack_bf16 import pack_by_factor_bf16, pack_group_of_16, pack_group_of_32, pack_row_scaled
from atom.quant.formats import E2M1
from atom.quant.mixed import dequantize_weight, quantize_weight
from atom.quant.rounding import code_values

from .emulated import decoder, operand_matrix
from .linear_schemes import linear_scheme
from .machine_code import needs_dsl


@pytest.fixture
def decode() -> Any:
    return decoder()


def every_code(rows: int, columns: int, group: int, low: int) -> Tensor:
    """All 16 codes in every group of 16 columns, in an order that differs by row and group."""
    column = torch.arange(columns)
    shift = torch.arange(rows).unsqueeze(1) + column // group
    return ((column + shift) % 16 + low).to(torch.int8 if low else torch.uint8)


def padded(dense: Tensor) -> np.ndarray:
    N, K = dense.shape
    return torch.nn.functional.pad(dense, (0, -K % 128, 0, -N % 64)).double().numpy()


@needs_dsl
@pytest.mark.parametrize("is_float", [True, False], ids=["e2m1", "int4"])
def test_every_code_times_every_e4m3_scale(is_float: bool, decode: Any) -> None:
    bytes_ = torch.arange(1, 127, dtype=torch.uint8)  # every positive finite E4M3
    scale = bytes_.view(torch.float8_e4m3fn).float().unsqueeze(1).repeat(1, 11)
    scale = torch.stack([scale[:, g].roll(g) for g in range(11)], 1)  # [126 rows, 11 groups: 176 columns]
    codes = every_code(126, 176, 16, 0 if is_float else -8)
    packed = pack_group_of_16(codes, scale, torch.full((1, 1), 0.5), is_float)
    values = code_values(codes, E2M1) if is_float else codes.float()
    wanted = padded(values * scale.repeat_interleave(16, 1))
    assert (operand_matrix(packed, decode) * (256.0 if is_float else 1.0) == wanted).all()
    assert packed.channel_scale.tolist() == [128.0 if is_float else 0.5] * 126


@needs_dsl
def test_every_code_times_powers_of_two(decode: Any) -> None:
    exponent = torch.arange(-30, 34).float().unsqueeze(1) + torch.arange(5)  # [64 rows, 5 groups: 160 columns]
    codes = every_code(64, 160, 32, 0)
    packed = pack_group_of_32(codes, torch.exp2(exponent))
    wanted = padded(code_values(codes, E2M1) * torch.exp2(exponent).repeat_interleave(32, 1))
    assert (operand_matrix(packed, decode) * packed.channel_scale.double().unsqueeze(1).numpy() == wanted).all()


def test_power_of_two_scales_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2\^120.*rescale"):
        pack_group_of_32(torch.zeros(64, 32, dtype=torch.uint8), torch.full((64, 1), 2.0**120))


@needs_dsl
def test_int4_becomes_bf16(decode: Any) -> None:
    codes = every_code(70, 300, 128, -8)
    packed = pack_row_scaled(codes, torch.rand(70, 3))
    assert (operand_matrix(packed, decode) == padded(codes)).all()


@needs_dsl
def test_every_code_times_every_integer_factor_becomes_bf16(decode: Any) -> None:
    codes = every_code(70, 300, 128, -8)
    factors = torch.stack([(torch.arange(70) + 5 * g) % 16 for g in range(3)], 1).to(torch.uint8)
    packed = pack_by_factor_bf16(codes, factors, torch.ones(70, 1))
    wanted = padded(codes.float() * factors.repeat_interleave(128, 1)[:, :300])
    assert (operand_matrix(packed, decode) == wanted).all()
    with pytest.raises(ValueError, match="at most 15"):
        pack_by_factor_bf16(codes, factors + 1, torch.ones(70, 1))


@needs_dsl
def test_int4_in_the_high_half_of_a_byte(decode: Any) -> None:
    codes = every_code(70, 300, 128, -8)
    packed = pack_group_scaled(codes, torch.rand(70, 3), None, None)
    assert (operand_matrix(packed, decode) == 16 * padded(codes)).all()


@needs_dsl
def test_every_code_times_every_integer_factor(decode: Any) -> None:
    codes = every_code(64, 256, 128, -8)
    factors = torch.stack([torch.arange(64) % 16, (torch.arange(64) + 7) % 16], 1).to(torch.uint8)
    packed = pack_channel_scaled(codes, factors, torch.ones(64, 1))
    wanted = padded(codes.float() * factors.repeat_interleave(128, 1))
    assert (operand_matrix(packed, decode) == wanted).all()


@needs_dsl
@pytest.mark.parametrize("group", [32, 64])
def test_every_code_times_every_factor_of_small_groups(group: int, decode: Any) -> None:
    codes = every_code(70, 328, group, -8)
    groups = -(-328 // group)
    factors = (torch.arange(70).unsqueeze(1) + 5 * torch.arange(groups)).remainder(16).to(torch.uint8)
    packed = pack_channel_scaled(codes, factors, torch.ones(70, 1), group=group)
    wanted = padded(codes.float() * factors.repeat_interleave(group, 1)[:, :328])
    assert packed.kind == "int4_uint4_g32" and (operand_matrix(packed, decode) == wanted).all()


@needs_dsl
@pytest.mark.parametrize("name", ["w4a16", "w4a16-bf16", "nvfp4", "mxfp4", "nvint4"])
def test_presets_decode_to_their_weights(name: str, decode: Any) -> None:
    """Random weights with a zero row and a huge value: operand x row scale is the dequantized weight."""
    linear = linear_scheme(name)
    weight = torch.randn(100, 176, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[5, 7] = 90.0
    mixed = quantize_weight(weight, linear)
    packed = pack_weight(linear, mixed)
    found = operand_matrix(packed, decode)[:100, :176]
    if name == "w4a16-bf16":
        scale = mixed.normal.scale.scale.double().repeat_interleave(128, 1)[:, :176].numpy()
    else:
        scale = packed.channel_scale.double().unsqueeze(1).numpy()
    wanted = dequantize_weight(mixed, linear).double().numpy()
    assert np.abs(found * scale - wanted).max() <= 2**-23 * np.abs(wanted).max()


def test_verbatim_codes_are_swizzled() -> None:
    codes = torch.randint(0, 256, (100, 300), dtype=torch.uint8)
    packed = pack_verbatim(codes.view(torch.int8), torch.ones(100, 1), "int8")
    wide = torch.nn.functional.pad(codes, (0, 84, 0, 28))
    row, column = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    address = row * 128 + ((column // 16) ^ (row % 8)) * 16 + column % 16
    assert packed.units.shape == (2, 3, 8192) and packed.columns == 384
    for tile in range(2):
        for unit in range(3):
            wanted = wide[64 * tile : 64 * tile + 64, 128 * unit : 128 * unit + 128]
            assert torch.equal(packed.units[tile, unit][address], wanted)


@needs_dsl
def test_the_dsl_agrees_on_fragments_and_swizzle() -> None:
    """The maps above, asked of the DSL itself: thread and value to element, row and column to byte."""
    from .dsl_layouts import fragment_of_a, swizzled_offsets

    offsets = swizzled_offsets()
    assert all(offsets[r][c] == r * 128 + ((c // 16) ^ (r % 8)) * 16 + c % 16 for r in range(64) for c in range(128))
    for operand, per_word in (("bf16", 2), ("int8", 4)):
        found = fragment_of_a(operand)
        for t in range(128):
            for value in range(4 * per_word):
                r, part = divmod(value, per_word)
                row = 16 * (t // 32) + t % 32 // 4 + 8 * (r % 2)
                column = 4 * per_word * (r // 2) + per_word * (t % 4) + part
                assert found[t][value] == (row, column)
