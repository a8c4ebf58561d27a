"""The key offset's part of the scores, for the decode kernel (sm_90a): nothing of it is added to keys.

Keys are stored less an offset b that all keys of a KV head share (before RoPE), so a score lacks q . rope_j(b). With
channels paired as (c, c + D / 2), u = q1 b1 + q2 b2 and w = q2 b1 - q1 b2, that is

    q . rope_j(b) = sum_c u_c cos(j t_c) + w_c sin(j t_c)

for the query turned already. A stage begins at position p: turning (u, w) back by p once a stage leaves j - p, and
cos, sin of those few differences are the same in every stage: a small constant matrix in shared memory, on which one
more product of matrices runs, in float16 under one scale a query head. (bfloat16 would cost a loud offset three bits.)
"""

import cutlass
from cutlass import Boolean, Float32, Uint32, cute

from .attention_config import DecodeConfig
from .dsl.arithmetic import from_bits
from .dsl.tensor_core import load_16x16, mma_f16, pack_f16x2


class KeyOffset:
    """What the kernel class mixes in."""

    config: DecodeConfig

    @cute.jit
    def load_turns(self, mTurn, sTurn, tid):
        """The constant matrix, [stage tokens in the order of mma's rows, head_dim] float16, into shared memory."""
        config = self.config
        words = config.head_dim // 2
        for i in cutlass.range(tid, config.stage_tokens * words, config.threads, unroll=1):
            sTurn[i // words * (config.turn_row_bytes // 4) + i % words] = mTurn[i // words, i % words]

    @cute.jit
    def load_offsets(self, mQ, mOffset, rU, rN, token, head, lane, scale):
        """rU[u or w, pair, 8 channels, column tile] of this lane's channels, and rN, what its two heads' sums lack."""
        config = self.config
        sharer = lane % 4
        half = config.head_dim // 4  # words of half a head
        for n in cutlass.range_constexpr(config.column_tiles):
            query = (8 * n + lane // 4) % (8 // config.groups * config.column_tiles)
            is_there = Boolean(query < config.queries)
            largest = Float32(0.0)
            for s in cutlass.range_constexpr(config.head_dim // 16):
                at = 4 * s + sharer
                q1 = Uint32(0)
                q2 = Uint32(0)
                if is_there:
                    q1 = mQ[token, head * config.queries + query, at]
                    q2 = mQ[token, head * config.queries + query, at + half]
                b1 = mOffset[head, at]
                b2 = mOffset[head, at + half]
                for p in cutlass.range_constexpr(2):
                    a, b, c, d = (self.half_of(x, p) for x in (q1, q2, b1, b2))
                    rU[0, p, s, n] = a * c + b * d
                    rU[1, p, s, n] = b * c - a * d
                    for i in cutlass.range_constexpr(2):
                        largest = cute.arch.fmax(largest, cute.arch.fmax(rU[i, p, s, n], -rU[i, p, s, n]))
            for offset in (1, 2):
                largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, offset=offset))
            largest = cute.arch.fmax(largest, Float32(1.0e-30))
            inverse = Float32(1.0) / largest
            for s in cutlass.range_constexpr(config.head_dim // 16):
                for p in cutlass.range_constexpr(2):
                    for i in cutlass.range_constexpr(2):
                        rU[i, p, s, n] = rU[i, p, s, n] * inverse
            for c in cutlass.range_constexpr(2):
                rN[c, n] = scale * cute.arch.shuffle_sync(largest, 8 * sharer + 4 * c)

    @cute.jit
    def half_of(self, word, index: cutlass.Constexpr):
        if cutlass.const_expr(index == 0):
            return from_bits(word << 16)
        return from_bits(word & Uint32(0xFFFF0000))

    @cute.jit
    def turn_back(self, mCos, mSin, rU, rB, token0, lane):
        """rB[u or w, 8 channels, column tile]: (u, w) turned by position token0, as registers of mma's B."""
        config = self.config
        sharer = lane % 4
        for s in cutlass.range_constexpr(config.head_dim // 16):
            cos = cute.make_rmem_tensor((2,), Float32)
            sin = cute.make_rmem_tensor((2,), Float32)
            row = token0 * (config.head_dim // 2) + 8 * s + 2 * sharer
            cute.autovec_copy(cute.make_tensor((mCos.iterator + row).align(8), cute.make_layout(2)), cos)
            cute.autovec_copy(cute.make_tensor((mSin.iterator + row).align(8), cute.make_layout(2)), sin)
            for n in cutlass.range_constexpr(config.column_tiles):
                u = [rU[0, p, s, n] * cos[p] + rU[1, p, s, n] * sin[p] for p in (0, 1)]
                w = [rU[1, p, s, n] * cos[p] - rU[0, p, s, n] * sin[p] for p in (0, 1)]
                rB[0, s, n] = pack_f16x2(u[0], u[1])
                rB[1, s, n] = pack_f16x2(w[0], w[1])

    @cute.jit
    def offset_scores(self, turns, rB, tile: cutlass.Constexpr, n: cutlass.Constexpr, lane):
        """Sums of 16 tokens and 8 heads, in mma's order; `turns` is the matrix's shared address."""
        config = self.config
        row = turns + (16 * tile + lane % 16) * config.turn_row_bytes + 16 * (lane // 16)
        sums = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
        for s in cutlass.range_constexpr(config.head_dim // 16):
            sums = mma_f16(load_16x16(row + 32 * s), rB[0, s, n], rB[1, s, n], sums)
        return sums
