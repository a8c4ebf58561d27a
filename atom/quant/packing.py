"""Packing: how codes lie in bytes on disk. Device neutral; kernels repack at load.

INT4 and E2M1: two codes a byte, the low nibble first; INT2: four, the lowest bits first. INT3: eight codes in three
bytes, little endian. Formats of 8 bits and more lie as they are. Rows are padded with zero codes to whole bytes.
"""

import torch
from torch import Tensor

from .formats import Format

CHUNKS = {2: (4, 1), 3: (8, 3), 4: (2, 1)}  # bits of a code -> codes that fill a chunk of whole bytes, and its bytes


def packed_columns(columns: int, fmt: Format) -> int:
    """Bytes (or elements, from 8 bits up) of a packed row of `columns` codes."""
    if fmt.bits >= 8:
        return columns
    codes, size = CHUNKS[fmt.bits]
    return -(-columns // codes) * size


def packed_dtype(fmt: Format) -> torch.dtype:
    return fmt.dtype if fmt.bits >= 8 else torch.uint8


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Codes [..., K] packed: uint8 [..., packed_columns(K)], or the codes themselves from 8 bits up.

    Signed codes are in the format's dtype, unsigned ones in uint8.
    """
    if fmt.bits >= 8:
        return codes.contiguous()
    per_chunk, size = CHUNKS[fmt.bits]
    bits = codes.view(torch.uint8) & (1 << fmt.bits) - 1  # two's complement keeps its low bits
    short = -codes.shape[-1] % per_chunk
    if short:
        bits = torch.nn.functional.pad(bits, (0, short))
    chunks: Tensor = bits.unflatten(-1, (-1, per_chunk))
    if fmt.bits == 4:
        return chunks[..., 0] | chunks[..., 1] << 4
    shifts = torch.arange(0, 8 * size, fmt.bits, device=codes.device)
    words = (chunks.to(torch.int32) << shifts).sum(-1)
    return torch.stack([(words >> 8 * byte & 255).to(torch.uint8) for byte in range(size)], -1).flatten(-2)


def unpack(packed: Tensor, fmt: Format, columns: int) -> Tensor:
    """Codes [..., columns] in the format's dtype from what `pack` wrote."""
    if fmt.bits >= 8:
        return packed
    codes = unpack_bits(packed, fmt.bits, columns)
    if not fmt.is_integer:
        return codes
    sign = 1 << (fmt.bits - 1)
    extended: Tensor = (codes ^ sign).view(torch.int8) - sign
    return extended


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The bits of each code, uint8 [..., columns]: unsigned codes as they are. Fewer than 8 bits."""
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]
    _, size = CHUNKS[bits]
    parts = packed.to(torch.int32).unflatten(-1, (-1, size))
    words = sum((parts[..., byte] << 8 * byte for byte in range(1, size)), parts[..., 0])
    shifts = torch.arange(0, 8 * size, bits, device=packed.device)
    codes: Tensor = (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2).to(torch.uint8)
    return codes[..., :columns]
