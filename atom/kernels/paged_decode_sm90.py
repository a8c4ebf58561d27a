"""Decode attention over a paged, quantized cache on Hopper (sm_90a), in CuTe DSL: one query token a sequence.

A CTA works through the segments that the plan (attention_plan.py) gives it: parts of a sequence for one KV head and its
query heads. One warp streams tiles (kv_layout.py: one bulk copy each) into a ring of shared-memory stages; each other
warp takes every `warps`-th stage and keeps maximum, sum and output of its own, put together at the segment's end.

What a reader must know: both products stand on their heads, scores as K q^T and outputs as V^T p^T, so that eight query
heads fill mma's columns and 16 tokens or channels its rows. Codes become bfloat16 by bit work that leaves a known
constant on them (128 for INT4); constant and zero point come off afterwards, with the sum of the query's channels
(scores) and of the rounded weights (outputs), so scales never touch the inner loop:

    s_j = scale_k,j * (q . codes_j - (zero_k,j + 128) * sum(q))
    o   = sum_j w_j codes_j - sum_j w_j (zero_v,j + 128),   w_j = bfloat16(p_j * scale_v,j)
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from .attention_config import DecodeConfig
from .decode_codes_sm90 import BIAS, expand, expand_pair, load_row
from .decode_offset_sm90 import KeyOffset
from .dsl.arithmetic import from_bits
from .dsl.memory import bulk_load, pack_bf16x2
from .dsl.tensor_core import exp2, load_word, log2, mma_bf16, reciprocal_approx, transpose_8x8

LOWEST = -1.0e30  # a maximum before the first score: finite, so that differences are numbers
LOG2_E = 1.4426950408889634


class PagedDecode(KeyOffset):
    """The compile-time choices of one kernel; see DecodeConfig for their meaning."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.has_zero = config.kv in ("int4", "int8")
        self.is_float = config.kv in ("fp8_e4m3", "bf16")  # codes that may be NaN
        self.tiles = config.stage_tokens // 16
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
        mO: cute.Tensor,  # [T, num_heads, head_dim] bfloat16
        mPartial: cute.Tensor,  # [slots, queries, head_dim] float32
        mLse: cute.Tensor,  # [slots, queries] float32: log2 of the sum of exponentials
        mOffset: cute.Tensor,  # [num_kv_heads, head_dim / 2] uint32: key offsets, two bfloat16 each, else any
        mCos: cute.Tensor,  # [positions, head_dim / 2] float32, where there are offsets, else any
        mSin: cute.Tensor,  # the same
        mTurn: cute.Tensor,  # [stage tokens, head_dim / 2] uint32: attention_sm90.turn_matrix, else any
        scale: Float32,  # of scores; with a cap, scale / cap
        cap: Float32,
        window: Int32,
        stream: cuda.CUstream,
    ):
        self.kernel(
            mQ, mKV, mTable, mLength, mRow, mWork, mSegment, mO, mPartial, mLse, mOffset, mCos, mSin, mTurn, scale, cap,
            window,
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
        mWork: cute.Tensor, mSegment: cute.Tensor, mO: cute.Tensor, mPartial: cute.Tensor, mLse: cute.Tensor,
        mOffset: cute.Tensor, mCos: cute.Tensor, mSin: cute.Tensor, mTurn: cute.Tensor, scale: Float32, cap: Float32,
        window: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        smem = utils.SmemAllocator()
        full = smem.allocate_array(Int64, config.stages)
        empty = smem.allocate_array(Int64, config.stages)
        ring = smem.allocate(config.stages * config.stage_bytes, 128)
        columns = 8 * config.column_tiles
        sO = smem.allocate_tensor(
            Float32, cute.make_layout((config.head_dim, config.queries, config.warps)), byte_alignment=16
        )
        sM = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        sL = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        turns = Int32(0)
        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(config.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(config.has_offset):
            sTurn = smem.allocate_tensor(Uint32, cute.make_layout(config.turn_bytes // 4), byte_alignment=16)
            self.load_turns(mTurn, sTurn, tid)
            turns = sTurn.iterator.toint()
        cute.arch.sync_threads()
        first = mWork[cta]
        last = mWork[cta + 1]
        count = Int32(0)  # stages so far: the ring's position
        if warp == config.warps:
            for index in cutlass.range(first, last, unroll=1):
                count = self.produce(mKV, mTable, mSegment, full, empty, ring, index, count, lane)
        else:
            for index in cutlass.range(first, last, unroll=1):
                count = self.consume(
                    mQ, mLength, mRow, mSegment, mO, mPartial, mLse, mOffset, mCos, mSin, full, empty, ring, sO, sM,
                    sL, turns, index, count, warp, lane, scale, cap, window,
                )  # fmt: skip

    @cute.jit
    def produce(self, mKV, mTable, mSegment, full, empty, ring, index, count, lane):
        """One warp: the tiles of a segment into the ring. Returns the ring's position after it."""
        config = self.config
        sequence, head, begin, end = (mSegment[index, i] for i in range(4))
        blocks = end - begin
        for chunk in cutlass.range((blocks + 31) // 32, unroll=1):
            done = 32 * chunk
            entry = mTable[sequence, cutlass.min(begin + done + lane, end - 1)]  # 32 blocks of the table at a time
            here = cutlass.min(blocks - done, Int32(32))
            for i in cutlass.range((here + config.stage_blocks - 1) // config.stage_blocks, unroll=1):
                slot = count & (config.stages - 1)
                phase = (count // config.stages) & 1
                present = cutlass.min(here - config.stage_blocks * i, Int32(config.stage_blocks))
                cute.arch.mbarrier_wait(empty + slot, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + slot, present * config.tile_bytes)
                for k in cutlass.range_constexpr(config.stage_blocks):
                    block = cute.arch.shuffle_sync(entry, config.stage_blocks * i + k)
                    if k < present:
                        at = (Int64(block) * mKV.shape[1] + head) * config.tile_bytes
                        with cute.arch.elect_one():
                            target = ring + (slot * config.stage_bytes + k * config.tile_bytes)
                            bulk_load(target, mKV.iterator + at, Int32(config.tile_bytes), full + slot)
                count += 1
        return count

    @cute.jit
    def consume(
        self, mQ, mLength, mRow, mSegment, mO, mPartial, mLse, mOffset, mCos, mSin, full, empty, ring, sO, sM, sL,
        turns, index, count, warp, lane, scale, cap, window,
    ):  # fmt: skip
        """One of the consuming warps: its share of a segment's stages, then the CTA's result to memory."""
        config = self.config
        columns = config.column_tiles
        sequence, head, begin, end, place = (mSegment[index, i] for i in range(5))
        length = mLength[sequence]
        token = mRow[sequence]
        lowest = Int32(0)
        if cutlass.const_expr(config.has_window):
            lowest = cutlass.max(length - window, Int32(0))
        limit = cutlass.min(length, end * config.block_size)
        stages = (end - begin + config.stage_blocks - 1) // config.stage_blocks

        pairs = config.key_words * config.codes_per_word // 2
        rQ = cute.make_rmem_tensor((pairs, columns), Uint32)
        rSum = cute.make_rmem_tensor((2, columns), Float32)  # of the channels of this lane's two query heads
        rM = cute.make_rmem_tensor((2, columns), Float32)
        rL = cute.make_rmem_tensor((2, columns), Float32)
        rZ = cute.make_rmem_tensor((2, columns), Float32)  # what zero points and the constant add to the outputs
        rO = cute.make_rmem_tensor((4, config.channel_tiles, columns), Float32)
        rS = cute.make_rmem_tensor((2, 2, self.tiles, columns), Float32)  # head, row, 16 tokens, column tile
        self.load_queries(mQ, rQ, rSum, token, head, lane)
        rB = None  # the key offset's part: what a stage multiplies, and the factor of the sums
        rN = None
        if cutlass.const_expr(config.has_offset):
            rU = cute.make_rmem_tensor((2, 2, config.head_dim // 16, columns), Float32)
            rB = cute.make_rmem_tensor((2, config.head_dim // 16, columns), Uint32)
            rN = cute.make_rmem_tensor((2, columns), Float32)
            rB.fill(0)
            self.load_offsets(mQ, mOffset, rU, rN, token, head, lane, scale)
        rM.fill(LOWEST)
        rL.fill(0.0)
        rZ.fill(0.0)
        rO.fill(0.0)
        rS.fill(0.0)
        for j in cutlass.range(warp, stages, config.warps, unroll=1):
            position = count + j
            slot = position & (config.stages - 1)
            token0 = (begin + config.stage_blocks * j) * config.block_size
            if cutlass.const_expr(config.has_offset):
                self.turn_back(mCos, mSin, rU, rB, token0, lane)
            cute.arch.mbarrier_wait(full + slot, (position // config.stages) & 1)
            base = (ring + slot * config.stage_bytes).toint()
            self.scores(base, rQ, rSum, rS, rB, rN, turns, lane, token0, lowest, limit, scale, cap)
            self.weigh(rS, rM, rL, rZ, rO)
            self.outputs(base, rS, rZ, rO, lane, token0, lowest, limit)
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + slot)
        self.finish(mO, mPartial, mLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, warp, lane)
        return count + stages

    @cute.jit
    def load_queries(self, mQ, rQ, rSum, token, head, lane):
        """This lane's columns of q in the order in which keys are expanded, zero beyond the heads and the channels."""
        config = self.config
        per_word = config.codes_per_word
        sharer = lane % 4
        for n in cutlass.range_constexpr(config.column_tiles):
            query = 8 * n + lane // 4
            total = Float32(0.0)
            for i in cutlass.range_constexpr(config.key_words):
                if cutlass.const_expr(config.row_words % 4 == 0):
                    word = config.key_words * sharer + i
                else:
                    word = 4 * i + sharer
                for p in cutlass.range_constexpr(per_word // 2):
                    low = Uint32(0)
                    high = Uint32(0)
                    is_there = Boolean(query < config.queries)
                    if cutlass.const_expr(config.row_words % 4 != 0):
                        is_there = is_there and word < config.row_words
                    if cutlass.const_expr(config.kv == "int4"):  # pairs (p, p + 4)
                        if is_there:
                            at = head * config.queries + query
                            low = mQ[token, at, 4 * word + p // 2]
                            high = mQ[token, at, 4 * word + 2 + p // 2]
                        if cutlass.const_expr(p % 2 == 0):
                            pair = (low & Uint32(0xFFFF)) | (high << 16)
                        else:
                            pair = (low >> 16) | (high & Uint32(0xFFFF0000))
                    else:
                        if is_there:
                            low = mQ[token, head * config.queries + query, per_word // 2 * word + p]
                        pair = low
                    rQ[per_word // 2 * i + p, n] = pair
                    total = total + from_bits(pair << 16) + from_bits(pair & Uint32(0xFFFF0000))
            if cutlass.const_expr(self.has_zero):
                for offset in (1, 2):
                    total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
                for c in cutlass.range_constexpr(2):
                    rSum[c, n] = cute.arch.shuffle_sync(total, 8 * sharer + 4 * c)

    @cute.jit
    def scores(self, base, rQ, rSum, rS, rB, rN, turns, lane, token0, lowest, limit, scale, cap):
        """rS[head, row, tile, column tile]: scores in units of log2, minus infinity where a token is not seen."""
        config = self.config
        row = lane // 4
        spot = row // 2 + 4 * (row % 2)  # attention_config.row_token
        for tile in cutlass.range_constexpr(self.tiles):
            block = base + 16 * tile // config.block_size * config.tile_bytes
            first = 16 * tile % config.block_size
            keys = []
            for r in cutlass.range_constexpr(2):
                address = block + self.key_codes + (first + 8 * r + spot) * config.row_bytes
                keys.append(expand(config, load_row(config, address, 4, config.key_words, lane % 4)))
            for n in cutlass.range_constexpr(config.column_tiles):
                sums = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
                for k in cutlass.range_constexpr(len(keys[0]) // 2):
                    sums = mma_bf16(
                        keys[0][2 * k], keys[1][2 * k], keys[0][2 * k + 1], keys[1][2 * k + 1],
                        rQ[2 * k, n], rQ[2 * k + 1, n], *sums,
                    )  # fmt: skip
                for r in cutlass.range_constexpr(2):
                    for c in cutlass.range_constexpr(2):
                        rS[c, r, tile, n] = sums[2 * r + c]
            common = []
            if cutlass.const_expr(config.has_offset):
                for n in cutlass.range_constexpr(config.column_tiles):
                    common.append(self.offset_scores(turns, rB, tile, n, lane))
            for r in cutlass.range_constexpr(2):
                factor = scale
                shift = Float32(0.0)
                if cutlass.const_expr(config.word_bytes):
                    word = load_word(block + 4 * (first + 8 * r + spot))
                    factor = scale * from_bits(word << 16)
                    shift = from_bits(word & Uint32(0xFFFF0000)) + Float32(BIAS[config.kv])
                position = token0 + 16 * tile + 8 * r + spot
                is_seen = position < limit
                if cutlass.const_expr(config.has_window):
                    is_seen = is_seen and position >= lowest
                for n in cutlass.range_constexpr(config.column_tiles):
                    for c in cutlass.range_constexpr(2):
                        score = rS[c, r, tile, n]
                        if cutlass.const_expr(self.has_zero):
                            score = score - shift * rSum[c, n]
                        score = score * factor
                        if cutlass.const_expr(config.has_offset):
                            score = score + common[n][2 * r + c] * rN[c, n]
                        if cutlass.const_expr(config.has_cap):
                            # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends
                            growth = exp2(score * Float32(2.0 * LOG2_E))
                            score = cap * (Float32(1.0) - Float32(2.0) * reciprocal_approx(growth + Float32(1.0)))
                        score = score * Float32(LOG2_E)
                        rS[c, r, tile, n] = score if is_seen else Float32(-cutlass.Float32.inf)

    @cute.jit
    def weigh(self, rS, rM, rL, rZ, rO):
        """Scores to exp2(score - maximum); what was added up before is rescaled where the maximum rose."""
        config = self.config
        columns = config.column_tiles
        top = cute.make_rmem_tensor((2, columns), Float32)
        rises = Boolean(False)
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                best = rM[c, n]
                for tile in cutlass.range_constexpr(self.tiles):
                    for r in cutlass.range_constexpr(2):
                        best = cute.arch.fmax(best, rS[c, r, tile, n])
                for offset in (4, 8, 16):
                    best = cute.arch.fmax(best, cute.arch.shuffle_sync_bfly(best, offset=offset))
                top[c, n] = best
                rises = rises or best > rM[c, n]
        if cute.arch.vote_any_sync(rises):
            for n in cutlass.range_constexpr(columns):
                for c in cutlass.range_constexpr(2):
                    shrink = exp2(rM[c, n] - top[c, n])
                    rM[c, n] = top[c, n]
                    rL[c, n] = rL[c, n] * shrink
                    rZ[c, n] = rZ[c, n] * shrink
                    for j in cutlass.range_constexpr(config.channel_tiles):
                        rO[c, j, n] = rO[c, j, n] * shrink
                        rO[2 + c, j, n] = rO[2 + c, j, n] * shrink
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                for tile in cutlass.range_constexpr(self.tiles):
                    for r in cutlass.range_constexpr(2):
                        weight = exp2(rS[c, r, tile, n] - rM[c, n])
                        rL[c, n] = rL[c, n] + weight
                        rS[c, r, tile, n] = weight

    @cute.jit
    def outputs(self, base, rS, rZ, rO, lane, token0, lowest, limit):
        """rO += V^T p^T of one stage."""
        config = self.config
        row = lane // 4
        spot = row // 2 + 4 * (row % 2)
        for tile in cutlass.range_constexpr(self.tiles):
            block = base + 16 * tile // config.block_size * config.tile_bytes
            first = 16 * tile % config.block_size
            weights = [[] for _ in range(config.column_tiles)]  # of each column tile: two registers of mma's B
            for r in cutlass.range_constexpr(2):
                factor = Float32(1.0)
                shift = Float32(0.0)
                if cutlass.const_expr(config.word_bytes):
                    word = load_word(block + 4 * (config.block_size + first + 8 * r + spot))
                    position = token0 + 16 * tile + 8 * r + spot
                    is_seen = position < limit
                    if cutlass.const_expr(config.has_window):
                        is_seen = is_seen and position >= lowest
                    word = word if is_seen else Uint32(0)  # what was never written may be NaN
                    factor = from_bits(word << 16)
                    shift = from_bits(word & Uint32(0xFFFF0000)) + Float32(BIAS[config.kv])
                for n in cutlass.range_constexpr(config.column_tiles):
                    pair = pack_bf16x2(rS[0, r, tile, n] * factor, rS[1, r, tile, n] * factor)
                    if cutlass.const_expr(self.has_zero):
                        rZ[0, n] = rZ[0, n] + from_bits(pair << 16) * shift
                        rZ[1, n] = rZ[1, n] + from_bits(pair & Uint32(0xFFFF0000)) * shift
                    weights[n].append(transpose_8x8(pair))
            rows = []  # this lane's words of its four tokens, in the order of mma's columns
            for q in cutlass.range_constexpr(4):
                spot_v = lane % 4 + 4 * q
                address = block + self.value_codes + (first + spot_v) * config.row_bytes
                words = load_row(config, address, 8, config.value_words, lane // 4)
                if cutlass.const_expr(self.is_float):  # zero weights do not silence NaN
                    position = token0 + 16 * tile + spot_v
                    is_seen = position < limit
                    if cutlass.const_expr(config.has_window):
                        is_seen = is_seen and position >= lowest
                    words = [word if is_seen else Uint32(0) for word in words]
                rows.append(words)
            for i in cutlass.range_constexpr(config.value_words):
                near = expand_pair(config, rows[0][i], rows[1][i])
                far = expand_pair(config, rows[2][i], rows[3][i])
                for p in cutlass.range_constexpr(config.codes_per_word // 2):
                    j = config.codes_per_word // 2 * i + p
                    for n in cutlass.range_constexpr(config.column_tiles):
                        sums = mma_bf16(
                            near[2 * p], near[2 * p + 1], far[2 * p], far[2 * p + 1], weights[n][0], weights[n][1],
                            rO[0, j, n], rO[1, j, n], rO[2, j, n], rO[3, j, n],
                        )  # fmt: skip
                        for e in cutlass.range_constexpr(4):
                            rO[e, j, n] = sums[e]

    @cute.jit
    def finish(self, mO, mPartial, mLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, warp, lane):
        """Put the warps' results together, in the order of the warps, and store output or partial result."""
        config = self.config
        threads = 32 * config.warps
        sharer = lane % 4
        for n in cutlass.range_constexpr(config.column_tiles):
            for c in cutlass.range_constexpr(2):
                for offset in (4, 8, 16):
                    rL[c, n] = rL[c, n] + cute.arch.shuffle_sync_bfly(rL[c, n], offset=offset)
                    rZ[c, n] = rZ[c, n] + cute.arch.shuffle_sync_bfly(rZ[c, n], offset=offset)
                query = 8 * n + 2 * sharer + c
                if lane < 4:
                    sM[query, warp] = rM[c, n]
                    sL[query, warp] = rL[c, n]
                if query < config.queries:
                    for i in cutlass.range_constexpr(config.value_words):
                        if cutlass.const_expr(config.row_words % 8 == 0):
                            word = config.value_words * (lane // 4) + i
                        else:
                            word = 8 * i + lane // 4
                        for p in cutlass.range_constexpr(config.codes_per_word // 2):
                            j = config.codes_per_word // 2 * i + p
                            channel = config.codes_per_word * word + 2 * p
                            if channel < config.head_dim:
                                sO[channel, query, warp] = rO[c, j, n] - rZ[c, n]
                                sO[channel + 1, query, warp] = rO[2 + c, j, n] - rZ[c, n]
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
                for w in cutlass.range_constexpr(config.warps):
                    share = exp2(sM[query, w] - top)
                    weight = weight + share * sL[query, w]
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] + share * sO[channel + e, query, w]
                inverse = Float32(1.0) / weight
                for e in cutlass.range_constexpr(4):
                    value[e] = value[e] * inverse
                if place < 0:
                    at = (Int64(token) * mO.shape[1] + head * config.queries + query) * config.head_dim + channel
                    out = cute.make_rmem_tensor((4,), BFloat16)
                    out.store(value.load().to(BFloat16))
                    cute.autovec_copy(out, cute.make_tensor((mO.iterator + at).align(8), cute.make_layout(4)))
                else:
                    at = (Int64(place) * config.queries + query) * config.head_dim + channel
                    cute.autovec_copy(value, cute.make_tensor((mPartial.iterator + at).align(16), cute.make_layout(4)))
                    if channel == 0:
                        mLse[place, query] = top + log2(weight)
        cute.arch.barrier(barrier_id=1, number_of_threads=threads)


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
        compact(BFloat16, (cute.sym_int(), cute.sym_int(), dim), 16),
        compact(Float32, (slots, queries, dim), 16),
        compact(Float32, (cute.sym_int(), queries), 4),
        compact(Uint32, (cute.sym_int(), dim // 2), 4),
        compact(Float32, (cute.sym_int(), dim // 2), 16),
        compact(Float32, (cute.sym_int(), dim // 2), 16),
        compact(Uint32, (cute.sym_int(), dim // 2), 16),
        Float32(1.0),
        Float32(1.0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
