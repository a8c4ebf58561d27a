"""How 4-bit weights are packed for the kinds whose operand is bfloat16; see gemm_pack.py for units and their order.

Word `j` of thread `t` is one step of 16 columns; with `g = t % 32 // 4` and `q = t % 4` its eight codes are, for
`r` = 0 .. 3 (registers of wgmma's A) and `h` = 0, 1 (halves of a register):

  row 16 * (t // 32) + g + 8 * (r % 2), column 16 * j + 8 * (r // 2) + 2 * q + h

INT4: `code + 8` in bits 4 r + 16 h and up. E2M1: bits scattered so that a shift and a mask put them where a bfloat16
has its sign, lowest exponent bits and highest mantissa bit. Source of the fragment: PTX ISA, wgmma, .bf16 matrix A.

8-bit scales follow a unit's codes as [4 warps, 8 rows, 2 (row, row + 8), 128 / group] bytes.
"""

import torch
from torch import Tensor

from ..quant.scales import floor_log2
from .gemm_kinds import KINDS, UNIT_ROWS
from .gemm_pack import PackedWeight, thread_order, tiles_of, with_scales

E2M1_BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))  # by register: mantissa, exponent, sign
E5M3_BIAS = 10
MX_TOP = 245  # what the largest exponent of a row is stored as: 2^118 in the exponent field of a bfloat16


def fragment_index_bf16() -> tuple[Tensor, Tensor]:
    """Row and column of every code of a unit: int64 [128 threads, 8 words, 4 registers, 2 halves] each."""
    thread = torch.arange(128).view(128, 1, 1, 1)
    word = torch.arange(8).view(1, 8, 1, 1)
    register = torch.arange(4).view(1, 1, 4, 1)
    half = torch.arange(2).view(1, 1, 1, 2)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
    column = 16 * word + 8 * (register // 2) + 2 * (thread % 4) + half
    return row.expand(128, 8, 4, 2), column.expand(128, 8, 4, 2)


def code_bits(register: int, is_float: bool) -> Tensor:
    """Where the 16 codes of a register have their bits in the low half of a word: int32 [16]."""
    codes = torch.arange(16, dtype=torch.int32)
    positions = E2M1_BITS[register] if is_float else tuple(4 * register + b for b in range(4))
    return sum(((codes >> b & 1) << p for b, p in enumerate(positions)), torch.zeros(16, dtype=torch.int32))


def pack_codes_bf16(codes: Tensor, is_float: bool) -> Tensor:
    """INT4 codes int8 (-8 .. 7) or E2M1 codes uint8 [N, K] as bytes uint8 [ceil(N / 64), ceil(K / 128), 4096]."""
    tiles = tiles_of(codes.view(torch.uint8) if is_float else codes, 128)
    nibbles = tiles if is_float else tiles + 8
    row, column = (index.to(codes.device) for index in fragment_index_bf16())
    words = torch.zeros(*tiles.shape[:2], 128, 8, dtype=torch.int32, device=codes.device)
    for register in range(4):
        table = code_bits(register, is_float).to(codes.device)
        for half in range(2):
            at = row[..., register, half], column[..., register, half]
            words |= table[nibbles[:, :, at[0], at[1]].long()] << (16 * half)
    return thread_order(words.unsqueeze(-1).view(torch.uint8))


def pack_row_scaled(codes: Tensor, scale: Tensor) -> PackedWeight:
    """INT4 in groups of 128 under bfloat16 scales ("int4_bf16"): codes int8 [N, K], scale [N, ceil(K / 128)]."""
    units = with_scales(pack_codes_bf16(codes, False), scale.to(torch.bfloat16), 128)
    return PackedWeight("int4_bf16", units, units.shape[1], torch.empty(0, device=codes.device), codes.shape[0])


def pack_by_factor_bf16(codes: Tensor, factors: Tensor, channel_scale: Tensor) -> PackedWeight:
    """INT4 in groups of 128 under integer factors under one float32 scale per row ("int4_uint4_bf16").

    codes          int8 [N, K]                  within [-8, 7]; the last group may be short
    factors        uint8 [N, ceil(K / 128)]     within [0, 15]: code x factor is a bfloat16
    channel_scale  float32 [N, 1]
    """
    if int(factors.max()) > 15:
        raise ValueError(f"a group factor is at most 15, got {int(factors.max())}; use scale_format='uint4'")
    units = with_scales(pack_codes_bf16(codes, False), factors.to(torch.bfloat16), 128)
    return PackedWeight("int4_uint4_bf16", units, units.shape[1], channel_scale.reshape(-1).float(), codes.shape[0])


def pack_group_of_16(codes: Tensor, scale: Tensor, outer: Tensor, is_float: bool) -> PackedWeight:
    """E2M1 or INT4 codes [N, K] under E4M3 scales [N, ceil(K / 16)] (as float32), themselves under `outer`.

    outer  float32 [1, 1] (per tensor) or [N, 1] (per channel)
    """
    kind = "e2m1_g16" if is_float else "int4_g16"
    mantissa, exponent = torch.frexp(scale.float())  # scale = mantissa x 2^exponent, mantissa in [0.5, 1)
    stored = ((exponent - 1 + E5M3_BIAS) << 3 | (mantissa * 16 - 8).int()).to(torch.uint8)
    channel = outer.reshape(-1).float().expand(codes.shape[0]) * (256.0 if is_float else 1.0)
    return _group_scaled(kind, codes, stored, channel, 16)


def pack_group_of_32(codes: Tensor, scale: Tensor) -> PackedWeight:
    """E2M1 codes uint8 [N, K] under power-of-two scales [N, ceil(K / 32)] (as float32).

    A row's largest exponent goes into its float32 scale; groups 2^244 times smaller than it vanish.
    Raises ValueError for scales from 2^119 on, which leave no room for the product.
    """
    exponent = floor_log2(scale)
    top = exponent.amax(1, keepdim=True)
    if float(top.max()) > 119:
        raise ValueError(f"an E8M0 weight scale is 2^{int(top.max())}; the kernel takes up to 2^119; rescale the layer")
    stored = (exponent - top + MX_TOP).clamp_min(0).to(torch.uint8)
    return _group_scaled("e2m1_g32", codes, stored, torch.exp2(top[:, 0] + 8), 32)


def _group_scaled(kind: str, codes: Tensor, stored: Tensor, channel: Tensor, group: int) -> PackedWeight:
    """Units with `stored` scale bytes [N, groups] behind their codes."""
    packed = pack_codes_bf16(codes, is_float=kind.startswith("e2m1"))
    tiles, units = packed.shape[:2]
    per_unit = 128 // group
    padded = torch.nn.functional.pad(
        stored, (0, units * per_unit - stored.shape[1], 0, tiles * UNIT_ROWS - stored.shape[0])
    )
    shaped = padded.view(tiles, 4, 2, 8, units, per_unit)  # row = 16 warp + 8 r + g
    scales = shaped.permute(0, 4, 1, 3, 2, 5).reshape(tiles, units, KINDS[kind].scale_bytes)
    return PackedWeight(kind, torch.cat([packed, scales], 2), units, channel.contiguous(), codes.shape[0])
