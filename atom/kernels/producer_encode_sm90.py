"""Scales and codes of the producers, instruction by instruction those of atom/quant/rounding.py. See producers_sm90.py.

Maxima are multiplied by a float32 constant, scales rounded to their storage format, values multiplied by the scale's
correctly rounded reciprocal, ties go to even.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, cute

from .dsl.arithmetic import (
    as_bits,
    from_bits,
    multiply_add,
    pack_e4m3x2,
    reciprocal,
    round_to_e4m3,
    round_to_whole,
)
from .dsl.memory import pack_bf16x2
from .dsl.tensor_core import pick_bytes
from .producer_config import CHUNK, ProducerConfig

TO_WHOLE = 12582912.0  # 1.5 * 2^23: a float32 added to it is rounded to a whole number, ties to even, in its low bits


class ProducerEncode:
    """From the values of a chunk to scales and words; the kernel class adds the rest."""

    config: ProducerConfig

    @cute.jit
    def scale(self, largest, ratio, bf16: cutlass.Constexpr):
        """Maximum x ratio, 1 for a zero maximum, on the storage format's grid."""
        raw = cute.arch.fmin(largest * Float32(ratio), Float32(self.config.largest_scale))
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
        raw = cute.arch.fmin(largest * Float32(config.ratio), Float32(config.largest_scale))
        over = raw * Float32(config.outer_ratio)
        found = cute.arch.fmax(over, Float32(2.0**-117))
        if over <= Float32(0.0):
            found = Float32(1.0)
        return found

    @cute.jit
    def small_scale(self, largest, inverse_outer):
        """The scale of one small group: E4M3 under the outer one, or a power of two."""
        config = self.config
        found = Float32(0.0)
        if cutlass.const_expr(config.scale_format == "e4m3"):
            raw = cute.arch.fmin(largest * Float32(config.ratio), Float32(config.largest_scale))
            inner = cute.arch.fmax(raw * inverse_outer, Float32(2.0**-9))
            found = round_to_e4m3(cute.arch.fmin(inner, Float32(448.0)))
        else:
            above, cap = config.exponents
            exponent = Int32(as_bits(largest * Float32(config.ratio)) >> 23) - 127  # of a zero or subnormal: -127
            exponent = cutlass.min(exponent - above, Int32(cap))
            bits = Uint32(cutlass.max(exponent + 127, Int32(0))) << 23
            if exponent < -126:
                bits = Uint32(0x00400000)  # 2^-127
            if largest <= Float32(0.0):
                bits = Uint32(0x3F800000)
            found = from_bits(bits)
        return found

    @cute.jit
    def factor_scale(self, largest, inverse_outer):
        """The whole number from 1 to 15 that scales a group of 128 under the outer scale."""
        config = self.config
        raw = cute.arch.fmin(largest * Float32(config.ratio), Float32(config.largest_scale))
        return cute.arch.fmin(cute.arch.fmax(round_to_whole(raw * inverse_outer), Float32(1.0)), Float32(15.0))

    @cute.jit
    def encode_factored(self, value, factor, inverse, qmin, qmax, words):
        """A chunk's values as whole numbers times their group's factor in bytes, four to a word."""
        less = Float32(TO_WHOLE) - Float32(TO_WHOLE) * factor  # exact, and so is (TO_WHOLE + n) * factor + less
        bits = []
        for e in cutlass.range_constexpr(CHUNK):
            scaled = cute.arch.fmin(cute.arch.fmax(value[e] * inverse, Float32(qmin)), Float32(qmax))
            bits.append(as_bits(multiply_add(scaled + Float32(TO_WHOLE), factor, less)))
        self.pack(bits, words)

    @cute.jit
    def encode(self, value, inverse, qmin, qmax, words):
        """A chunk's values as whole numbers in bytes, four to a word; `inverse` of their scale."""
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
    def round_small(self, value, scale, effective):
        """A chunk's values on the grid of E2M1 or INT4, times the scale of their small group: exact in bfloat16."""
        inverse = reciprocal(effective)
        for e in cutlass.range_constexpr(CHUNK):
            scaled = value[e] * inverse
            if cutlass.const_expr(self.config.format == "e2m1"):
                scaled = cute.arch.fmin(cute.arch.fmax(scaled, Float32(-6.0)), Float32(6.0))
                magnitude = cute.arch.fmax(scaled, -scaled)
                finer = Float32(2.0)
                step = Float32(0.5)
                if magnitude >= Float32(2.0):
                    finer = Float32(1.0)
                    step = Float32(1.0)
                if magnitude >= Float32(4.0):
                    finer = Float32(0.5)
                    step = Float32(2.0)
                value[e] = round_to_whole(scaled * finer) * step * scale
            else:
                qmin, qmax = self.config.code_range
                whole = round_to_whole(scaled)
                value[e] = cute.arch.fmin(cute.arch.fmax(whole, Float32(qmin)), Float32(qmax)) * scale

    @cute.jit
    def encode_bf16(self, value, words):
        """A chunk's values as bfloat16, two to a word."""
        for w in cutlass.range_constexpr(CHUNK // 2):
            words[w] = Int32(pack_bf16x2(value[2 * w], value[2 * w + 1]))
