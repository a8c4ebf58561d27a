"""Stored codes to mma's bfloat16 registers, for the decode kernel: what a lane reads of a row, and the bit work.

Keys: one row (token) at a time, pairs of channels. Values: two rows at a time, pairs of tokens of one channel. A code
comes out as its number plus BIAS.
"""

import cutlass
from cutlass import Float32, Uint32, cute

from .attention_config import DecodeConfig
from .dsl.arithmetic import from_bits, multiply_bf16x2
from .dsl.memory import load_u32x2, load_u32x4, pack_bf16x2
from .dsl.tensor_core import load_word, pick_bytes

BIAS = {"int4": 128.0, "int8": 0.0, "fp8_e4m3": 0.0, "bf16": 0.0}
NIBBLES = 0x000F000F
BF16_128 = 0x43004300  # 128 in bfloat16, twice: its low mantissa bits count in ones
FLOAT_2_23 = 0x4B000000  # 2^23 in float32: a byte in its low bits counts in ones
BF16_2_120 = 0x7B807B80  # 2^120 in bfloat16, twice: from E4M3's exponent bias to bfloat16's


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
            for shift in (0, 4, 8, 12):
                found.append(((word >> shift) & Uint32(NIBBLES)) | Uint32(BF16_128))
        elif cutlass.const_expr(config.kv == "int8"):
            for p in (0, 2):
                found.append(pack_bf16x2(byte_value(word, p), byte_value(word, p + 1)))
        elif cutlass.const_expr(config.kv == "fp8_e4m3"):
            for p in (0, 2):
                found.append(from_e4m3(pick_bytes(word, word, Uint32((p + 1) << 12 | p << 4))))
        else:
            found.append(word)
    return found


@cute.jit
def expand_pair(config: cutlass.Constexpr, near, far):
    """One word of each of two rows -> a register (near, far) for each channel of the words, in order."""
    found = []
    if cutlass.const_expr(config.kv == "int4"):
        for half in (pick_bytes(near, far, Uint32(0x5410)), pick_bytes(near, far, Uint32(0x7632))):
            for shift in (0, 4, 8, 12):
                found.append(((half >> shift) & Uint32(NIBBLES)) | Uint32(BF16_128))
    elif cutlass.const_expr(config.kv == "int8"):
        for p in (0, 1, 2, 3):
            found.append(pack_bf16x2(byte_value(near, p), byte_value(far, p)))
    elif cutlass.const_expr(config.kv == "fp8_e4m3"):
        for p in (0, 1, 2, 3):
            found.append(from_e4m3(pick_bytes(near, far, Uint32((4 + p) << 12 | p << 4))))
    else:
        found.append(pick_bytes(near, far, Uint32(0x5410)))
        found.append(pick_bytes(near, far, Uint32(0x7632)))
    return found


@cute.jit
def byte_value(word, index: cutlass.Constexpr):
    """Byte `index` of a word as a float32: put under the exponent of 2^23, which is then taken off."""
    return from_bits(pick_bytes(word, Uint32(FLOAT_2_23), Uint32(0x7540 | index))) - Float32(8388608.0)


@cute.jit
def from_e4m3(halves):
    """E4M3 in the upper byte of each half (the lower is ignored) -> bfloat16, exactly; subnormals included."""
    moved = ((halves >> 4) & Uint32(0x07F007F0)) | (halves & Uint32(0x80008000))
    return multiply_bf16x2(moved, Uint32(BF16_2_120))
