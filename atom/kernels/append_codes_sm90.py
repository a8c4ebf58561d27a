"""Scales, zero points and codes of what the append kernel stores: one row is a head of a key or value of one token.

The arithmetic is that of atom/quant/rounding.py and mean_zero.py, instruction by instruction, so that codes are the
same bits. Each lane of a head has 16 of its channels: x [4, 2] uint32, pairs of bfloat16, or [8, 2] float32 where the
config is exact; the second index tells the half of the head.
"""

import cutlass
from cutlass import Float32, Int32, Uint32, cute

from .attention_config import AppendConfig
from .dsl.arithmetic import as_bits, pack_e4m3x2, reciprocal, round_to_int
from .dsl.memory import pack_bf16x2
from .dsl.packed_bf16 import high_float, larger_pairs, low_float, smaller_pairs
from .dsl.rounded_float import add_exactly, multiply_exactly
from .dsl.tensor_core import pick_bytes
from .head_transforms_sm90 import sum_in_order, sum_lanes

LARGEST_RANGE = 2.0**126  # as in mean_zero.py; here too, since a kernel is kept under what its own sources say
SMALLEST_SCALE = 2.0**-126
ROUNDER = 12582912.0  # 1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits
ROUNDER_BITS = 0x4B400000
MASK = 0xFFFFFFFF


class AppendCodes:
    """How a row is rounded; the kernel class adds the rest."""

    config: AppendConfig
    qmax: int  # of unsigned codes, 0 where there are none

    @cute.jit
    def choose(self, x, largest_scale):
        """Scale and zero point of a row, as rounding.py chooses them; both bfloat16 values. Its lanes all have them."""
        config = self.config
        low, high = self.extremes(x)
        zero = Float32(0.0)
        if cutlass.const_expr(self.qmax):
            low = cute.arch.fmin(cute.arch.fmax(low, Float32(-LARGEST_RANGE)), Float32(0.0))
            high = cute.arch.fmin(cute.arch.fmax(high, Float32(0.0)), Float32(LARGEST_RANGE))
            raw = (high - low) * Float32(config.clip / self.qmax)
        else:
            largest = cute.arch.fmax(high, -low)
            raw = cute.arch.fmin(largest * Float32(config.clip / 448.0), largest_scale)
        if raw <= Float32(0.0):
            raw = Float32(1.0)
        scale = low_float(pack_bf16x2(cute.arch.fmax(raw, Float32(SMALLEST_SCALE)), raw))
        if cutlass.const_expr(self.qmax):
            shifted = low * Float32(-config.clip) * reciprocal(scale)
            shifted = cute.arch.fmin(cute.arch.fmax(shifted, Float32(0.0)), Float32(self.qmax))
            zero = Float32(Int32(round_to_int(shifted)))
        return scale, zero

    @cute.jit
    def keep_mean(self, x, share):
        """Codes, scale and stored zero point of a row as mean_zero.py chooses them."""
        config = self.config
        low, high = self.extremes(x)
        low = cute.arch.fmin(cute.arch.fmax(low, Float32(-LARGEST_RANGE)), Float32(LARGEST_RANGE))
        high = cute.arch.fmin(cute.arch.fmax(high, Float32(-LARGEST_RANGE)), Float32(LARGEST_RANGE))
        span = high - low
        is_far = low > span or -high > span
        if is_far:
            low = cute.arch.fmin(low, Float32(0.0))
            high = cute.arch.fmax(high, Float32(0.0))
        raw = (high - low) * Float32(1.0 / self.qmax)
        if raw <= Float32(0.0):
            raw = Float32(1.0)
        scale = low_float(pack_bf16x2(cute.arch.fmax(raw, Float32(SMALLEST_SCALE)), raw))
        if is_far:
            low = scale * Float32(-self.qmax) if low < Float32(0.0) else Float32(0.0)
        inverse = reciprocal(scale)
        bits = config.cache.code_bits
        each = 32 // bits
        ones = sum(1 << (bits * i) for i in range(each))
        total = Uint32(-16 * ROUNDER_BITS & MASK)
        steps = cute.make_rmem_tensor((8, 2), Float32)
        coded = []
        for h in cutlass.range_constexpr(2):
            words = []
            for first in cutlass.range_constexpr(0, 8, each):
                word = Uint32(-ones * ROUNDER_BITS & MASK)
                for i in cutlass.range_constexpr(each):
                    value = multiply_exactly(add_exactly(self.value(x, first + i, h), -low), inverse)
                    value = cute.arch.fmin(cute.arch.fmax(value, Float32(0.0)), Float32(self.qmax))
                    steps[first + i, h] = value
                    code = as_bits(value + Float32(ROUNDER))
                    word = word + (code << (bits * i))
                    total = total + code
                words.append(word)
            coded.append(words)
        half = Float32(config.zero_bias)
        more = add_exactly(sum_lanes(config, Float32(Int32(total)), share), -sum_in_order(config, steps, share))
        more = multiply_exactly(more, Float32(1.0 / config.head_dim))
        more = Float32(0.0) if is_far else more
        zero = add_exactly(add_exactly(more, -half), -multiply_exactly(low, inverse))
        zero = low_float(pack_bf16x2(zero, zero))
        return coded, scale, add_exactly(add_exactly(zero, half), -half)  # as the reference holds it

    @cute.jit
    def extremes(self, x):
        """The least and the largest value of a head."""
        config = self.config
        if cutlass.const_expr(config.is_exact):
            low = x[0, 0]
            high = x[0, 0]
            for h in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(8):
                    low = cute.arch.fmin(low, x[i, h])
                    high = cute.arch.fmax(high, x[i, h])
            for step in cutlass.range_constexpr(config.lanes.bit_length() - 1):
                low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, offset=1 << step))
                high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=1 << step))
            return low, high
        most = x[0, 0]
        least = x[0, 0]
        for h in cutlass.range_constexpr(2):
            for w in cutlass.range_constexpr(4):
                most = larger_pairs(most, x[w, h])
                least = smaller_pairs(least, x[w, h])
        minus = least ^ Uint32(0x80008000)
        both = larger_pairs(pick_bytes(most, minus, Uint32(0x5410)), pick_bytes(most, minus, Uint32(0x7632)))
        for step in cutlass.range_constexpr(config.lanes.bit_length() - 1):
            both = larger_pairs(both, cute.arch.shuffle_sync_bfly(both, offset=1 << step))
        return -high_float(both), low_float(both)

    @cute.jit
    def value(self, x, i: cutlass.Constexpr, h: cutlass.Constexpr):
        """Channel i of an octet as float32."""
        if cutlass.const_expr(self.config.is_exact):
            return x[i, h]
        return high_float(x[i // 2, h]) if i % 2 else low_float(x[i // 2, h])

    @cute.jit
    def pairs(self, x, h: cutlass.Constexpr):
        if cutlass.const_expr(self.config.is_exact):
            return [pack_bf16x2(x[2 * w, h], x[2 * w + 1, h]) for w in range(4)]
        return [x[w, h] for w in range(4)]

    @cute.jit
    def encode(self, x, h, inverse, zero):
        """The codes of eight channels: one word of INT4, two of INT8 or FP8."""
        config = self.config
        words = []
        if cutlass.const_expr(config.kv == "fp8_e4m3"):
            for i in cutlass.range_constexpr(0, 8, 4):
                scaled = [self.value(x, i + j, h) * inverse for j in range(4)]
                words.append(pack_e4m3x2(scaled[0], scaled[1]) | (pack_e4m3x2(scaled[2], scaled[3]) << 16))
        else:
            bits = config.cache.code_bits
            most = Float32(self.qmax) - zero
            each = 32 // bits
            ones = sum(1 << (bits * i) for i in range(each))
            bias = (Uint32(Int32(zero)) - Uint32(ROUNDER_BITS)) * Uint32(ones)
            for first in cutlass.range_constexpr(0, 8, each):
                word = bias
                for i in cutlass.range_constexpr(each):
                    value = self.value(x, first + i, h) * inverse
                    value = cute.arch.fmin(cute.arch.fmax(value, -zero), most)
                    word = word + (as_bits(value + Float32(ROUNDER)) << (bits * i))
                words.append(word)
        return words
