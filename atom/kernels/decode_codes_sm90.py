"""Stored codes to mma's 16-bit registers, for the decode kernel: what a lane reads of a row, and the bit work.

Keys: one row (token) at a time, pairs of channels. Values: two rows at a time, pairs of tokens of one channel.

Integer codes of up to ten bits are float16 as they stand: subnormal numbers, code * 2^-24, which tensor cores multiply
exactly. A nibble in bits 4 to 7 is code * 2^-20. So masking is all that a pair of INT4 codes costs beside a shift or
a byte permutation for two pairs, and no constant has to come off again. UNIT says what a register's number is worth.
"""

import cutlass
from cutlass import Uint32, cute

from .attention_config import DecodeConfig
from .dsl.memory import load_u32x2, load_u32x4
from .dsl.tensor_core import e4m3_to_f16x2, load_word, pick_bytes

UNIT = {"int4": 2.0**-24, "int8": 2.0**-24, "fp8_e4m3": 1.0, "bf16": 1.0}
SECOND = {"int4": 16.0, "int8": 1.0, "fp8_e4m3": 1.0, "bf16": 1.0}  # odd channels' registers are so many times more
LOW_NIBBLES = 0x000F000F  # of a byte in each half
HIGH_NIBBLES = 0x00F000F0


@cute.jit
def load_row(config: cutlass.Constexpr, address, sharers: cutlass.Constexpr, words: cutlass.Constexpr, sharer):
    """The words of a row in shared memory that lane `sharer` of `sharers` reads; attention_config.word_index."""
    found = []
    if cutlass.const_expr(config.row_words % sharers == 0):
        width = vector_words(config, words)
        start = address + 4 * words * sharer
        for i in cutlass.range_constexpr(words // width):
            if cutlass.const_expr(width == 4):
                found += list(load_u32x4(start + 16 * i))
            elif cutlass.const_expr(width == 2):
                found += list(load_u32x2(start + 8 * i))
            else:
                found.append(load_word(start + 4 * i))
    else:
        for i in cutlass.range_constexpr(words):
            found.append(load_word(address + 4 * cutlass.min(sharers * i + sharer, config.row_words - 1)))
    return found


def vector_words(config: DecodeConfig, words: int) -> int:
    """Words that one load may take: rows and a lane's part of them must be aligned to it."""
    return next(w for w in (4, 2, 1) if words % w == 0 and config.row_words % w == 0)


@cute.jit
def expand(config: cutlass.Constexpr, words):
    """Words of one row -> registers of two neighbouring k of mma's A; int4: channels (0, 4), (1, 5), (2, 6), (3, 7)."""
    found = []
    for i in cutlass.range_constexpr(len(words)):
        word = words[i]
        if cutlass.const_expr(config.kv == "int4"):
            for part in (word, word >> 8):
                found += [part & Uint32(LOW_NIBBLES), part & Uint32(HIGH_NIBBLES)]
        elif cutlass.const_expr(config.kv == "int8"):
            for selector in (0x4140, 0x4342):  # byte, zero, byte, zero
                found.append(pick_bytes(word, Uint32(0), Uint32(selector)))
        elif cutlass.const_expr(config.kv == "fp8_e4m3"):
            found += list(e4m3_to_f16x2(word))
        else:
            found.append(word)
    return found


@cute.jit
def expand_pair(config: cutlass.Constexpr, near, far):
    """One word of each of two rows -> a register (near, far) for each channel of the words, in order."""
    found = []
    if cutlass.const_expr(config.kv == "int4"):
        for byte in (0, 1, 2, 3):
            both = pick_bytes(near, far, Uint32(0x4400 | 0x1111 * byte))
            found += [both & Uint32(LOW_NIBBLES), both & Uint32(HIGH_NIBBLES)]
    elif cutlass.const_expr(config.kv in ("int8", "fp8_e4m3")):
        for selector in (0x5140, 0x7362):  # near, far, near, far
            both = pick_bytes(near, far, Uint32(selector))
            if cutlass.const_expr(config.kv == "int8"):
                found += [pick_bytes(both, Uint32(0), Uint32(s)) for s in (0x4140, 0x4342)]
            else:
                found += list(e4m3_to_f16x2(both))
    else:
        found.append(pick_bytes(near, far, Uint32(0x5410)))
        found.append(pick_bytes(near, far, Uint32(0x7632)))
    return found
