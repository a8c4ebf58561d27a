"""Scales and codes of the producers, instruction by instruction those of atom/quant/rounding.py. See producers_sm90.py.

Maxima are multiplied by a float32 constant, scales rounded to their storage format, values multiplied by the scale's
correctly rounded reciprocal, ties go to even.
"""

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, cute

from .dsl.arithmetic import (
    as_bits,
    from_bits,
    pack_e4m3x2,
    reciprocal,
    round_to_e4m3,
    round_to_int,
    round_to_whole,
)
from .dsl.memory import pack_bf16x2
from .producer_config import ProducerConfig


class ProducerEncode:
    """From values to scales and codes; the kernel class adds the rest."""

    config: ProducerConfig

    @cute.jit
    def scale(self, largest, ratio: cutlass.Constexpr, bf16: cutlass.Constexpr):
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
    def group_max(self, x):
        """The largest value of the lanes that share a small group."""
        for offset in (1, 2, 4)[: 2 if self.config.group_size == 16 else 3]:
            x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
        return x

    @cute.jit
    def encode(self, value, scale, qmin: cutlass.Constexpr, qmax: cutlass.Constexpr, mQ, token, word):
        """Four values as whole numbers in the bytes of a word."""
        inverse = reciprocal(scale)
        packed = Uint32(0)
        for e in cutlass.range_constexpr(4):
            scaled = cute.arch.fmin(cute.arch.fmax(value[e] * inverse, Float32(qmin)), Float32(qmax))
            packed = packed | ((round_to_int(scaled) & Uint32(255)) << (8 * e))
        mQ[token, word] = Int32(packed)

    @cute.jit
    def encode_e4m3(self, value, scale, mQ, token, word):
        """Four values as E4M3, saturating."""
        inverse = reciprocal(scale)
        low = pack_e4m3x2(value[0] * inverse, value[1] * inverse)
        high = pack_e4m3x2(value[2] * inverse, value[3] * inverse)
        mQ[token, word] = Int32(low | (high << 16))

    @cute.jit
    def round_small(self, value, scale, effective):
        """Four values on the grid of E2M1 or INT4, times the scale of their small group: exact in bfloat16."""
        inverse = reciprocal(effective)
        for e in cutlass.range_constexpr(4):
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
    def store_bf16(self, value, mQ, token, column):
        """Four values as bfloat16, two words."""
        words = cute.make_rmem_tensor((2,), Int32)
        words[0] = Int32(pack_bf16x2(value[0], value[1]))
        words[1] = Int32(pack_bf16x2(value[2], value[3]))
        at = mQ.iterator + (cutlass.Int64(token) * mQ.shape[1] + column // 2)
        cute.autovec_copy(words, cute.make_tensor(at.align(8), cute.make_layout(2)))
