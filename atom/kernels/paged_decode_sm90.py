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
from cutlass import BFloat16, Float32, Int32, Uint32, cute

from .attention_config import DecodeConfig
from .decode_fetch_sm90 import META, DecodeFetch
from .decode_frame_sm90 import DecodeFrame, compile_frame, part_arguments, ring_arguments
from .decode_merge_sm90 import DecodeMerge
from .decode_queries_sm90 import DecodeQueries
from .decode_stage_sm90 import LOG2_E, DecodeStage
from .dsl.arguments import row_major


class PagedDecode(DecodeFrame, DecodeFetch, DecodeQueries, DecodeStage, DecodeMerge):
    """The compile-time choices of one kernel; see DecodeConfig for their meaning."""

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
        mCounter: cute.Tensor,  # [slots] int32: partial results that are there, at a row's first; zeros at rest
        mOffset: cute.Tensor,  # [num_kv_heads, head_dim / 2] uint32: key offsets, two bfloat16 each, else any
        mCos: cute.Tensor,  # [positions, head_dim / 2] float32, where there are offsets, else any
        mSin: cute.Tensor,  # the same
        mTurn: cute.Tensor,  # [stage tokens, head_dim / 2] uint32: attention_sm90.turn_matrix, else any
        mNear: cute.Tensor | None,  # [T, num_heads, head_dim] float32: recent_decode_sm90's, where config.recent
        mNearLse: cute.Tensor | None,  # [T, num_heads] float32: as mLse
        scale: Float32,  # of scores; with a cap, scale / cap
        cap: Float32,
        window: Int32,  # less config.recent
        is_early: Int32,  # 1: all but the kernel before has ended (see produce)
        stream: cuda.CUstream,
    ):
        self.kernel(
            mQ, mKV, mTable, mLength, mRow, mWork, mSegment, mO, mPartial, mLse, mCounter, mOffset, mCos, mSin,
            mTurn, mNear, mNearLse, scale, cap, window, is_early,
        ).launch(**self.launch_options(mWork, stream))  # fmt: skip

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mKV: cute.Tensor, mTable: cute.Tensor, mLength: cute.Tensor, mRow: cute.Tensor,
        mWork: cute.Tensor, mSegment: cute.Tensor, mO: cute.Tensor, mPartial: cute.Tensor,
        mLse: cute.Tensor, mCounter: cute.Tensor, mOffset: cute.Tensor, mCos: cute.Tensor, mSin: cute.Tensor,
        mTurn: cute.Tensor, mNear: cute.Tensor | None, mNearLse: cute.Tensor | None, scale: Float32, cap: Float32,
        window: Int32, is_early: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        smem = utils.SmemAllocator()
        full, empty, ready, taken, ring, queries = self.allocate_ring(smem)
        columns = 8 * config.column_tiles
        sMeta = smem.allocate_tensor(Int32, cute.make_layout((META, 2)), byte_alignment=16)
        sPart = smem.allocate_tensor(Int32, cute.make_layout((6, 32)), byte_alignment=16)
        sO = smem.allocate(4 * config.warps * config.queries * config.out_row, 16)
        sM = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        sL = smem.allocate_tensor(Float32, cute.make_layout((columns, config.warps)), byte_alignment=16)
        turns = Int32(0)
        if warp == 0:
            self.start_ring(full, empty, ready, taken, 1)
        if cutlass.const_expr(config.has_offset):
            sTurn = smem.allocate_tensor(Uint32, cute.make_layout(config.turn_bytes // 4), byte_alignment=16)
            self.load_turns(mTurn, sTurn, tid)
            turns = sTurn.iterator.toint()
        first, last = self.work_to_fetch(mWork, cta, is_early, warp)
        if warp == config.warps:
            self.produce(
                mQ, mKV, mTable, mLength, mRow, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last,
                lane,
            )  # fmt: skip
            self.announce(mRow, mSegment, mCounter, sPart, taken, first, last, lane)
        else:
            first, last = self.work_to_compute(mWork, cta, is_early)
            count = Int32(0)  # stages so far: the ring's position
            for index in cutlass.range(first, last, unroll=1):
                count = self.consume(
                    mQ, mO, mPartial, mLse, mOffset, mCos, mSin, mNear, mNearLse, full, empty, ready, taken, ring,
                    queries, sMeta, sO, sM, sL, turns, index - first, count, warp, lane, scale, cap, window,
                )  # fmt: skip
                if index + 2 == last:
                    cute.arch.barrier_arrive(barrier_id=3, number_of_threads=config.threads)
            self.merge(mO, mPartial, mLse, mNear, mNearLse, sPart, first, last, warp, lane)

    @cute.jit
    def consume(
        self, mQ, mO, mPartial, mLse, mOffset, mCos, mSin, mNear, mNearLse, full, empty, ready, taken, ring, queries,
        sMeta, sO, sM, sL, turns, turn, count, warp, lane, scale, cap, window,
    ):  # fmt: skip
        """One of the consuming warps: its share of a segment's stages, then the CTA's result to memory."""
        config = self.config
        columns = config.column_tiles
        buffer = turn % 2
        cute.arch.mbarrier_wait(ready + buffer, turn // 2 % 2)
        head, begin, end, place, length, token = (cute.arch.make_warp_uniform(sMeta[i, buffer]) for i in range(6))
        rQ, rSum, rM, rL, rZ, rO = self.registers()
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
        unit = self.score_unit(unit, scale)
        for rX in (rM, rL, rZ, rO):
            rX.fill(0.0)
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
                slot, phase = self.advance_own(slot, phase)
        while j < stages:
            self.release(empty, held)
            self.attend(
                True, mCos, mSin, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, rU, rB, rN, turns, unit, cap, start,
                lowest, limit, j, j == mine, slot, phase, lane,
            )  # fmt: skip
            held = slot
            j += config.warps
            slot, phase = self.advance_own(slot, phase)
        self.release(empty, held)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(taken + buffer)
        self.finish(
            mO, mPartial, mLse, mNear, mNearLse, sO, sM, sL, rM, rL, rZ, rO, token, head, place, mine < stages, turned,
            warp, lane,
        )  # fmt: skip
        return count + stages


def compile_decode(config: DecodeConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in PagedDecode.__call__, on the current stream."""
    dim = config.head_dim

    arguments = (
        *ring_arguments(config),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(), 8), 16),
        row_major(BFloat16, (cute.sym_int(), cute.sym_int(), dim), 16),
        *part_arguments(config),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Uint32, (cute.sym_int(), dim // 2), 4),
        row_major(Float32, (cute.sym_int(), dim // 2), 16),
        row_major(Float32, (cute.sym_int(), dim // 2), 16),
        row_major(Uint32, (cute.sym_int(), dim // 2), 16),
        row_major(Float32, (cute.sym_int(), cute.sym_int(), dim), 16) if config.recent else None,
        row_major(Float32, (cute.sym_int(), cute.sym_int()), 4) if config.recent else None,
        Float32(1.0),
        Float32(1.0),
        Int32(0),
        Int32(0),
    )
    return compile_frame(PagedDecode(config), arguments, options)
