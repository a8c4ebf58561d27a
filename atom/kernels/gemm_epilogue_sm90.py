"""The end of a GEMM tile: adding up a split of K, scales, bias, and the way to memory. See gemm_sm90.py."""

from typing import Any

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute

from .dsl.memory import (
    increment_release,
    load_global_f32x4,
    load_relaxed,
    load_shared_f32x2,
    load_u32x4,
    pack_bf16x2,
    store_matrix_transposed,
)
from .dsl.wide_access import store_words_if
from .gemm_config import COUNTER_WORDS, MOST_TILES, GemmConfig
from .gemm_kinds import WeightKind


class GemmEpilogue:
    """What follows the main loop of one tile; the kernel class adds the rest."""

    config: GemmConfig
    kind: WeightKind
    consumers: int
    sharers: int
    tile_m: int
    cluster_sync: Any

    @cute.jit
    def fetch_row_values(self, mC, mB, values, thread, row0, features):
        """Scales and biases of this thread's two rows, into registers.

        This and the next are done before the main loop, which hides how long they take.
        """
        row = row0 + (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            values[r] = Float32(1.0)
            values[2 + r] = Float32(0.0)
            if row + 8 * r < features:
                if cutlass.const_expr(self.kind.channel_scaled):
                    values[r] = mC[row + 8 * r]
                if cutlass.const_expr(self.config.bias):
                    values[2 + r] = Float32(mB[row + 8 * r])

    @cute.jit
    def fetch_token_scales(self, mS, values, thread, token0, tokens):
        """One thread of a warpgroup for each token of the tile: its scales, and its outliers', into registers."""
        for i in cutlass.range_constexpr(-(-self.tile_m // 128)):
            for row in cutlass.range_constexpr(self.config.scale_rows):
                token = cutlass.min(token0 + (128 * i + thread), tokens - 1)
                values[self.config.scale_rows * i + row] = mS[row, token]

    @cute.jit
    def share_scales(self, sT, values, thread, group):
        """Token scales from registers to where all threads of the warpgroup read them."""
        if cutlass.const_expr(self.config.scale_rows > 0):
            for i in cutlass.range_constexpr(-(-self.tile_m // 128)):
                for row in cutlass.range_constexpr(self.config.scale_rows):
                    if 128 * i + thread < self.tile_m:
                        sT[128 * i + thread, row] = values[self.config.scale_rows * i + row]
            cute.arch.barrier(barrier_id=2 + group, number_of_threads=128)

    @cute.jit
    def store(self, staging, sums, sT, row_values, mY, mR, thread, group, feature0, token0, low, high):
        """Scale, add the bias, transpose through this warpgroup's own staging, 16 tokens x 64 features at a time.

        What is added to the products is added to what they round to, as a sum of its own would.
        """
        config = self.config
        by_channel = self.kind.channel_scaled and not config.scaled_early
        by_token = config.token_scales == "token" and not config.scaled_early
        lane = thread % 32
        # stmatrix: lane l addresses token l % 8 (+ 8 for l >= 16) and features 8 * (l // 8 % 2) of its warp's 16
        target = staging + ((lane % 8 + 8 * (lane // 16)) * 144 + ((thread // 32) * 2 + lane // 8 % 2) * 16)
        scales_at = sT.iterator.toint() + 8 * (lane % 4)
        chunk_tokens = config.chunk_tokens
        for chunk in cutlass.range_constexpr(self.tile_m // chunk_tokens):
            if token0 + chunk * chunk_tokens < high and token0 + (chunk + 1) * chunk_tokens > low:
                after = self.scales_of(scales_at, chunk * chunk_tokens)
                for t in cutlass.range_constexpr(chunk_tokens // 16):
                    scales = after
                    if cutlass.const_expr(t + 1 < chunk_tokens // 16):  # they arrive while these are used
                        after = self.scales_of(scales_at, chunk * chunk_tokens + 16 * (t + 1))
                    words = []
                    for half in cutlass.range_constexpr(2):
                        pair = []
                        j = (chunk * chunk_tokens + 16 * t) // 8 + half  # 8 tokens each
                        for r in cutlass.range_constexpr(2):
                            for c in cutlass.range_constexpr(2):
                                i = 4 * j + 2 * r + c
                                value = Float32(sums[i])
                                if cutlass.const_expr(by_token):
                                    value = value * scales[2 * half + c]
                                if cutlass.const_expr(by_channel):
                                    value = value * row_values[r]
                                if cutlass.const_expr(config.bias):
                                    value = value + row_values[2 + r]
                                pair.append(value)
                        words.append(pack_bf16x2(pair[0], pair[1]))
                        words.append(pack_bf16x2(pair[2], pair[3]))
                    store_matrix_transposed(target + 144 * 16 * t, words[0], words[1], words[2], words[3])
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=128)
                self.copy_out(staging, mY, mR, thread, feature0, token0 + chunk * chunk_tokens, low, high)
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=128)

    @cute.jit
    def scales_of(self, address, token: cutlass.Constexpr):
        """The scales of a lane's tokens of 16, from `token` of the tile on: two neighbours of each 8.

        address  of the scales of its first two, in shared memory
        """
        found = [Float32(1.0)] * 4
        if cutlass.const_expr(self.config.token_scales == "token" and not self.config.scaled_early):
            for half in cutlass.range_constexpr(2):
                found[2 * half], found[2 * half + 1] = load_shared_f32x2(address, 4 * (token + 8 * half))
        return found

    @cute.jit
    def copy_out(self, staging, mY, mR, thread, feature0, first, low, high):
        """A chunk of tokens from staging to memory; all of it is read before any is written, so that nothing waits."""
        config = self.config
        count = config.chunk_tokens // 16
        features = mY.shape[1]
        feature = feature0 + (thread % 8) * 8
        held = cute.make_rmem_tensor((4, count), Uint32)
        for i in cutlass.range_constexpr(count):
            words = load_u32x4(staging + ((i * 16 + thread // 8) * 144 + (thread % 8) * 16))
            for e in cutlass.range_constexpr(4):
                held[e, i] = words[e]
        at = Int64(first + thread // 8) * features + feature
        for i in cutlass.range_constexpr(count):
            token = first + (i * 16 + thread // 8)
            here = (token >= low) & (token < high) & (feature < features)
            if cutlass.const_expr(config.aligned and not config.residual):
                address = (mY.iterator + (at + Int64(16 * i) * features)).toint()
                store_words_if(address, [held[e, i] for e in range(4)], here)
            elif here:
                row = cute.recast_tensor(held[None, i], BFloat16)
                at_i = at + Int64(16 * i) * features
                if cutlass.const_expr(config.residual):
                    self.add_residual(row, mR, at_i, features - feature)
                if cutlass.const_expr(config.aligned):
                    place = mY.iterator + at_i
                    cute.autovec_copy(row, cute.make_tensor(place.align(16), cute.make_layout(8)))
                else:
                    for e in cutlass.range_constexpr(8):
                        if feature + e < features:
                            mY[token, feature + e] = row[e]

    @cute.jit
    def add_residual(self, row, mR, at, width):
        """Eight bfloat16 of `row` += those of mR from element `at` on; `width` of them exist."""
        other = cute.make_rmem_tensor((8,), BFloat16)
        if cutlass.const_expr(self.config.aligned):
            cute.autovec_copy(cute.make_tensor((mR.iterator + at).align(16), cute.make_layout(8)), other)
        else:
            other.fill(0)
            source = cute.make_tensor(mR.iterator + at, cute.make_layout(8))
            for e in cutlass.range_constexpr(8):
                if e < width:
                    other[e] = source[e]
        for e in cutlass.range_constexpr(8):
            row[e] = BFloat16(Float32(row[e]) + Float32(other[e]))

    @cute.jit
    def merge(self, pool, sums, thread, group):
        """Add the sums of the warpgroups that share rows, in their order, into those of the first."""
        config = self.config
        place = pool + (config.ring_bytes + config.stagings_bytes + config.warpgroups * config.scale_bytes)
        size = cute.size(sums)
        layout = cute.make_layout((128, size, config.ways - 1))
        others = cute.make_tensor(cute.recast_ptr(place, dtype=sums.element_type), layout)
        if group > 0:
            for i in cutlass.range_constexpr(size):
                others[thread, i, group - 1] = sums[i]
        cute.arch.barrier(barrier_id=6, number_of_threads=self.consumers)
        if group == 0:
            for w in cutlass.range_constexpr(config.ways - 1):
                for i in cutlass.range_constexpr(size):
                    sums[i] = sums[i] + others[thread, i, w]
        cute.arch.barrier(barrier_id=6, number_of_threads=self.consumers)

    @cute.jit
    def exchange(self, mE, sums, tid, rank, tokens, item, met):
        """Add up the split's partial sums in registers, in rank order; each CTA does so for its share of the tokens.

        They travel through global memory (L2), in fragment order: [CTA, 8 tokens, thread, 4] words. Distributed
        shared memory moved them at 4 bytes a nanosecond and SM (H200), loads and bulk copies alike.
        """
        config = self.config
        blocks = self.tile_m // 8
        split = config.parts
        share = config.share_tokens // 8
        bx, _, _ = cute.arch.block_idx()
        dtype = sums.element_type
        part = cute.make_rmem_tensor((4,), Float32)
        part_sums = cute.recast_tensor(part, dtype)
        for j in cutlass.range_constexpr(blocks):
            if 8 * j < tokens and rank != j // share:
                for e in cutlass.range_constexpr(4):
                    part_sums[e] = sums[4 * j + e]
                cute.autovec_copy(part, self.partial(mE, bx, j, tid))
        if cutlass.const_expr(config.meets_at_counter):
            self.meet(mE, tid, item, met)
        else:
            self.cluster_sync(split)  # arriving releases what this thread has written
        for j in cutlass.range_constexpr(blocks):
            if 8 * j < tokens and rank == j // share:
                total = cute.make_rmem_tensor((4,), dtype)
                total.fill(0)
                parts = cute.make_rmem_tensor((4, split), Float32)
                parts_sums = cute.recast_tensor(parts, dtype)
                for p in cutlass.range_constexpr(split):
                    if p != rank:
                        words = load_global_f32x4(self.partial(mE, bx - rank + p, j, tid).iterator)
                        for e in cutlass.range_constexpr(4):
                            parts[e, p] = words[e]
                    else:
                        for e in cutlass.range_constexpr(4):
                            parts_sums[e, p] = sums[4 * j + e]
                for p in cutlass.range_constexpr(split):
                    for e in cutlass.range_constexpr(4):
                        total[e] = total[e] + parts_sums[e, p]
                for e in cutlass.range_constexpr(4):
                    sums[4 * j + e] = total[e]

    @cute.jit
    def count_to_meet(self, mE, tid, item):
        """What the counter of this tile will read when all CTAs of it have arrived, for thread 0.

        A counter per split and tile, never reset: every launch adds `split` to it. It is read before this CTA arrives,
        and after the launch before has ended, so it stands within this launch's `split` counts; long before it is
        needed, so that nobody waits for it.
        """
        split = self.config.parts
        met = Int32(0)
        if tid == 0:
            seen = load_relaxed(mE.iterator + (split * MOST_TILES + item))
            met = (seen // split + 1) * split
            if cutlass.const_expr(split & (split - 1) == 0):  # right also where the counter wraps
                met = (seen | (split - 1)) + 1
        return met

    @cute.jit
    def meet(self, mE, tid, item, met):
        """Wait until all CTAs of this tile have written their partial sums.

        All CTAs of the launch are resident (gemm_config.py sees to it), so waiting cannot keep a CTA that is waited
        for from starting. One thread releases what all of its CTA have written, and acquires for all.
        """
        cute.arch.barrier(barrier_id=1, number_of_threads=self.sharers)
        if tid == 0:
            counter = mE.iterator + (self.config.parts * MOST_TILES + item)
            increment_release(counter)
            seen = load_relaxed(counter)
            while seen - met < 0:
                seen = load_relaxed(counter)
            cute.arch.fence_acq_rel_gpu()
        cute.arch.barrier(barrier_id=1, number_of_threads=self.sharers)

    @cute.jit
    def partial(self, mE, cta, block, tid):
        at = COUNTER_WORDS + ((Int64(cta) * (self.tile_m // 8) + block) * self.sharers + tid) * 4
        return cute.make_tensor((mE.iterator + at).align(16), cute.make_layout(4))
