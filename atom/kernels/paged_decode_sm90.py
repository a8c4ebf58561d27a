"""Decode attention over a paged, quantized cache on Hopper (sm_90a), in CuTe DSL: one query token a sequence.

A CTA works through the segments that the plan (attention_plan.py) gives it: parts of a sequence for one KV head and its
query heads. One warp streams tiles (kv_layout.py: one bulk copy each) into a ring of shared-memory stages, and queries
ahead of the segment that needs them; each other warp takes every `warps`-th stage and keeps maximum, sum and output of
its own, put together at the segment's end. Of the CTAs that share a row, the last to end merges their partial results.

What a reader must know: both products stand on their heads, scores as K q^T and outputs as V^T p^T, so that eight
columns of mma hold query heads and 16 rows tokens or channels. With four heads or fewer, columns 4 to 7 repeat them:
then lanes of the left columns go on with the scores of one tile of 16 tokens and those of the right with the next
tile's, and no lane computes what nobody needs. Codes are float16 numbers as they stand (decode_codes_sm90.py); scale
and zero point never touch the inner products:

    s_j = scale_k,j * (q . codes_j - zero_k,j * sum(q))
    o   = sum_j w_j codes_j - sum_j w_j zero_v,j,   w_j = exp2(s_j - m) * scale_v,j

The reference m is not the running maximum: it is raised when a weight would leave float16's range, once a segment as a
rule. Queries enter under a power of two that brings their largest into float16's range, which loses nothing.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from .attention_config import DecodeConfig
from .decode_codes_sm90 import SECOND, UNIT, expand, expand_pair, load_row
from .decode_offset_sm90 import KeyOffset
from .dsl.arithmetic import as_bits, from_bits
from .dsl.memory import (
    atomic_increment,
    bulk_load,
    load_f32x4,
    load_global_f32,
    load_global_f32x4,
    pack_bf16x2,
    store_f32x2,
    store_f32x4,
)
from .dsl.tensor_core import exp2, load_word, log2, mma_bf16, mma_f16, pack_f16x2, reciprocal_approx, transpose_8x8

LOWEST = -1.0e30  # a maximum before the first score: finite, so that differences are numbers
LOG2_E = 1.4426950408889634
MOST_WEIGHT = 2.0**15  # a weight beyond it raises the reference; float16 ends at 2^16
MERGED = 8  # partial results that a lane loads at once
META = 8  # int32s of a segment that the producer hands on: head, begin, end, place, length, token


class PagedDecode(KeyOffset):
    """The compile-time choices of one kernel; see DecodeConfig for their meaning."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.has_zero = config.kv in ("int4", "int8")
        self.is_float = config.kv in ("fp8_e4m3", "bf16")  # codes that may be NaN
        self.is_half = config.kv != "bf16"  # products are of float16
        self.is_wide = config.channel_tiles * config.column_tiles > 16  # a lane holds more than 64 outputs
        self.steps = config.stage_tokens // (16 * config.groups)
        self.key_codes = 2 * config.block_size * config.word_bytes  # where they begin in a tile
        self.value_codes = self.key_codes + config.block_size * config.row_bytes

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: turned queries, two bfloat16 each
        mKV: cute.Tensor,  # [num_blocks, num_kv_heads, tile_bytes] uint8
        mTable: cute.Tensor,  # [B, max blocks] int32
        mLength: cute.Tensor,  # [B] int32: tokens to attend over
        mRow: cute.Tensor,  # [B] int32: which of the T tokens is the sequence's query
        mWork: cute.Tensor,  # [CTAs + 1] int32, AttentionPlan.work
        mSegment: cute.Tensor,  # [S, 8] int32, AttentionPlan.segments
        mMerge: cute.Tensor,  # [rows, 4] int32, AttentionPlan.merges
        mO: cute.Tensor,  # [T, num_heads, head_dim] bfloat16
        mPartial: cute.Tensor,  # [slots, queries, head_dim] float32
        mLse: cute.Tensor,  # [slots, queries] float32: log2 of the sum of exponentials
        mCounter: cute.Tensor,  # [rows] int32: partial results that are there, of each split row; zeros at rest
        mOffset: cute.Tensor,  # [num_kv_heads, head_dim / 2] uint32: key offsets, two bfloat16 each, else any
        mCos: cute.Tensor,  # [positions, head_dim / 2] float32, where there are offsets, else any
        mSin: cute.Tensor,  # the same
        mTurn: cute.Tensor,  # [stage tokens, head_dim / 2] uint32: attention_sm90.turn_matrix, else any
        scale: Float32,  # of scores; with a cap, scale / cap
        cap: Float32,
        window: Int32,
        is_early: Int32,  # 1: all but the kernel before has ended (see produce)
        stream: cuda.CUstream,
    ):
        self.kernel(
            mQ, mKV, mTable, mLength, mRow, mWork, mSegment, mMerge, mO, mPartial, mLse, mCounter, mOffset, mCos, mSin,
            mTurn, scale, cap, window, is_early,
        ).launch(
            grid=(mWork.shape[0] - 1, 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # given, so that compiling asks no driver for the device
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mKV: cute.Tensor, mTable: cute.Tensor, mLength: cute.Tensor, mRow: cute.Tensor,
        mWork: cute.Tensor, mSegment: cute.Tensor, mMerge: cute.Tensor, mO: cute.Tensor, mPartial: cute.Tensor,
        mLse: cute.Tensor, mCounter: cute.Tensor, mOffset: cute.Tensor, mCos: cute.Tensor, mSin: cute.Tensor,
        mTurn: cute.Tensor, scale: Float32, cap: Float32, window: Int32, is_early: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        smem = utils.SmemAllocator()
        full = smem.allocate_array(Int64, config.stages)
        empty = smem.allocate_array(Int64, config.stages)
        ready = smem.allocate_array(Int64, 2)  # of a segment's queries
        taken = smem.allocate_array(Int64, 2)
        ring = smem.allocate(config.stages * config.stage_bytes, 128)
        columns = 8 * config.column_tiles
        queries = smem.allocate(2 * config.query_bytes, 128)
        sMeta = smem.allocate_tensor(Int32, cute.make_layout((META, 2)), byte_alignment=16)
        sPart = smem.allocate_tensor(Int32, cute.make_layout((4, 32)), byte_alignment=16)
        sO = smem.allocate(4 * config.warps * config.queries * config.out_row, 16)
        sM = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        sL = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        turns = Int32(0)
        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(config.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 1)
                for s in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(ready + s, 1)
                    cute.arch.mbarrier_init(taken + s, config.warps)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(config.has_offset):
            sTurn = smem.allocate_tensor(Uint32, cute.make_layout(config.turn_bytes // 4), byte_alignment=16)
            self.load_turns(mTurn, sTurn, tid)
            turns = sTurn.iterator.toint()
        first = Int32(0)
        last = Int32(0)
        if warp == config.warps:
            if is_early == 0:
                cute.arch.griddepcontrol_wait()
            first = mWork[cta]
            last = mWork[cta + 1]
        cute.arch.sync_threads()
        if warp == config.warps:
            self.produce(
                mQ, mKV, mTable, mLength, mRow, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last,
                lane,
            )  # fmt: skip
            self.announce(mRow, mSegment, mMerge, mCounter, sPart, first, last, lane)
        else:
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()  # after the wait: the next kernel may rely on it, as this one
            first = mWork[cta]
            last = mWork[cta + 1]
            count = Int32(0)  # stages so far: the ring's position
            for index in cutlass.range(first, last, unroll=1):
                count = self.consume(
                    mQ, mO, mPartial, mLse, mOffset, mCos, mSin, full, empty, ready, taken, ring, queries, sMeta, sO,
                    sM, sL, turns, index - first, count, warp, lane, scale, cap, window,
                )  # fmt: skip
            self.merge(mO, mPartial, mLse, sPart, first, last, warp, lane)

    @cute.jit
    def produce(
        self, mQ, mKV, mTable, mLength, mRow, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last,
        lane,
    ):  # fmt: skip
        """One warp: the tiles of the CTA's segments into the ring, and each one's queries before them.

        Only a sequence's last block is of this step, so plan and tiles before it are fetched while the kernel that
        appends still runs. That kernel lets this one start when it has waited for all before it, and no sooner.
        """
        config = self.config
        ahead = config.stage_blocks
        slot = Int32(0)
        phase = Int32(1)  # of `empty`: what was never filled counts as emptied
        begun = Int32(0)  # stages of the first segment that are under way before its turn
        entry = Int32(0)
        stride = mKV.shape[1] * config.tile_bytes
        if first < last:
            sequence, head, begin, end = (mSegment[first, i] for i in range(4))
            length = mLength[sequence]
            end = self.end_of(mSegment, first, end, length)
            origin = mKV.iterator + Int64(head) * config.tile_bytes
            entry = mTable[sequence, cutlass.min(begin + lane, mTable.shape[1] - 1)]  # 32 blocks of the table at a time
            old = cutlass.min((length - 1) // config.block_size, end) - begin
            begun = cutlass.min(cutlass.min(old, Int32(32)) // ahead, Int32(config.stages))
            for i in cutlass.range(begun, unroll=1):
                self.fetch(origin, stride, full, empty, ring, entry, ahead * i, Int32(32), slot, phase)
                slot += 1
                if slot == config.stages:
                    slot = Int32(0)
                    phase = phase ^ 1
        cute.arch.griddepcontrol_wait()
        for index in cutlass.range(first, last, unroll=1):
            sequence, head, begin, end, place = (mSegment[index, i] for i in range(5))
            following = cutlass.min(index + 1, last - 1)
            sequence_next, begin_next = mSegment[following, 0], mSegment[following, 2]
            token = mRow[sequence]
            length = mLength[sequence]
            end = self.end_of(mSegment, index, end, length)
            turn = index - first
            buffer = turn % 2
            cute.arch.mbarrier_wait(taken + buffer, (turn // 2 + 1) % 2)
            with cute.arch.elect_one():
                for i, value in enumerate((head, begin, end, place, length, token)):
                    sMeta[i, buffer] = value
                cute.arch.mbarrier_arrive_and_expect_tx(ready + buffer, config.query_bytes)
                at = (Int64(token) * mQ.shape[1] + head * config.queries) * (config.head_dim // 2)
                bulk_load(
                    queries + buffer * config.query_bytes, mQ.iterator + at, Int32(config.query_bytes), ready + buffer
                )
            origin = mKV.iterator + Int64(head) * config.tile_bytes
            blocks = end - begin
            chunks = (blocks + 31) // 32
            for chunk in cutlass.range(chunks, unroll=1):
                done = 32 * chunk
                here = cutlass.min(blocks - done, Int32(32))
                now = entry
                row = sequence
                column = begin + done + 32 + lane
                if chunk + 1 == chunks:
                    row = sequence_next
                    column = begin_next + lane
                entry = mTable[row, cutlass.min(column, mTable.shape[1] - 1)]  # for the next chunk
                for i in cutlass.range(begun, (here + ahead - 1) // ahead, unroll=1):
                    self.fetch(origin, stride, full, empty, ring, now, ahead * i, here, slot, phase)
                    slot += 1
                    if slot == config.stages:
                        slot = Int32(0)
                        phase = phase ^ 1
                begun = Int32(0)

    @cute.jit
    def end_of(self, mSegment, index, end, length):
        """A row's last segment goes to the sequence's end, wherever that has come since the plan was made."""
        blocks = (length + (self.config.block_size - 1)) // self.config.block_size
        return blocks if mSegment[index, 6] > 0 else end

    @cute.jit
    def fetch(self, origin, stride, full, empty, ring, entry, block, here, slot, phase):
        """A stage: blocks `block` ... of the 32 (of which `here` are there) whose places the lanes hold in `entry`.

        origin  the KV head's tile of the pool's first block; stride  bytes from one block to the next
        """
        config = self.config
        present = cutlass.min(here - block, Int32(config.stage_blocks))
        places = [cute.arch.shuffle_sync(entry, block + k) for k in range(config.stage_blocks)]
        target = ring + slot * config.stage_bytes
        cute.arch.mbarrier_wait(empty + slot, phase)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, present * config.tile_bytes)
            for k in cutlass.range_constexpr(config.stage_blocks):
                if k < present:
                    bulk_load(
                        target + k * config.tile_bytes, origin + Int64(places[k]) * Int64(stride),
                        Int32(config.tile_bytes), full + slot,
                    )  # fmt: skip

    @cute.jit
    def consume(
        self, mQ, mO, mPartial, mLse, mOffset, mCos, mSin, full, empty, ready, taken, ring, queries, sMeta, sO, sM, sL,
        turns, turn, count, warp, lane, scale, cap, window,
    ):  # fmt: skip
        """One of the consuming warps: its share of a segment's stages, then the CTA's result to memory."""
        config = self.config
        columns = config.column_tiles
        buffer = turn % 2
        cute.arch.mbarrier_wait(ready + buffer, turn // 2 % 2)
        head, begin, end, place, length, token = (cute.arch.make_warp_uniform(sMeta[i, buffer]) for i in range(6))
        pairs = config.key_words * config.codes_per_word // 2
        rQ = cute.make_rmem_tensor((pairs, columns), Uint32)
        rSum = cute.make_rmem_tensor((2, columns), Float32)  # of the channels of this lane's two query heads
        rM = cute.make_rmem_tensor((2, columns), Float32)
        rL = cute.make_rmem_tensor((2, columns), Float32)
        rZ = cute.make_rmem_tensor((2, columns), Float32)  # what zero points add to the outputs
        rO = cute.make_rmem_tensor((4, config.channel_tiles, columns), Float32)
        unit = self.load_queries((queries + buffer * config.query_bytes).toint(), rQ, rSum, lane)
        rB = None  # the key offset's part: what a stage multiplies, and the factor of the sums
        rN = None
        rU = None
        if cutlass.const_expr(config.has_offset):
            rU = cute.make_rmem_tensor((2, 2, config.head_dim // 16, columns), Float32)
            rB = cute.make_rmem_tensor((2, config.head_dim // 16, columns), Uint32)
            rN = cute.make_rmem_tensor((2, columns), Float32)
            rB.fill(0)
            factor = scale if cutlass.const_expr(config.has_cap) else scale * Float32(LOG2_E)
            self.load_offsets(mQ, mOffset, rU, rN, token, head, lane, factor)
        unit = unit * scale
        if cutlass.const_expr(not config.has_cap):
            unit = unit * Float32(LOG2_E)
        rM.fill(0.0)
        rL.fill(0.0)
        rZ.fill(0.0)
        rO.fill(0.0)
        lowest = Int32(0)
        if cutlass.const_expr(config.has_window):
            lowest = cutlass.max(length - window, Int32(0))
        limit = cutlass.min(length, end * config.block_size)
        start = begin * config.block_size
        stages = (end - begin + config.stage_blocks - 1) // config.stage_blocks
        # Stages go round the warps from where the last segment ended, so that a slot of the ring is always one warp's:
        # a warp that ran ahead could take another's fill of the last round for its own of this one.
        turned = count % config.warps
        j = warp - turned
        if j < 0:
            j += config.warps
        mine = j
        slot = (count + j) % config.stages
        phase = (count + j) // config.stages % 2
        # A slot is released when the next stage begins, not at its own end: there the arrival was issued as soon as the
        # loads were, before the products that wait for them, and where many loads queue for banks (bfloat16) the next
        # tile came first. A branch stands between now, which products are not moved across.
        held = Int32(-1)
        if cutlass.const_expr(not config.has_window):  # stages whose tokens are all seen: but the last, perhaps
            whole = (limit - start) // config.stage_tokens
            while j < whole:
                self.release(empty, held)
                self.attend(
                    False, mCos, mSin, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, rU, rB, rN, turns, unit, cap, start,
                    lowest, limit, j, j == mine, slot, phase, lane,
                )  # fmt: skip
                held = slot
                j += config.warps
                slot += config.warps
                if slot >= config.stages:
                    slot -= config.stages
                    phase = phase ^ 1
        while j < stages:
            self.release(empty, held)
            self.attend(
                True, mCos, mSin, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, rU, rB, rN, turns, unit, cap, start,
                lowest, limit, j, j == mine, slot, phase, lane,
            )  # fmt: skip
            held = slot
            j += config.warps
            slot += config.warps
            if slot >= config.stages:
                slot -= config.stages
                phase = phase ^ 1
        self.release(empty, held)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(taken + buffer)
        self.finish(
            mO, mPartial, mLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, mine < stages, turned, warp, lane
        )
        return count + stages

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

    @cute.jit
    def multiply(self, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """One mma in the format of the expanded codes."""
        if cutlass.const_expr(self.is_half):
            found = mma_f16((a0, a1, a2, a3), b0, b1, (c0, c1, c2, c3))
        else:
            found = mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        return found

    @cute.jit
    def place_of(self, tile: cutlass.Constexpr):
        """Where the `tile`-th 16 tokens of a stage are: bytes to their block's tile, and rows into it."""
        return 16 * tile // self.config.block_size * self.config.tile_bytes, 16 * tile % self.config.block_size

    @cute.jit
    def attend(
        self, is_edge: cutlass.Constexpr, mCos, mSin, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, rU, rB, rN, turns,
        unit, cap, start, lowest, limit, j, is_first, slot, phase, lane,
    ):  # fmt: skip
        """One stage. is_edge: some of its tokens may not be seen."""
        config = self.config
        token0 = start + config.stage_tokens * j
        if cutlass.const_expr(config.has_offset):
            self.turn_back(mCos, mSin, rU, rB, token0, lane)
        cute.arch.mbarrier_wait(full + slot, phase)
        base = (ring + slot * config.stage_bytes).toint()
        may_be_hidden = is_edge and config.has_window and self.steps > 1  # a window may begin behind the first step
        is_still_first = is_first if cutlass.const_expr(may_be_hidden) else Boolean(False)
        for step in cutlass.range_constexpr(self.steps):
            row = lane // 4
            spot = row // 2 + 4 * (row % 2)  # attention_config.row_token
            words = base + 4 * spot
            token = token0 + spot
            if cutlass.const_expr(config.groups == 2):
                bytes_to, rows_to = self.place_of(1)
                is_right = lane % 4 >= 2  # this lane goes on with the second tile
                words = words + ((bytes_to + 4 * rows_to) if is_right else 0)
                token = token + (16 if is_right else 0)
            values = []  # loaded early, unless registers are short
            for h in cutlass.range_constexpr(0 if self.is_wide else config.groups):
                values.append(self.load_values(is_edge, base, config.groups * step + h, lane, token0, lowest, limit))
            scales = []  # of keys and of values, each for this lane's two tokens: (scale, zero point)
            seen = []
            block, first = self.place_of(config.groups * step)
            for r in cutlass.range_constexpr(2):
                position = token + 16 * config.groups * step + 8 * r
                is_seen = Boolean(True)
                if cutlass.const_expr(is_edge):
                    is_seen = position < limit
                    if cutlass.const_expr(config.has_window):
                        is_seen = is_seen and position >= lowest
                seen.append(is_seen)
                of_token = []
                for part in cutlass.range_constexpr(2):
                    if cutlass.const_expr(config.word_bytes):
                        word = load_word(words + block + 4 * (part * config.block_size + first + 8 * r))
                        if cutlass.const_expr(is_edge):
                            word = word if is_seen else Uint32(0)  # what was never written may be NaN
                        of_token.append((from_bits(word << 16), from_bits(word & Uint32(0xFFFF0000))))
                scales.append(of_token)
            rE = cute.make_rmem_tensor((2, 2, config.column_tiles), Float32)  # row, head, column tile
            self.scores(base, step, rQ, rSum, rM, rE, rB, rN, scales, turns, unit, cap, lane)
            if cutlass.const_expr(is_edge):
                for r in cutlass.range_constexpr(2):
                    for c in cutlass.range_constexpr(2):
                        for n in cutlass.range_constexpr(config.column_tiles):
                            rE[r, c, n] = rE[r, c, n] if seen[r] else Float32(-cutlass.Float32.inf)
            rW = cute.make_rmem_tensor((2, 2, config.column_tiles), Float32)
            self.weigh(rE, rW, rM, rL, rZ, rO, scales, is_first if cutlass.const_expr(step == 0) else is_still_first)
            if cutlass.const_expr(may_be_hidden):
                is_still_first = is_still_first and not cute.arch.vote_any_sync(seen[0] or seen[1])
            for h in cutlass.range_constexpr(config.groups if self.is_wide else 0):
                values.append(self.load_values(is_edge, base, config.groups * step + h, lane, token0, lowest, limit))
            self.outputs(values, rW, rO, lane)

    @cute.jit
    def release(self, empty, slot):
        """This warp has read what is in a slot (none if negative)."""
        if slot >= 0:
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + slot)

    @cute.jit
    def scores(self, base, step: cutlass.Constexpr, rQ, rSum, rM, rE, rB, rN, scales, turns, unit, cap, lane):
        """rE[row, head, column tile]: scores less the reference, in units of log2."""
        config = self.config
        row = lane // 4
        spot = row // 2 + 4 * (row % 2)
        is_right = lane % 4 >= 2
        sums = []  # of each tile: of each column tile
        for h in cutlass.range_constexpr(config.groups):
            block, first = self.place_of(config.groups * step + h)
            keys = []
            for r in cutlass.range_constexpr(2):
                address = base + block + self.key_codes + (first + 8 * r + spot) * config.row_bytes
                keys.append(expand(config, load_row(config, address, 4, config.key_words, lane % 4)))
            of_tile = []
            for n in cutlass.range_constexpr(config.column_tiles):
                found = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
                for k in cutlass.range_constexpr(len(keys[0]) // 2):
                    found = self.multiply(
                        keys[0][2 * k], keys[1][2 * k], keys[0][2 * k + 1], keys[1][2 * k + 1],
                        rQ[2 * k, n], rQ[2 * k + 1, n], *found,
                    )  # fmt: skip
                of_column = [found]  # and what the key offset adds
                if cutlass.const_expr(config.has_offset):
                    of_column.append(self.offset_scores(turns, rB, config.groups * step + h, n, lane))
                of_tile.append(of_column)
            sums.append(of_tile)
        for r in cutlass.range_constexpr(2):
            factor = unit
            shift = Float32(0.0)
            if cutlass.const_expr(config.word_bytes):
                factor = unit * scales[r][0][0]
                shift = factor * scales[r][0][1]
            for n in cutlass.range_constexpr(config.column_tiles):
                for c in cutlass.range_constexpr(2):
                    own = [x[2 * r + c] for x in sums[0][n]]
                    if cutlass.const_expr(config.groups == 2):
                        own = [y[2 * r + c] if is_right else x for x, y in zip(own, sums[1][n], strict=True)]
                    rest = -rM[c, n]
                    if cutlass.const_expr(config.has_cap):
                        rest = Float32(0.0)
                    if cutlass.const_expr(self.has_zero):
                        rest = rest - shift * rSum[c, n]
                    score = own[0] * factor + rest
                    if cutlass.const_expr(config.has_offset):
                        score = score + own[1] * rN[c, n]
                    if cutlass.const_expr(config.has_cap):
                        # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends
                        growth = exp2(score * Float32(2.0 * LOG2_E))
                        score = cap * (Float32(1.0) - Float32(2.0) * reciprocal_approx(growth + Float32(1.0)))
                        score = score * Float32(LOG2_E) - rM[c, n]
                    rE[r, c, n] = score

    @cute.jit
    def weigh(self, rE, rW, rM, rL, rZ, rO, scales, is_first):
        """rW: weights, scale_v included; a larger reference where one of them is too large, or there was none."""
        config = self.config
        columns = config.column_tiles
        rP = cute.make_rmem_tensor((2, 2, columns), Float32)
        top = Float32(0.0)
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    rP[r, c, n] = exp2(rE[r, c, n])
                    rW[r, c, n] = rP[r, c, n]
                    if cutlass.const_expr(config.word_bytes):
                        rW[r, c, n] = rP[r, c, n] * scales[r][1][0]
                    top = cute.arch.fmax(top, rW[r, c, n])
        if cute.arch.vote_any_sync(is_first or top > Float32(MOST_WEIGHT)):
            for n in cutlass.range_constexpr(columns):
                for c in cutlass.range_constexpr(2):
                    rise = Float32(LOWEST)
                    for r in cutlass.range_constexpr(2):
                        extra = Float32(0.0)
                        if cutlass.const_expr(config.word_bytes):
                            extra = log2(cute.arch.fmax(scales[r][1][0], Float32(2.0**-126)))
                        rise = cute.arch.fmax(rise, rE[r, c, n] + extra)
                    for offset in (2, 4, 8, 16) if config.groups == 2 else (4, 8, 16):
                        rise = cute.arch.fmax(rise, cute.arch.shuffle_sync_bfly(rise, offset=offset))
                    rise = rise if is_first else cute.arch.fmax(rise, Float32(0.0))
                    if cutlass.const_expr(config.has_window):  # a step of which nothing is seen sets no reference
                        rise = rise if rise > Float32(0.5 * LOWEST) else Float32(0.0)
                    shrink = exp2(-cute.arch.fmax(rise, Float32(0.0)))
                    rM[c, n] = rM[c, n] + rise
                    rL[c, n] = rL[c, n] * shrink
                    rZ[c, n] = rZ[c, n] * shrink
                    for j in cutlass.range_constexpr(config.channel_tiles):
                        rO[c, j, n] = rO[c, j, n] * shrink
                        rO[2 + c, j, n] = rO[2 + c, j, n] * shrink
                    for r in cutlass.range_constexpr(2):
                        rP[r, c, n] = exp2(rE[r, c, n] - rise)
                        rW[r, c, n] = rP[r, c, n]
                        if cutlass.const_expr(config.word_bytes):
                            rW[r, c, n] = rP[r, c, n] * scales[r][1][0]
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    rL[c, n] = rL[c, n] + rP[r, c, n]
                    if cutlass.const_expr(self.has_zero):
                        rZ[c, n] = rZ[c, n] + rW[r, c, n] * scales[r][1][1]

    @cute.jit
    def load_values(self, is_edge: cutlass.Constexpr, base, tile: cutlass.Constexpr, lane, token0, lowest, limit):
        """This lane's words of its four tokens of a tile, in the order of mma's columns."""
        config = self.config
        block, first = self.place_of(tile)
        rows = []
        for q in cutlass.range_constexpr(4):
            spot = lane % 4 + 4 * q
            address = base + block + self.value_codes + (first + spot) * config.row_bytes
            words = load_row(config, address, 8, config.value_words, lane // 4)
            if cutlass.const_expr(is_edge and self.is_float):  # zero weights do not silence NaN
                position = token0 + 16 * tile + spot
                is_seen = position < limit
                if cutlass.const_expr(config.has_window):
                    is_seen = is_seen and position >= lowest
                words = [word if is_seen else Uint32(0) for word in words]
            rows.append(words)
        return rows

    @cute.jit
    def outputs(self, values, rW, rO, lane):
        """rO += V^T p^T of one tile, or of two."""
        config = self.config
        weights = []  # of each column tile: two registers of mma's B
        for n in cutlass.range_constexpr(config.column_tiles):
            both = []
            for r in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.is_half):
                    pair = pack_f16x2(rW[r, 0, n], rW[r, 1, n])
                else:
                    pair = pack_bf16x2(rW[r, 0, n], rW[r, 1, n])
                both.append(transpose_8x8(pair))
            weights.append(both)
        for h in cutlass.range_constexpr(config.groups):
            rows = values[h]
            own = weights
            if cutlass.const_expr(config.groups == 2):  # columns 0 to 3 belong to the first tile, 4 to 7 to the second
                is_left = lane < 16
                if cutlass.const_expr(h == 0):
                    own = [[x if is_left else Uint32(0) for x in both] for both in weights]
                else:
                    own = [[Uint32(0) if is_left else x for x in both] for both in weights]
            for i in cutlass.range_constexpr(config.value_words):
                near = expand_pair(config, rows[0][i], rows[1][i])
                far = expand_pair(config, rows[2][i], rows[3][i])
                for p in cutlass.range_constexpr(config.codes_per_word // 2):
                    j = config.codes_per_word // 2 * i + p
                    for n in cutlass.range_constexpr(config.column_tiles):
                        sums = self.multiply(
                            near[2 * p], near[2 * p + 1], far[2 * p], far[2 * p + 1], own[n][0], own[n][1],
                            rO[0, j, n], rO[1, j, n], rO[2, j, n], rO[3, j, n],
                        )  # fmt: skip
                        for e in cutlass.range_constexpr(4):
                            rO[e, j, n] = sums[e]

    @cute.jit
    def finish(self, mO, mPartial, mLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, is_busy, turned, warp, lane):
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
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)
        quads = config.head_dim // 4
        total = config.queries * quads
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
                    self.store(mO, value, token, head, query, channel)
                else:
                    at = (Int64(place) * config.queries + query) * config.head_dim + channel
                    cute.autovec_copy(value, cute.make_tensor((mPartial.iterator + at).align(16), cute.make_layout(4)))
                    if channel == 0:
                        mLse[place, query] = top + log2(weight)
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)

    @cute.jit
    def store(self, mO, value, token, head, query, channel):
        """Four channels of a head's output, as bfloat16."""
        config = self.config
        at = (Int64(token) * mO.shape[1] + head * config.queries + query) * config.head_dim + channel
        out = cute.make_rmem_tensor((4,), BFloat16)
        out.store(value.load().to(BFloat16))
        cute.autovec_copy(out, cute.make_tensor((mO.iterator + at).align(8), cute.make_layout(4)))

    @cute.jit
    def announce(self, mRow, mSegment, mMerge, mCounter, sPart, first, last, lane):
        """The fetching warp, after its last tile: tells of the CTA's partial results when they are there.

        sPart  of each segment: the number of its row's partial results if all are there now, else 0; first slot, token,
               head
        """
        config = self.config
        for chunk in cutlass.range(first, last, 32, unroll=1):
            index = cutlass.min(chunk + lane, last - 1)
            sequence, head, slot, row = (mSegment[index, i] for i in (0, 1, 4, 5))
            token = mRow[sequence]
            first_slot = Int32(0)
            parts = Int32(0)
            if chunk + lane < last and slot >= 0:
                first_slot, parts = mMerge[row, 2], mMerge[row, 3]
            cute.arch.sync_warp()
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)  # partial results are stored
            if parts > 0:
                before = atomic_increment(mCounter.iterator + row)  # releases what the CTA stored, acquires others'
                if before == parts - 1:
                    mCounter[row] = Int32(0)
                else:
                    parts = Int32(0)
            for i, value in enumerate((parts, first_slot, token, head)):
                sPart[i, lane] = value
            cute.arch.sync_warp()
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)

    @cute.jit
    def merge(self, mO, mPartial, mLse, sPart, first, last, warp, lane):
        """The other warps: the outputs of rows whose last part this CTA was.

        Whichever CTA does it, partial results are added up in the order of a row's parts: the same bits on every run.
        """
        config = self.config
        for chunk in cutlass.range(first, last, 32, unroll=1):
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)
            for i in cutlass.range(cutlass.min(last - chunk, Int32(32)), unroll=1):
                parts, slot, token, head = (sPart[k, i] for k in range(4))
                if parts > 0:
                    self.merge_row(mO, mPartial, mLse, parts, slot, token, head, warp, lane)
            cute.arch.barrier(barrier_id=2, number_of_threads=config.threads)

    @cute.jit
    def merge_row(self, mO, mPartial, mLse, parts, slot, token, head, warp, lane):
        """The output of a split row from all its partial results, MERGED of which are under way at once."""
        config = self.config
        threads = 32 * config.warps
        quads = config.head_dim // 4
        total = config.queries * quads
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
                        part = slot + cutlass.min(begin + i, parts - 1)
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
                self.store(mO, value, token, head, query, channel)


def compile_decode(config: DecodeConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in PagedDecode.__call__, on the current stream."""
    tokens, heads, blocks, kv_heads, seqs, widest, slots = (cute.sym_int() for _ in range(7))
    dim, queries = config.head_dim, config.queries

    def compact(dtype, shape, align):
        order = tuple(range(len(shape) - 1, -1, -1))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    return cute.compile(
        PagedDecode(config),
        compact(Uint32, (tokens, heads, dim // 2), 16),
        compact(Uint8, (blocks, kv_heads, config.tile_bytes), 128),
        compact(Int32, (seqs, widest), 4),
        compact(Int32, (cute.sym_int(),), 4),
        compact(Int32, (cute.sym_int(),), 4),
        compact(Int32, (cute.sym_int(),), 4),
        compact(Int32, (cute.sym_int(), 8), 16),
        compact(Int32, (cute.sym_int(), 4), 16),
        compact(BFloat16, (cute.sym_int(), cute.sym_int(), dim), 16),
        compact(Float32, (slots, queries, dim), 16),
        compact(Float32, (cute.sym_int(), queries), 4),
        compact(Int32, (cute.sym_int(),), 4),
        compact(Uint32, (cute.sym_int(), dim // 2), 4),
        compact(Float32, (cute.sym_int(), dim // 2), 16),
        compact(Float32, (cute.sym_int(), dim // 2), 16),
        compact(Uint32, (cute.sym_int(), dim // 2), 16),
        Float32(1.0),
        Float32(1.0),
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
