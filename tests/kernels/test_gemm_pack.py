"""How the sm_90a GEMM's weights are packed: each code where wgmma reads it, scales behind their units."""

import pytest
import torch

from atom.kernels.gemm_pack import (
    CODE_BYTES,
    UNIT_ROWS,
    fragment_index,
    pack_channel_scaled,
    pack_group_scaled,
    pack_int4_codes,
    pack_int8_codes,
)


def test_fragment_index_covers_a_unit_once() -> None:
    row, column = fragment_index(128)
    assert torch.equal(
        torch.sort((row * 128 + column).flatten())[0].unique(), torch.sort((row * 128 + column).flatten())[0]
    )
    both = torch.cat(((row * 128 + column).flatten(), ((row + 8) * 128 + column).flatten()))
    assert torch.equal(both.sort()[0], torch.arange(64 * 128))
    row, column = fragment_index(64)
    assert torch.equal((row * 64 + column).flatten().sort()[0], torch.arange(64 * 64))


def test_int4_units_hold_each_code_where_wgmma_reads_it() -> None:
    codes = torch.randint(-8, 8, (100, 300), dtype=torch.int8)
    words = pack_int4_codes(codes).view(2, 3, 2, 128, 4, 4)  # [row tile, unit, half, thread, word, byte]
    padded = torch.nn.functional.pad(codes, (0, 84, 0, 28))
    for thread, word, byte in ((0, 0, 0), (5, 3, 2), (33, 7, 1), (127, 6, 3)):
        g, q = thread % 32 // 4, thread % 4
        row, column = 16 * (thread // 32) + g, 32 * (word // 2) + 16 * (word % 2) + 4 * q + byte
        for tile in range(2):
            for unit in range(3):
                value = int(words[tile, unit, word // 4, thread, word % 4, byte])
                signed = [(n ^ 8) - 8 for n in (value & 15, value >> 4)]
                wanted = padded[tile * 64 + row : tile * 64 + row + 9 : 8, unit * 128 + column].tolist()
                assert signed == wanted


def test_int8_units_hold_each_code_where_wgmma_reads_it() -> None:
    codes = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    words = pack_int8_codes(codes).view(2, 128, 4, 4)  # [half, thread, word, byte]
    row, column = fragment_index(64)
    for half in range(2):
        for word in range(4):
            wanted = codes[row[:, 4 * half + word], column[:, 4 * half + word]]
            assert torch.equal(words[half, :, word].view(torch.int8), wanted)


def test_scales_stand_behind_their_units() -> None:
    codes = torch.zeros(70, 200, dtype=torch.int8)
    scale = torch.rand(70, 2).bfloat16()
    packed = pack_group_scaled(codes, scale, torch.zeros(70, 16, dtype=torch.int8), torch.rand(70, 1).bfloat16())
    assert packed.units.shape == (2, 3, CODE_BYTES + 128) and packed.int4_units == 2 and packed.columns == 320
    stored = packed.units[0, :2, CODE_BYTES:].contiguous().view(torch.bfloat16)
    assert torch.equal(stored.T.float() * 16, scale[:UNIT_ROWS].float())
    assert not packed.units[1, :, CODE_BYTES + 12 :].any(), "rows that do not exist have zero scales"


def test_integer_factors_beyond_four_bits_are_refused() -> None:
    codes, channel = torch.zeros(64, 128, dtype=torch.int8), torch.ones(64, 1)
    with pytest.raises(ValueError, match="at most 15"):
        pack_channel_scaled(codes, torch.full((64, 1), 16, dtype=torch.uint8), channel)
