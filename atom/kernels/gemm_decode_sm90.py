"""From packed codes to the registers that wgmma reads as A: one small class for each kind of 4-bit weight.

A thread holds eight words of a unit (gemm_pack.py says which codes) and the scales of its two rows, `row` and
`row + 8`. `decode` turns them into the fragment's words: 16 of four bytes, or 32 of two bfloat16. All of it is exact.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Uint8, Uint16, Uint32, cute

from .dsl.arithmetic import multiply_add_bf16x2, multiply_bf16x2, select_bytes
from .dsl.memory import load_u32x2, load_u32x4
from .gemm_kinds import KINDS


class RowScaled:
    """A bfloat16 scale per row and unit, which the promotion of a unit's sum multiplies with."""

    scale_type = Float32
    scale_words = 2

    def __init__(self, scale_word: int) -> None:
        self.scale_word = scale_word  # where a unit's scales begin

    @cute.jit
    def load_scales(self, unit, scale, thread):
        scales = cute.make_tensor(cute.recast_ptr(unit + self.scale_word, dtype=BFloat16), cute.make_layout(64))
        row = (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            scale[r] = Float32(scales[row + 8 * r])


class Int4(RowScaled):
    """INT4 to INT8: the code stays in its byte's high half, 16 x code; the packed scale holds the 1/16."""

    @cute.jit
    def decode(self, raw, scale, words):
        for j in cutlass.range_constexpr(8):
            words[2 * j] = (raw[j] << 4) & Uint32(0xF0F0F0F0)
            words[2 * j + 1] = raw[j] & Uint32(0xF0F0F0F0)


class Int4Uint4:
    """INT4 x an integer factor per row and unit to INT8.

    code + 8 times an unsigned factor fits a byte; 128 - 8 * factor re-centres it: two instructions for four weights
    (the trick of LiquidGEMM, arXiv:2509.01229).
    """

    scale_type = Float32  # the factors' bits
    scale_words = 2

    def __init__(self, scale_word: int) -> None:
        self.scale_word = scale_word

    @cute.jit
    def load_scales(self, unit, scale, thread):
        factors = cute.make_tensor(cute.recast_ptr(unit + self.scale_word, dtype=Uint8), cute.make_layout(64))
        row = (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            scale[r] = cute.arch.inline_ptx(
                "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[Uint32(factors[row + 8 * r])]
            )

    @cute.jit
    def decode(self, raw, scale, words):
        factor = cute.recast_tensor(scale, Uint32)
        centre0 = Uint32(0x80808080) - factor[0] * Uint32(0x08080808)
        centre1 = Uint32(0x80808080) - factor[1] * Uint32(0x08080808)
        for j in cutlass.range_constexpr(8):
            low = raw[j] & Uint32(0x0F0F0F0F)
            high = (raw[j] >> 4) & Uint32(0x0F0F0F0F)
            words[2 * j] = (low * factor[0] + centre0) ^ Uint32(0x80808080)
            words[2 * j + 1] = (high * factor[1] + centre1) ^ Uint32(0x80808080)


class Int4Uint4By32:
    """As Int4Uint4, with a factor of 4 bits for each row and 32 columns: what one wgmma multiplies.

    A word holds those of two rows: byte `k` is for columns 32 k to 32 k + 31, its low nibble for `row`.
    """

    scale_type = Uint32
    scale_words = 1

    def __init__(self, scale_word: int) -> None:
        self.scale_word = scale_word

    @cute.jit
    def load_scales(self, unit, scale, thread):
        words = cute.make_tensor(unit + self.scale_word, cute.make_layout(32))
        scale[0] = words[(thread // 32) * 8 + (thread % 32) // 4]

    @cute.jit
    def decode(self, raw, scale, words):
        factors = (scale[0] & Uint32(0x0F0F0F0F), (scale[0] >> 4) & Uint32(0x0F0F0F0F))
        for k in cutlass.range_constexpr(4):
            factor0 = select_bytes(factors[0], Uint32(0x4440 + k))
            factor1 = select_bytes(factors[1], Uint32(0x4440 + k))
            centre0 = Uint32(0x80808080) - factor0 * Uint32(0x08080808)
            centre1 = Uint32(0x80808080) - factor1 * Uint32(0x08080808)
            for j in cutlass.range_constexpr(2 * k, 2 * k + 2):
                low = raw[j] & Uint32(0x0F0F0F0F)
                high = (raw[j] >> 4) & Uint32(0x0F0F0F0F)
                words[2 * j] = (low * factor0 + centre0) ^ Uint32(0x80808080)
                words[2 * j + 1] = (high * factor1 + centre1) ^ Uint32(0x80808080)


class Int4Bf16(RowScaled):
    """INT4 to bfloat16: a nibble `code + 8` behind the exponent of 128 reads 136 + code; 136 is taken away."""

    @cute.jit
    def decode(self, raw, scale, words):
        for k in cutlass.range_constexpr(8):
            for r in cutlass.range_constexpr(4):
                words[4 * k + r] = multiply_add_bf16x2(biased_int4(raw[k], r), Uint32(0x3F803F80), Uint32(0xC308C308))


class Int4Uint4Bf16:
    """INT4 x an integer factor per row and unit to bfloat16: (136 + code) x factor - 136 x factor, both exact.

    136 x 15 = 255 x 8 has eight bits, code x factor seven.
    """

    scale_type = Uint32  # a row's factor as two bfloat16
    scale_words = 2

    def __init__(self, scale_word: int) -> None:
        self.scale_word = scale_word  # where a unit's factors begin, bfloat16

    @cute.jit
    def load_scales(self, unit, scale, thread):
        factors = cute.make_tensor(cute.recast_ptr(unit + self.scale_word, dtype=Uint16), cute.make_layout(64))
        row = (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            scale[r] = Uint32(factors[row + 8 * r]) * Uint32(0x00010001)

    @cute.jit
    def decode(self, raw, scale, words):
        factors = (scale[0], scale[1])
        offsets = (
            multiply_bf16x2(factors[0], Uint32(0xC308C308)),
            multiply_bf16x2(factors[1], Uint32(0xC308C308)),
        )
        for k in cutlass.range_constexpr(8):
            for r in cutlass.range_constexpr(4):
                words[4 * k + r] = multiply_add_bf16x2(biased_int4(raw[k], r), factors[r % 2], offsets[r % 2])


class GroupScaled:
    """An 8-bit scale per row and `group` columns (16 or 32), multiplied with the codes in bfloat16."""

    scale_type = Uint32

    def __init__(self, scale_word: int, group: int) -> None:
        self.scale_word = scale_word
        self.group = group
        self.row_words = 2 if group == 16 else 1  # of scales, one byte each
        self.scale_words = 2 * self.row_words

    @cute.jit
    def load_scales(self, unit, scale, thread):
        """Both rows' scales stand side by side, and the four threads of a row read the same."""
        at = unit + (self.scale_word + ((thread // 32) * 8 + (thread % 32) // 4) * self.scale_words)
        if cutlass.const_expr(self.scale_words == 4):  # noqa: SIM108  an `if` of the compiler
            loaded = load_u32x4(at)
        else:
            loaded = load_u32x2(at)
        for i in cutlass.range_constexpr(self.scale_words):
            scale[i] = loaded[i]

    @cute.jit
    def row_scale(self, scale, row: cutlass.Constexpr, step: cutlass.Constexpr):
        """The scale byte of 16 columns, twice, in the low bytes of two halves."""
        group = step * 16 // self.group
        word = scale[row * self.row_words + group // 4]
        byte = group % 4
        return select_bytes(word, Uint32(0x4040 + 0x0101 * byte))


class Int4Group16(GroupScaled):
    """INT4 x E4M3: (136 + code) x scale - 136 x scale, both exact in bfloat16."""

    @cute.jit
    def decode(self, raw, scale, words):
        for k in cutlass.range_constexpr(8):
            pairs = []
            for r in cutlass.range_constexpr(2):
                factor = self.row_scale(scale, r, k) * Uint32(16) + Uint32(0x3A803A80)  # exponent e - 10 + 127
                pairs.append((factor, multiply_bf16x2(factor, Uint32(0xC308C308))))
            for r in cutlass.range_constexpr(4):
                factor, offset = pairs[r % 2]
                words[4 * k + r] = multiply_add_bf16x2(biased_int4(raw[k], r), factor, offset)


class E2m1Group(GroupScaled):
    """E2M1 x E4M3 or E8M0: the code's three bits read as a bfloat16 are 2^-126 x its value, the scale makes up for it.

    What comes out is value x scale / 2^8; the row's scale holds the 2^8.
    """

    @cute.jit
    def decode(self, raw, scale, words):
        for k in cutlass.range_constexpr(8):
            factors = []
            for r in cutlass.range_constexpr(2):
                byte = self.row_scale(scale, r, k)
                if cutlass.const_expr(self.group == 16):
                    factors.append(byte * Uint32(16) + Uint32(0x75807580))  # exponent e - 10 + 118 + 127
                else:
                    factors.append(byte * Uint32(128))
            for r in cutlass.range_constexpr(4):
                words[4 * k + r] = multiply_bf16x2(spread_e2m1(raw[k], r), factors[r % 2])


@cute.jit
def biased_int4(word: Any, register: cutlass.Constexpr):
    """Two nibbles `code + 8` of a word as bfloat16 136 + code."""
    return ((word >> (4 * register)) & Uint32(0x000F000F)) | Uint32(0x43004300)


@cute.jit
def spread_e2m1(word: Any, register: cutlass.Constexpr):
    """Two E2M1 codes of a word where a bfloat16 has its sign, lowest exponent bits and highest mantissa bit."""
    if cutlass.const_expr(register < 3):
        return (word << (3 * register)) & Uint32(0x81C081C0)
    # the fourth pair has the bits that are left: 14, 13, 11, 10
    low = (word >> 4) & Uint32(0x00C000C0)
    return ((word << 1) & Uint32(0x80008000)) | ((word >> 5) & Uint32(0x01000100)) | low


def decoder(kind: str) -> Any:
    """The decoder of a WeightKind."""
    scale_word = KINDS[kind].code_bytes // 4
    simple = {
        "int4": Int4,
        "int4_uint4": Int4Uint4,
        "int4_uint4_g32": Int4Uint4By32,
        "int4_bf16": Int4Bf16,
        "int4_uint4_bf16": Int4Uint4Bf16,
    }
    if kind in simple:
        return simple[kind](scale_word)
    return {"int4_g16": Int4Group16, "e2m1_g16": E2m1Group, "e2m1_g32": E2m1Group}[kind](scale_word, int(kind[-2:]))
