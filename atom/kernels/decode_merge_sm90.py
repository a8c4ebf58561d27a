"""From warps' results to outputs in the decode kernel (sm_90a): a segment's end, and rows that several CTAs share."""

import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute

from .attention_config import DecodeConfig
from .decode_codes_sm90 import SECOND, UNIT
from .decode_stage_sm90 import LOWEST
from .dsl.memory import (
    atomic_increment,
    load_acquire,
    load_f32x4,
    load_global_f32,
    load_global_f32x4,
    store_f32x2,
    store_f32x4,
)
from .dsl.tensor_core import exp2, log2

MERGED = 8  # partial results that a lane loads at once


class DecodeMerge:
    """What the kernel class mixes in."""

    config: DecodeConfig

    @cute.jit
    def finish(
        self, mO, mPartial, mLse, mNear, mNearLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, is_busy, turned,
        warp, lane,
    ):  # fmt: skip
        """Put the warps' results together, in the order of their first stages, and store output or partial result."""
        config = self.config
        threads = 32 * config.warps
        sharer = lane % 4
        for n in cutlass.range_constexpr(config.column_tiles):
            for c in cutlass.range_constexpr(2):
                for offset in (2, 4, 8, 16) if config.groups == 2 else (4, 8, 16):
                    rL[c, n] = rL[c, n] + cute.arch.shuffle_sync_bfly(rL[c, n], offset=offset)
                    rZ[c, n] = rZ[c, n] + cute.arch.shuffle_sync_bfly(rZ[c, n], offset=offset)
                if cutlass.const_expr(config.groups == 2):
                    for j in cutlass.range_constexpr(config.channel_tiles):
                        for e in (c, 2 + c):
                            rO[e, j, n] = rO[e, j, n] + cute.arch.shuffle_sync_bfly(rO[e, j, n], offset=2)
                query = 8 * n + 2 * sharer + c
                if lane < 4:
                    sM[query, warp] = rM[c, n] if is_busy else Float32(LOWEST)
                    sL[query, warp] = rL[c, n]
                if query < config.queries:
                    row = sO.toint() + 4 * (warp * config.queries + query) * config.out_row
                    self.spread(row, rO, rZ, c, n, lane)
        quads = config.head_dim // 4
        total = config.queries * quads
        near = None
        if cutlass.const_expr(config.recent and total <= threads):  # under way while the other warps end
            item = cutlass.min(32 * warp + lane, total - 1)
            near = self.load_recent(mO, mNear, mNearLse, token, head, item // quads, item % quads * 4)
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)
        for step in cutlass.range_constexpr((total + threads - 1) // threads):
            item = threads * step + 32 * warp + lane
            if item < total:
                query = item // quads
                channel = item % quads * 4
                top = Float32(LOWEST)
                for w in cutlass.range_constexpr(config.warps):
                    top = cute.arch.fmax(top, sM[query, w])
                value = cute.make_rmem_tensor((4,), Float32)
                value.fill(0.0)
                weight = Float32(0.0)
                for i in cutlass.range_constexpr(config.warps):
                    w = turned + i
                    w = w - (config.warps if w >= config.warps else 0)
                    share = exp2(sM[query, w] - top)
                    weight = weight + share * sL[query, w]
                    part = load_f32x4(sO.toint() + 4 * ((w * config.queries + query) * config.out_row + channel))
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] + share * part[e]
                inverse = Float32(1.0) / weight
                for e in cutlass.range_constexpr(4):
                    value[e] = value[e] * inverse
                if place < 0:
                    if cutlass.const_expr(config.recent):
                        if cutlass.const_expr(total > threads):
                            late = self.load_recent(mO, mNear, mNearLse, token, head, query, channel)
                            self.add_recent(value, top + log2(weight), *late)
                        else:
                            self.add_recent(value, top + log2(weight), *near)
                    self.store(mO, value, token, head, query, channel)
                else:
                    at = (Int64(place) * config.queries + query) * config.head_dim + channel
                    cute.autovec_copy(value, cute.make_tensor((mPartial.iterator + at).align(16), cute.make_layout(4)))
                    if channel == 0:
                        mLse[place, query] = top + log2(weight)
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)

    @cute.jit
    def load_recent(self, mO, mNear, mNearLse, token, head, query, channel):
        """Four channels of a head's output over the newest tokens, and log2 of its weights."""
        config = self.config
        row = Int64(token) * mO.shape[1] + head * config.queries + query
        near = load_global_f32x4(mNear.iterator + (row * config.head_dim + channel))
        return near, load_global_f32(mNearLse.iterator + row)

    @cute.jit
    def add_recent(self, value, sums, near, lse):
        """Four channels over all but the newest tokens, and log2 of their weights: over all tokens."""
        share = Float32(1.0) / (Float32(1.0) + exp2(sums - lse))  # of the newest; right at both ends
        for e in cutlass.range_constexpr(4):
            value[e] = value[e] + share * (near[e] - value[e])

    @cute.jit
    def spread(self, row, rO, rZ, c: cutlass.Constexpr, n: cutlass.Constexpr, lane):
        """This lane's channels of one query head's sums to shared memory, less what zero points add."""
        config = self.config
        for i in cutlass.range_constexpr(config.value_words):
            if cutlass.const_expr(config.row_words % 8 == 0):
                word = config.value_words * (lane // 4) + i
            else:
                word = 8 * i + lane // 4
            if word < config.row_words:
                found = []
                for p in cutlass.range_constexpr(config.codes_per_word // 2):
                    j = config.codes_per_word // 2 * i + p
                    low = Float32(1.0 / UNIT[config.kv])
                    high = Float32(1.0 / (UNIT[config.kv] * SECOND[config.kv]))
                    found.append(rO[c, j, n] * low - rZ[c, n])
                    found.append(rO[2 + c, j, n] * high - rZ[c, n])
                at = row + 4 * config.codes_per_word * word
                if cutlass.const_expr(len(found) == 2):
                    store_f32x2(at, *found)
                else:
                    for q in cutlass.range_constexpr(len(found) // 4):
                        store_f32x4(at + 16 * q, *found[4 * q : 4 * q + 4])

    @cute.jit
    def store(self, mO, value, token, head, query, channel):
        """Four channels of a head's output, as bfloat16."""
        config = self.config
        at = (Int64(token) * mO.shape[1] + head * config.queries + query) * config.head_dim + channel
        out = cute.make_rmem_tensor((4,), BFloat16)
        out.store(value.load().to(BFloat16))
        cute.autovec_copy(out, cute.make_tensor((mO.iterator + at).align(8), cute.make_layout(4)))

    @cute.jit
    def announce(self, mRow, mSegment, mCounter, sPart, taken, first, last, lane):
        """The fetching warp, after its last tile: tells of the CTA's partial results when they are there.

        Those before the CTA's last segment are told of while it is computed. Of the last one's row the others are often
        there by then: this CTA is the last, and need not say so.

        sPart  of each segment: the number of its row's own partial results if all are there now, else 0; first slot,
               those of its shared prefix and their first slot (there since the kernel before), token, head
        """
        config = self.config
        for chunk in cutlass.range(first, last, 32, unroll=1):
            index = cutlass.min(chunk + lane, last - 1)
            sequence, head = mSegment[index, 0], mSegment[index, 1]
            first_slot, both, shared_slot = (mSegment[index, i] for i in range(4, 7))
            parts, shared = both & 0xFFFF, both >> 16
            token = mRow[sequence]
            is_last = chunk + lane == last - 1
            if chunk + lane >= last or both == 1:
                parts = Int32(0)
            cute.arch.sync_warp()
            if chunk == first and last - first >= 2:
                cute.arch.barrier(barrier_id=3, number_of_threads=config.threads)  # all but the last one's are stored
            found = Int32(0)  # of the row's parts, before this one
            if parts > 0 and not is_last:
                found = atomic_increment(
                    mCounter.iterator + first_slot
                )  # releases what the CTA stored, acquires others'
            turn = last - 1 - first
            cute.arch.mbarrier_wait(taken + turn % 2, turn // 2 % 2)  # the last one is read, and soon put together
            if parts > 0 and is_last:
                found = load_acquire(mCounter.iterator + first_slot)
            cute.arch.sync_warp()
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)  # partial results are stored
            if parts > 0 and is_last and found != parts - 1:
                found = atomic_increment(mCounter.iterator + first_slot)
            if parts > 0:
                if found == parts - 1:
                    mCounter[first_slot] = Int32(0)
                else:
                    parts = Int32(0)
            for i, value in enumerate((parts, first_slot, shared, shared_slot, token, head)):
                sPart[i, lane] = value
            cute.arch.sync_warp()
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)

    @cute.jit
    def merge(self, mO, mPartial, mLse, mNear, mNearLse, sPart, first, last, warp, lane):
        """The other warps: the outputs of rows whose last part this CTA was.

        Whichever CTA does it, partial results are added up in the order of a row's parts: the same bits on every run.
        """
        config = self.config
        for chunk in cutlass.range(first, last, 32, unroll=1):
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            for i in cutlass.range(cutlass.min(last - chunk, Int32(32)), unroll=1):
                parts, slot, shared, shared_slot, token, head = (sPart[k, i] for k in range(6))
                if parts > 0:
                    self.merge_row(
                        mO, mPartial, mLse, mNear, mNearLse, parts, slot, shared, shared_slot, token, head, warp, lane
                    )
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)

    @cute.jit
    def merge_row(self, mO, mPartial, mLse, mNear, mNearLse, own, slot, shared, shared_slot, token, head, warp, lane):
        """The output of a row from all its partial results, its own first; MERGED are under way at once."""
        config = self.config
        threads = 32 * config.warps
        quads = config.head_dim // 4
        total = config.queries * quads
        parts = own + shared
        to_shared = shared_slot - own
        for step in cutlass.range_constexpr((total + threads - 1) // threads):
            item = threads * step + 32 * warp + lane
            if item < total:
                query = item // quads
                channel = item % quads * 4
                top = Float32(LOWEST)
                weight = Float32(0.0)
                value = cute.make_rmem_tensor((4,), Float32)
                value.fill(0.0)
                for begin in cutlass.range(0, parts, MERGED, unroll=1):
                    sums = []
                    found = []
                    for i in cutlass.range_constexpr(MERGED):
                        index = cutlass.min(begin + i, parts - 1)
                        part = index + (slot if index < own else to_shared)
                        sums.append(load_global_f32(mLse.iterator + (part * config.queries + query)))
                        at = (Int64(part) * config.queries + query) * config.head_dim + channel
                        found.append(load_global_f32x4(mPartial.iterator + at))
                    higher = top
                    for i in cutlass.range_constexpr(MERGED):
                        higher = cute.arch.fmax(higher, sums[i])
                    shrink = exp2(top - higher)
                    top = higher
                    weight = weight * shrink
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] * shrink
                    for i in cutlass.range_constexpr(MERGED):
                        share = exp2(sums[i] - top)
                        share = share if begin + i < parts else Float32(0.0)
                        weight = weight + share
                        for e in cutlass.range_constexpr(4):
                            value[e] = value[e] + share * found[i][e]
                inverse = Float32(1.0) / weight
                for e in cutlass.range_constexpr(4):
                    value[e] = value[e] * inverse
                if cutlass.const_expr(config.recent):
                    near, lse = self.load_recent(mO, mNear, mNearLse, token, head, query, channel)
                    self.add_recent(value, top + log2(weight), near, lse)
                self.store(mO, value, token, head, query, channel)
