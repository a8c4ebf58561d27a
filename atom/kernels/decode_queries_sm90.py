"""Queries of the decode kernels (sm_90a) as the products take them; see paged_decode_sm90.py."""

import cutlass
from cutlass import Boolean, Float32, Int32, Uint32, cute

from .attention_config import DecodeConfig
from .decode_codes_sm90 import SECOND, UNIT
from .dsl.arithmetic import as_bits, from_bits
from .dsl.tensor_core import load_word, pack_f16x2


class DecodeQueries:
    """What a kernel class mixes in."""

    config: DecodeConfig
    has_zero: bool
    is_half: bool

    @cute.jit
    def load_queries(self, base, rQ, rSum, lane):
        """This lane's columns of q in the order in which keys are expanded, zero beyond the heads and the channels.

        Returns what one unit of their products with expanded codes is worth.
        """
        config = self.config
        per_word = config.codes_per_word
        sharer = lane % 4
        largest = Float32(0.0)
        for n in cutlass.range_constexpr(config.column_tiles):
            query = (8 * n + lane // 4) % (8 // config.groups * config.column_tiles)
            row = base + cutlass.min(query, config.queries - 1) * (2 * config.head_dim)
            for i in cutlass.range_constexpr(config.key_words):
                if cutlass.const_expr(config.row_words % 4 == 0):
                    word = config.key_words * sharer + i
                else:
                    word = 4 * i + sharer
                is_there = Boolean(query < config.queries)
                if cutlass.const_expr(config.row_words % 4 != 0):
                    is_there = is_there and word < config.row_words
                    word = cutlass.min(word, Int32(config.row_words - 1))
                found = [load_word(row + 2 * per_word * word + 4 * p) for p in range(per_word // 2)]
                found = [x if is_there else Uint32(0) for x in found]
                for p in cutlass.range_constexpr(per_word // 2):
                    if cutlass.const_expr(config.kv == "int4"):  # pairs (p, p + 4)
                        low, high = found[p // 2], found[2 + p // 2]
                        if cutlass.const_expr(p % 2 == 0):
                            pair = (low & Uint32(0xFFFF)) | (high << 16)
                        else:
                            pair = (low >> 16) | (high & Uint32(0xFFFF0000))
                    else:
                        pair = found[p]
                    rQ[per_word // 2 * i + p, n] = pair
                    for x in (from_bits(pair << 16), from_bits(pair & Uint32(0xFFFF0000))):
                        largest = cute.arch.fmax(largest, cute.arch.fmax(x, -x))
        unit = Float32(1.0)
        if cutlass.const_expr(self.is_half):
            for offset in (1, 2, 4, 8, 16):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
            exponent = cutlass.max(as_bits(largest) & Uint32(0x7F800000), Uint32(27 << 23))
            grow = from_bits(Uint32(268 << 23) - exponent)  # 2^(14 - e): the largest ends between 2^14 and 2^15
            unit = from_bits(exponent - Uint32(14 << 23))
            if cutlass.const_expr(UNIT[config.kv] != 1.0):
                unit = from_bits(exponent - Uint32(14 << 23)) * Float32(1.0 / UNIT[config.kv])
            for n in cutlass.range_constexpr(config.column_tiles):
                total = Float32(0.0)
                for i in cutlass.range_constexpr(config.key_words * per_word // 2):
                    low = from_bits(rQ[i, n] << 16) * grow
                    high = from_bits(rQ[i, n] & Uint32(0xFFFF0000)) * grow
                    total = total + low + high
                    if cutlass.const_expr(i % 2 == 1 and SECOND[config.kv] != 1.0):
                        low = low * Float32(1.0 / SECOND[config.kv])
                        high = high * Float32(1.0 / SECOND[config.kv])
                    rQ[i, n] = pack_f16x2(low, high)
                if cutlass.const_expr(self.has_zero):
                    for offset in (1, 2):
                        total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
                    total = total * Float32(UNIT[config.kv])
                    for c in cutlass.range_constexpr(2):
                        rSum[c, n] = cute.arch.shuffle_sync(total, 8 * sharer + 4 * c)
        return unit
