"""How the operands of Blackwell's block-scaled products lie in memory: E2M1 codes and their scales, as index maps.

Codes: rows padded to 128 columns, two to a byte, the low nibble first: [rows, padded K / 2] bytes. Scales: a byte each
(E4M3 of 16 columns, or E8M0 of 32), in tiles of 128 rows x 4 scales, 512 bytes; in a tile, row r stands at
16 * (r % 32) + 4 * (r // 32), so that what tensor memory copies to four groups of 32 lanes is contiguous. Tiles of one
band of rows follow each other along K. The layout is that of the PTX ISA's tcgen05 scale factors (and CUTLASS').
"""

import torch
from torch import Tensor

COLUMNS = 128  # rows of codes are padded to so many
TILE_ROWS, TILE_SCALES = 128, 4
STEP = 64  # columns of one mma


def padded_columns(K: int) -> int:
    return -(-K // COLUMNS) * COLUMNS


def scale_tiles(K: int, group_size: int) -> int:
    """Tiles of scales along K."""
    return -(-padded_columns(K) // (group_size * TILE_SCALES))


def scale_index(row: Tensor, group: Tensor, tiles: int) -> Tensor:
    """The byte at which the scale of (row, group) lies; `tiles` from scale_tiles."""
    tile = (row // TILE_ROWS) * tiles + group // TILE_SCALES
    inner = row % TILE_ROWS
    return tile * (TILE_ROWS * TILE_SCALES) + 16 * (inner % 32) + 4 * (inner // 32) + group % TILE_SCALES


def pack_scales(scale: Tensor, K: int, group_size: int) -> Tensor:
    """Scales [rows, groups] on the grid of E4M3 or E8M0, float32 -> uint8 [row bands x tiles x 512]; padding is zero.

    group_size   16: as E4M3; 32: as the biased exponent
    """
    rows, groups = scale.shape
    tiles = scale_tiles(K, group_size)
    if group_size == 16:
        values = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        values = (torch.frexp(scale).exponent + 126).to(torch.uint8)
    found = torch.zeros(-(-rows // TILE_ROWS) * tiles * 512, dtype=torch.uint8, device=scale.device)
    row = torch.arange(rows, device=scale.device).unsqueeze(1)
    found[scale_index(row, torch.arange(groups, device=scale.device), tiles)] = values
    return found


def pack_codes(codes: Tensor) -> Tensor:
    """E2M1 codes uint8 [rows, K] -> uint8 [rows, padded K / 2]."""
    padded = torch.nn.functional.pad(codes, (0, padded_columns(codes.shape[1]) - codes.shape[1]))
    pairs = padded.unflatten(1, (-1, 2))
    packed: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def fragment_order(packed: Tensor) -> Tensor:
    """Packed codes uint8 [rows, padded K / 2] -> int32 [row tiles of 16, steps of 64, 32 lanes, 4]: mma's A, m16n8k64.

    Lane 4 g + q holds eight columns of rows g and g + 8, from 8 q on, then from 8 q + 32 on of the same rows. Rows that
    fill up a tile are zero.
    """
    rows = packed.shape[0]
    packed = torch.nn.functional.pad(packed, (0, 0, 0, -rows % 16))
    words = packed.contiguous().view(torch.int32)  # [rows, 8 columns each]
    tiled: Tensor = words.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4))  # [tile, g's half, g, step, q's half, q]
    return tiled.permute(0, 3, 2, 5, 4, 1).flatten(2, 3).flatten(3, 4).contiguous()
