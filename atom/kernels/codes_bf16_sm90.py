"""Stored codes to bfloat16 registers, two numbers each, for kernels that write keys and values out dense.

A code comes out as its number plus BIAS. (The decode kernel multiplies codes in float16: decode_codes_sm90.py.)
"""

import cutlass
from cutlass import Float32, Uint32, cute

from .dsl.arithmetic import from_bits, multiply_bf16x2
from .dsl.memory import pack_bf16x2
from .dsl.tensor_core import pick_bytes

BIAS = {"int4": 128.0, "int8": 0.0, "fp8_e4m3": 0.0, "bf16": 0.0}
NIBBLES = 0x000F000F
BF16_128 = 0x43004300  # 128 in bfloat16, twice: its low mantissa bits count in ones
FLOAT_2_23 = 0x4B000000  # 2^23 in float32: a byte in its low bits counts in ones
BF16_2_120 = 0x7B807B80  # 2^120 in bfloat16, twice: from E4M3's exponent bias to bfloat16's


@cute.jit
def expand(config: cutlass.Constexpr, words):
    """Words of one row -> pairs of channels, in order; int4: (0, 4), (1, 5), (2, 6), (3, 7)."""
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
def byte_value(word, index: cutlass.Constexpr):
    """Byte `index` of a word as a float32: put under the exponent of 2^23, which is then taken off."""
    return from_bits(pick_bytes(word, Uint32(FLOAT_2_23), Uint32(0x7540 | index))) - Float32(8388608.0)


@cute.jit
def from_e4m3(halves):
    """E4M3 in the upper byte of each half (the lower is ignored) -> bfloat16, exactly; subnormals included."""
    moved = ((halves >> 4) & Uint32(0x07F007F0)) | (halves & Uint32(0x80008000))
    return multiply_bf16x2(moved, Uint32(BF16_2_120))
