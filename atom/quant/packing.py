"""Packing: how codes lie in bytes on disk. Device neutral; kernels repack at load.

INT4 and E2M1: two codes a byte, the low nibble first. INT3: eight codes in three bytes, little endian. Formats of
8 bits and more lie as they are. Rows are padded with zero codes to whole bytes.
"""

import torch
from torch import Tensor

from .formats import Format


def packed_columns(columns: int, fmt: Format) -> int:
    """Bytes (or elements, from 8 bits up) of a packed row of `columns` codes."""
    if fmt.bits >= 8:
        return columns
    return -(-columns // 2) if fmt.bits == 4 else -(-columns // 8) * 3


def packed_dtype(fmt: Format) -> torch.dtype:
    return fmt.dtype if fmt.bits >= 8 else torch.uint8


def pack(codes: Tensor, fmt: Format) -> Tensor:
    """Codes [..., K] packed: uint8 [..., packed_columns(K)], or the codes themselves from 8 bits up."""
    if fmt.bits >= 8:
        return codes.contiguous()
    per_chunk = 2 if fmt.bits == 4 else 8
    mask = (1 << fmt.bits) - 1
    bits = codes.view(torch.uint8) & mask  # two's complement keeps its low bits
    short = -codes.shape[-1] % per_chunk
    if short:
        bits = torch.nn.functional.pad(bits, (0, short))
    chunks: Tensor = bits.unflatten(-1, (-1, per_chunk))
    if fmt.bits == 4:
        return chunks[..., 0] | chunks[..., 1] << 4
    shifts = torch.arange(0, 24, 3, device=codes.device)
    words = (chunks.to(torch.int32) << shifts).sum(-1)
    return torch.stack([(words >> s & 255).to(torch.uint8) for s in (0, 8, 16)], -1).flatten(-2)


def unpack(packed: Tensor, fmt: Format, columns: int) -> Tensor:
    """Codes [..., columns] in the format's dtype from what `pack` wrote."""
    if fmt.bits >= 8:
        return packed
    if fmt.bits == 4:
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    else:
        triples = packed.to(torch.int32).unflatten(-1, (-1, 3))
        words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        shifts = torch.arange(0, 24, 3, device=packed.device)
        codes = (words.unsqueeze(-1) >> shifts & 7).flatten(-2).to(torch.uint8)
    codes = codes[..., :columns]
    if not fmt.is_integer:
        return codes
    sign = 1 << (fmt.bits - 1)
    extended: Tensor = (codes ^ sign).view(torch.int8) - sign
    return extended
