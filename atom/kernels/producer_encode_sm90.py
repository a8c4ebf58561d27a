"""Scales and codes of the producers, instruction by instruction those of atom/quant/rounding.py. See producers_sm90.py.

Maxima are multiplied by a float32 constant, scales rounded to their storage format, values multiplied by the scale's
correctly rounded reciprocal, ties go to even.
"""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, cute

from .dsl.arithmetic import (
    add_max,
    as_bits,
    clamp_s16x2,
    from_bits,
    pack_e4m3x2,
    reciprocal_of_normal,
    round_to_e4m3,
)
from .dsl.memory import pack_bf16x2
from .dsl.rounded_float import multiply_add, multiply_add_saturated, multiply_exactly
from .dsl.tensor_core import pick_bytes
from .producer_config import CHUNK, ProducerConfig

TO_WHOLE = 12582912.0  # 1.5 * 2^23: a float32 added to it is rounded to a whole number, ties to even, in its low bits

LARGEST_FLOAT = 3.4028234663852886e38


class ProducerEncode:
    """From the values of a chunk to scales and words; the kernel class adds the rest."""

    config: ProducerConfig

    @cute.jit
    def raw(self, largest, ratio):
        """A scale before it is rounded."""
        found = largest * Float32(ratio)
        if cutlass.const_expr(self.config.scale_format != "e8m0"):
            found = cute.arch.fmin(found, Float32(self.config.largest_scale))
        return found

    @cute.jit
    def scale(self, raw, bf16: cutlass.Constexpr):
        """A scale on its storage format's grid; 1 for zero."""
        if raw <= Float32(0.0):
            raw = Float32(1.0)
        raw = cute.arch.fmax(raw, Float32(2.0**-126))
        if cutlass.const_expr(bf16):
            raw = Float32(BFloat16(raw))
        return raw

    @cute.jit
    def outer_scale(self, largest):
        """The float32 scale of a token over its groups' E4M3 scales, from the token's maximum."""
        config = self.config
        over = self.raw(largest, config.ratio) * Float32(config.outer_ratio)
        found = cute.arch.fmax(over, Float32(2.0**-117))
        if over <= Float32(0.0):
            found = Float32(1.0)
        return found

    @cute.jit
    def small_scale(self, raw, inverse_outer):
        """The scale of one small group: E4M3 under the outer one, or a power of two."""
        config = self.config
        found = Float32(0.0)
        if cutlass.const_expr(config.scale_format == "e4m3"):
            inner = cute.arch.fmax(raw * inverse_outer, Float32(2.0**-9))
            found = round_to_e4m3(cute.arch.fmin(inner, Float32(448.0)))
        else:
            above, cap = config.exponents
            exponent = Int32(as_bits(raw) >> 23) - 127  # of a zero or subnormal: -127
            exponent = cutlass.min(exponent - above, Int32(cap))
            bits = Uint32(cutlass.max(exponent + 127, Int32(0))) << 23
            if exponent < -126:
                bits = Uint32(0x00400000)  # 2^-127
            if raw <= Float32(0.0):
                bits = Uint32(0x3F800000)
            found = from_bits(bits)
        return found

    @cute.jit
    def factor_scale(self, raw, inverse_outer):
        """The whole number from 1 to 15 that scales a group under the outer scale."""
        whole = multiply_exactly(raw, inverse_outer) + Float32(TO_WHOLE) - Float32(TO_WHOLE)
        return cute.arch.fmin(cute.arch.fmax(whole, Float32(1.0)), Float32(15.0))

    @cute.jit
    def inverse(self, scale):
        """The reciprocal of a scale."""
        if cutlass.const_expr(self.config.rounding == "small" and self.config.scale_format == "e8m0"):
            found = from_bits(Uint32(254 << 23) - (as_bits(scale) & Uint32(0x7F800000)))  # of a power of two
        else:
            found = reciprocal_of_normal(scale)
        return found

    @cute.jit
    def with_factor(self, inverse, factor):
        """The reciprocal of a scale times the factor that the values lack; times zero it must be zero."""
        if cutlass.const_expr(self.config.lacks_factor):
            inverse = cute.arch.fmin(inverse * factor, Float32(LARGEST_FLOAT))
        return inverse

    @cute.jit
    def code_range(self):
        """The smallest and the largest code."""
        qmin, qmax = self.config.code_range
        return Float32(qmin), Float32(qmax)

    @cute.jit
    def to_whole(self, value, inverse, qmin, qmax):
        """Codes of eight values, plus TO_WHOLE, where a last bit is open: clamped on the way to [0, 1]."""
        found = []
        if cutlass.const_expr(self.config.stays_in_range):
            found = [multiply_add(value[e], inverse, Float32(TO_WHOLE)) for e in range(CHUNK)]
        else:
            lowest, highest = self.config.code_range
            step = Float32(1 / (highest - lowest))
            if Float32(qmax) > Float32(highest):  # INT8 outliers
                step = Float32(1 / 255)
            levels = Float32(qmax) - Float32(qmin)
            for e in cutlass.range_constexpr(CHUNK):
                share = multiply_add_saturated(value[e], inverse * step, -Float32(qmin) * step)
                found.append(multiply_add(share, levels, Float32(TO_WHOLE) + Float32(qmin)))
        return found

    @cute.jit
    def encode_factored(self, value, factor, inverse, qmin, qmax, words):
        """A chunk's values as whole numbers times their group's factor in bytes, four to a word.

        Codes less the smallest lie in the low halves of words; two are clamped and multiplied at a time.
        """
        shift = Float32(TO_WHOLE) - Float32(qmin)
        most = as_bits(Float32(TO_WHOLE) + (Float32(qmax) - Float32(qmin)))
        most = pick_bytes(most, most, Uint32(0x1010))
        times = as_bits(Float32(TO_WHOLE) + factor) & Uint32(0xFFFF)
        least = as_bits(Float32(TO_WHOLE) - Float32(qmin)) & Uint32(0xFFFF)
        less = Uint32(0x01000100) - times * least * Uint32(0x00010001)  # 256 each, so that neither half borrows
        pairs = []
        for e in cutlass.range_constexpr(0, CHUNK, 2):
            two = []
            for i in cutlass.range_constexpr(e, e + 2):
                if cutlass.const_expr(self.config.is_exact):
                    two.append(as_bits(multiply_exactly(value[i], inverse) + shift))
                else:
                    two.append(as_bits(multiply_add(value[i], inverse, shift)))
            pair = clamp_s16x2(pick_bytes(two[0], two[1], Uint32(0x5410)), most)
            pairs.append(pair * times + less)
        for w in cutlass.range_constexpr(2):
            words[w] = Int32(pick_bytes(pairs[2 * w], pairs[2 * w + 1], Uint32(0x6420)))

    @cute.jit
    def encode(self, value, inverse, qmin, qmax, words):
        """A chunk's values as whole numbers in bytes, four to a word; `inverse` of their scale."""
        if cutlass.const_expr(not self.config.is_exact):
            self.pack([as_bits(whole) for whole in self.to_whole(value, inverse, qmin, qmax)], words)
        else:
            bits = []
            for e in cutlass.range_constexpr(CHUNK):
                scaled = cute.arch.fmin(value[e] * inverse, Float32(qmax))
                if cutlass.const_expr(self.config.reaches_below):
                    scaled = cute.arch.fmax(scaled, Float32(qmin))
                bits.append(as_bits(scaled + Float32(TO_WHOLE)))
            self.pack(bits, words)

    @cute.jit
    def pack(self, bits, words):
        """The low bytes of eight words in two."""
        for w in cutlass.range_constexpr(2):
            low = pick_bytes(bits[4 * w], bits[4 * w + 1], Uint32(0x0040))
            high = pick_bytes(bits[4 * w + 2], bits[4 * w + 3], Uint32(0x0040))
            words[w] = Int32(pick_bytes(low, high, Uint32(0x5410)))

    @cute.jit
    def encode_e4m3(self, value, inverse, words):
        """A chunk's values as E4M3, saturating, four to a word."""
        for w in cutlass.range_constexpr(2):
            low = pack_e4m3x2(value[4 * w] * inverse, value[4 * w + 1] * inverse)
            high = pack_e4m3x2(value[4 * w + 2] * inverse, value[4 * w + 3] * inverse)
            words[w] = Int32(low | (high << 16))

    @cute.jit
    def round_small(self, value, scale, inverse):
        """A chunk's values on the grid of E2M1 or INT4, times the scale of their small group: exact in bfloat16.

        E2M1 rounds all from 5 up to 7 to 6: values go beyond under powers of two and under subnormal E4M3 scales.
        """
        if cutlass.const_expr(self.config.format == "e2m1"):
            if cutlass.const_expr(self.config.scale_format == "e8m0") or scale < Float32(2.0**-6):
                most = Float32(6.0) * reciprocal_of_normal(inverse)
                for e in cutlass.range_constexpr(CHUNK):
                    value[e] = cute.arch.fmin(cute.arch.fmax(value[e], -most), most)
            for e in cutlass.range_constexpr(CHUNK):
                scaled = multiply_exactly(value[e], inverse)
                value[e] = (scaled + to_step(scaled) - to_step(scaled)) * scale
        elif cutlass.const_expr(not self.config.is_exact):
            whole = self.to_whole(value, inverse, *self.code_range())
            for e in cutlass.range_constexpr(CHUNK):
                value[e] = multiply_add(whole[e], scale, -Float32(TO_WHOLE) * scale)  # exact: few bits each
        else:
            qmin, qmax = self.code_range()
            for e in cutlass.range_constexpr(CHUNK):
                whole = multiply_exactly(value[e], inverse) + Float32(TO_WHOLE) - Float32(TO_WHOLE)
                value[e] = cute.arch.fmin(cute.arch.fmax(whole, qmin), qmax) * scale

    @cute.jit
    def encode_bf16(self, value, words):
        """A chunk's values as bfloat16, two to a word."""
        for w in cutlass.range_constexpr(CHUNK // 2):
            words[w] = Int32(pack_bf16x2(value[2 * w], value[2 * w + 1]))


@cute.jit
def to_step(scaled: Any):
    """What rounds a value below 7 to the steps of E2M1 when it is added and taken away: 1.5 x 2^23 steps.

    Steps are 0.5, from 2 on 1, from 4 on 2: half the power of two of the value, or of 1 where that is larger.
    """
    exponent = as_bits(scaled) & Uint32(0x7F800000)
    return from_bits(add_max(exponent, Uint32((22 << 23) + (1 << 22)), Uint32(0x3F800000 + (22 << 23) + (1 << 22))))
