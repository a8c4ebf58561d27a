"""How weights are packed for the GEMM kernels: units in the order in which wgmma wants them.

A unit covers 64 rows (output features) and one step of K, followed by its scales; gemm_kinds.py lists the kinds.
Here stand those multiplied in INT8 and E4M3, in gemm_pack_bf16.py the others.

Codes of 8 bits that are multiplied as they stand are [64 rows, 128 bytes], the 16-byte chunks of a row exchanged:
chunk `c` of row `r` lies at `c ^ (r % 8)`, wgmma's 128-byte swizzle. Otherwise a unit holds 128 columns of INT4 or 64
of INT8 outliers, 4096 bytes either way, and one scale for each of its rows. Word `j` of thread `t` (of a warpgroup's
128) holds, with `g = t % 32 // 4`, `q = t % 4` and `row = 16 * (t // 32) + g`:

  INT4   byte b: low nibble row, high nibble row + 8; column 32 (j // 2) + 16 (j % 2) + 4 q + b
  INT8   byte b: row + 8 (j % 2); column 32 (j // 4) + 16 (j // 2 % 2) + 4 q + b

which is the A fragment of `wgmma.m64nNk32` after a mask (INT4) or as it stands (INT8). Rows and columns that do not
fill a unit are zero codes with zero scales. Source of the fragment: PTX ISA, wgmma.mma_async, s8 matrix A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm_kinds import OUTLIER_COLUMNS, UNIT_ROWS

INT4_COLUMNS = 128
INT8_COLUMNS = OUTLIER_COLUMNS
CODE_BYTES = 4096
SCALE_BYTES = 128  # whole 128-byte lines: units of 4160 bytes streamed 10 % slower (H200)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in units, and what the epilogue needs.

    kind           name of a WeightKind
    units          uint8 [ceil(N / 64), units along K, unit bytes]
    int4_units     how many of the units along K are of that kind; the rest are INT8 outliers
    channel_scale  float32 [N] where the kind has one, else empty
    features       N
    """

    kind: str
    units: Tensor
    int4_units: int
    channel_scale: Tensor
    features: int

    @property
    def columns(self) -> int:
        """Columns of the activation codes: every group padded to 128, outliers to 64."""
        return INT4_COLUMNS * self.int4_units + INT8_COLUMNS * (self.units.shape[1] - self.int4_units)


def fragment_index(columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every byte of a unit: int64 [128 threads, 8 words, 4 bytes] each.

    For INT4 (columns 128) the row is that of the low nibble; the high nibble's is 8 further.
    """
    thread = torch.arange(128).view(128, 1, 1)
    word = torch.arange(8).view(1, 8, 1)
    byte = torch.arange(4).view(1, 1, 4)
    row = 16 * (thread // 32) + thread % 32 // 4
    column = 4 * (thread % 4) + byte
    if columns == INT4_COLUMNS:
        row, column = row, column + 32 * (word // 2) + 16 * (word % 2)
    elif columns == INT8_COLUMNS:
        row, column = row + 8 * (word % 2), column + 32 * (word // 4) + 16 * (word // 2 % 2)
    else:
        raise ValueError(f"a unit has 128 INT4 or 64 INT8 columns, got {columns}; pad the codes")
    return row.expand(128, 8, 4), column.expand(128, 8, 4)


def pack_int4_codes(codes: Tensor, offset: int = 0) -> Tensor:
    """INT4 codes int8 [N, K] (-8 .. 7) as bytes uint8 [ceil(N / 64), ceil(K / 128), 4096]; nibble = code + offset."""
    tiles = tiles_of(codes, INT4_COLUMNS)
    row, column = (index.to(codes.device) for index in fragment_index(INT4_COLUMNS))
    low = tiles[:, :, row, column] + offset
    high = tiles[:, :, row + 8, column] + offset
    return thread_order((low & 15) | (high & 15) << 4)


def pack_int8_codes(codes: Tensor) -> Tensor:
    """INT8 codes int8 [N, K] as bytes uint8 [ceil(N / 64), ceil(K / 64), 4096]."""
    row, column = (index.to(codes.device) for index in fragment_index(INT8_COLUMNS))
    return thread_order(tiles_of(codes, INT8_COLUMNS)[:, :, row, column])


def pack_group_scaled(
    codes: Tensor, scale: Tensor, outliers: Tensor | None, outlier_scale: Tensor | None
) -> PackedWeight:
    """Units with a bfloat16 scale per row: INT4 groups of 128, then INT8 outlier columns.

    codes          int8 [N, Kn]                  within [-8, 7]; the last group may be short
    scale          [N, ceil(Kn / 128)]           bfloat16 values
    outliers       int8 [N, outliers] or None
    outlier_scale  [N, 1] or None
    """
    # the kernel leaves an INT4 code in the high half of its byte (16 x code): the power of two moves into the scale
    shifted = scale.float().div(16).to(torch.bfloat16)
    parts = [with_scales(pack_int4_codes(codes), shifted), *outlier_units(outliers, outlier_scale)]
    units = torch.cat(parts, dim=1).contiguous()
    return PackedWeight("int4", units, parts[0].shape[1], torch.empty(0, device=codes.device), codes.shape[0])


def pack_channel_scaled(
    codes: Tensor,
    factors: Tensor,
    channel_scale: Tensor,
    outliers: Tensor | None = None,
    outlier_scale: Tensor | None = None,
    group: int = INT4_COLUMNS,
) -> PackedWeight:
    """Units with an unsigned integer factor per row and group under one float32 scale per row, then INT8 outliers.

    codes          int8 [N, Kn]           within [-8, 7]; the last group may be short
    factors        uint8 [N, ceil(Kn/g)]  within [0, 15], g = `group` of 32, 64 or 128; code x factor stays within INT8
    channel_scale  float32 [N, 1]
    outliers       int8 [N, outliers] or None
    outlier_scale  [N, 1] bfloat16 values, or None
    """
    if int(factors.max()) > 15:
        raise ValueError(f"a group factor is at most 15, got {int(factors.max())}; use scale_format='uint4'")
    packed, factors = pack_int4_codes(codes, offset=8), factors.to(torch.uint8)
    first = with_scales(packed, factors) if group == INT4_COLUMNS else with_small_groups(packed, factors, group)
    units = torch.cat([first, *outlier_units(outliers, outlier_scale)], dim=1).contiguous()
    kind = "int4_uint4" if group == INT4_COLUMNS else "int4_uint4_g32"
    return PackedWeight(kind, units, first.shape[1], channel_scale.reshape(-1).float(), codes.shape[0])


def with_small_groups(packed: Tensor, factors: Tensor, group: int) -> Tensor:
    """Append each unit's factors of 4 bits, one for each row and 32 columns: [N, groups] of 32 or 64 columns.

    Word `8 w + g` holds those of rows `16 w + g` (low nibbles) and `16 w + g + 8`, a byte for each 32 columns.
    """
    tiles, units = packed.shape[:2]
    each = factors.repeat_interleave(group // 32, 1)
    padded = torch.nn.functional.pad(each, (0, 4 * units - each.shape[1], 0, tiles * UNIT_ROWS - each.shape[0]))
    rows = padded.view(tiles, 4, 2, 8, units, 4)  # w, low or high nibble, g
    words = rows[:, :, 0] | rows[:, :, 1] << 4
    return torch.cat([packed, words.permute(0, 3, 1, 2, 4).reshape(tiles, units, SCALE_BYTES)], dim=2)


def outlier_units(outliers: Tensor | None, scale: Tensor | None) -> list[Tensor]:
    """Units of INT8 outlier columns int8 [N, outliers] under a bfloat16 scale [N, 1] per row; none without any."""
    if outliers is None or not outliers.shape[1]:
        return []
    assert scale is not None
    packed = pack_int8_codes(outliers)
    return [with_scales(packed, scale.to(torch.bfloat16).expand(-1, packed.shape[1]))]


def pack_verbatim(codes: Tensor, channel_scale: Tensor, kind: str) -> PackedWeight:
    """Codes of 8 bits as wgmma reads them from shared memory (int8, e4m3) under one float32 scale per row.

    codes          int8 or float8_e4m3fn [N, K]
    channel_scale  float32 [N, 1]
    """
    rows, K = codes.shape
    padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, -K % 128, 0, -rows % UNIT_ROWS))
    chunks = padded.view(padded.shape[0] // UNIT_ROWS, UNIT_ROWS, -1, 8, 16).transpose(1, 2)
    place = torch.arange(8) ^ (torch.arange(UNIT_ROWS) % 8).unsqueeze(1)  # its own inverse
    index = place.to(codes.device).view(1, 1, UNIT_ROWS, 8, 1).expand(chunks.shape)
    units = chunks.gather(3, index).flatten(2)
    return PackedWeight(kind, units.contiguous(), units.shape[1], channel_scale.reshape(-1).float(), rows)


def tiles_of(codes: Tensor, columns: int) -> Tensor:
    """Zero-padded codes as int16 [row tiles, units, 64, columns]."""
    rows, K = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -K % columns, 0, -rows % UNIT_ROWS)).to(torch.int16)
    return padded.view(padded.shape[0] // UNIT_ROWS, UNIT_ROWS, -1, columns).transpose(1, 2)


def thread_order(words: Tensor) -> Tensor:
    """[tiles, units, 128 threads, 8 words, 4 bytes] to bytes: words 0-3 of every thread, then words 4-7."""
    tiles, units = words.shape[:2]
    halves = words.view(tiles, units, 128, 2, 16).transpose(2, 3)
    return (halves & 255).to(torch.uint8).reshape(tiles, units, CODE_BYTES)


def with_scales(packed: Tensor, scales: Tensor, scale_bytes: int = SCALE_BYTES) -> Tensor:
    """Append each unit's 64 row scales ([N, units], any dtype) as bytes."""
    tiles, units = packed.shape[:2]
    padded = torch.nn.functional.pad(scales, (0, 0, 0, tiles * UNIT_ROWS - scales.shape[0]))
    by_unit = padded.view(tiles, UNIT_ROWS, units).transpose(1, 2).contiguous().view(torch.uint8)
    spare = by_unit.new_zeros(tiles, units, scale_bytes - by_unit.shape[2])
    return torch.cat([packed, by_unit, spare], dim=2)
