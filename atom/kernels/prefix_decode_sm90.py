"""Decode attention over a prefix that several sequences share, on Hopper (sm_90a), in CuTe DSL.

It is the decode kernel (paged_decode_sm90.py) with other rows: the query heads of up to 64 / GQA sequences stand side
by side, 16 columns of mma in each computing warp. So every warp takes every stage, and none needs another's results:
sum and output of a segment go to memory as float32 partial results, one for each sequence, which the decode kernel
merges with those of the sequence's own blocks.

What a reader must know: the prefix's blocks are whole and were filled in earlier steps, so all tiles are fetched before
the kernel that appends has ended; only queries wait for it.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, cute

from .attention_config import DecodeConfig
from .decode_fetch_sm90 import DecodeFetch
from .decode_frame_sm90 import DecodeFrame, compile_frame, part_arguments, ring_arguments
from .decode_merge_sm90 import DecodeMerge
from .decode_queries_sm90 import DecodeQueries
from .decode_stage_sm90 import DecodeStage
from .dsl.arguments import row_major
from .dsl.memory import bulk_load, load_f32x4
from .dsl.tensor_core import log2

META = 4  # int32s of a segment that the fetching warp hands on: begin, end, first slot, parts of the row


class PrefixDecode(DecodeFrame, DecodeFetch, DecodeQueries, DecodeStage, DecodeMerge):
    """The compile-time choices of one kernel; see DecodeConfig for their meaning."""

    def __init__(self, config: DecodeConfig) -> None:
        assert config.members and config.groups == 1 and not config.has_window and not config.has_offset
        super().__init__(config)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: turned queries, two bfloat16 each
        mKV: cute.Tensor,  # [num_blocks, num_kv_heads, tile_bytes] uint8
        mTable: cute.Tensor,  # [B, max blocks] int32
        mMember: cute.Tensor,  # [rows, members] int32: which of the T tokens are the members' queries
        mWork: cute.Tensor,  # [CTAs + 1] int32, PrefixPlan.work
        mSegment: cute.Tensor,  # [S, 8] int32, PrefixPlan.segments
        mPartial: cute.Tensor,  # [slots, queries of a sequence, head_dim] float32
        mLse: cute.Tensor,  # [slots, queries of a sequence] float32: log2 of the sum of exponentials
        scale: Float32,  # of scores; with a cap, scale / cap
        cap: Float32,
        is_early: Int32,  # 1: all but the kernel before has ended
        stream: cuda.CUstream,
    ):
        self.kernel(mQ, mKV, mTable, mMember, mWork, mSegment, mPartial, mLse, scale, cap, is_early).launch(
            **self.launch_options(mWork, stream)
        )

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mKV: cute.Tensor, mTable: cute.Tensor, mMember: cute.Tensor, mWork: cute.Tensor,
        mSegment: cute.Tensor, mPartial: cute.Tensor, mLse: cute.Tensor, scale: Float32, cap: Float32, is_early: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        smem = utils.SmemAllocator()
        full, empty, ready, taken, ring, queries = self.allocate_ring(smem)
        sMeta = smem.allocate_tensor(Int32, cute.make_layout((META, 2)), byte_alignment=16)
        sO = smem.allocate(4 * config.warps * config.queries * config.out_row, 16)
        sL = smem.allocate_tensor(Float32, cute.make_layout((16, config.warps)), byte_alignment=16)
        if warp == 0:
            self.start_ring(full, empty, ready, taken, config.warps)
        first, last = self.work_to_fetch(mWork, cta, is_early, warp)
        if warp == config.warps:
            self.produce_shared(
                mQ, mKV, mTable, mMember, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last, lane
            )
        else:
            first, last = self.work_to_compute(mWork, cta, is_early)
            count = Int32(0)  # stages so far: the ring's position
            for index in cutlass.range(first, last, unroll=1):
                count = self.consume_shared(
                    mPartial, mLse, full, empty, ready, taken, ring, queries, sMeta, sO, sL, index - first, count, warp,
                    lane, scale, cap,
                )  # fmt: skip

    @cute.jit
    def produce_shared(
        self, mQ, mKV, mTable, mMember, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last, lane
    ):
        """One warp: the tiles of the CTA's segments into the ring, their members' queries beside them."""
        config = self.config
        ahead = config.stage_blocks
        slot = Int32(0)
        phase = Int32(1)  # of `empty`: what was never filled counts as emptied
        stride = mKV.shape[1] * config.tile_bytes
        has_waited = Int32(0)
        for index in cutlass.range(first, last, unroll=1):
            sequence, head, begin, end, place, row = (mSegment[index, i] for i in range(6))
            parts = mSegment[index, 7]
            turn = index - first
            buffer = turn % 2
            cute.arch.mbarrier_wait(taken + buffer, (turn // 2 + 1) % 2)
            with cute.arch.elect_one():
                for i, value in enumerate((begin, end, place, parts)):
                    sMeta[i, buffer] = value
            origin = mKV.iterator + Int64(head) * config.tile_bytes
            blocks = end - begin
            is_asked = Int32(0)  # for this segment's queries
            for done in cutlass.range(0, blocks, 32, unroll=1):
                here = cutlass.min(blocks - done, Int32(32))
                entry = mTable[sequence, cutlass.min(begin + done + lane, mTable.shape[1] - 1)]
                for i in cutlass.range(0, (here + ahead - 1) // ahead, unroll=1):
                    if has_waited == 0 and (i == config.stages or done > 0):
                        cute.arch.griddepcontrol_wait()
                        has_waited = Int32(1)
                    if has_waited > 0 and is_asked == 0:
                        self.ask(mQ, mMember, ready, queries, head, row, buffer, lane)
                        is_asked = Int32(1)
                    slot, phase = self.fetch(origin, stride, full, empty, ring, entry, ahead * i, here, slot, phase)
            if has_waited == 0:
                cute.arch.griddepcontrol_wait()
                has_waited = Int32(1)
            if is_asked == 0:
                self.ask(mQ, mMember, ready, queries, head, row, buffer, lane)

    @cute.jit
    def ask(self, mQ, mMember, ready, queries, head, row, buffer, lane):
        """The queries of a row's members, each a copy of its own, and word that the segment is there."""
        config = self.config
        cute.arch.sync_warp()
        size = 2 * config.own_queries * config.head_dim
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(ready + buffer, config.query_bytes)
        cute.arch.sync_warp()
        for step in cutlass.range_constexpr((config.members + 31) // 32):
            member = 32 * step + lane
            if member < config.members:
                token = mMember[row, member]
                at = (Int64(token) * mQ.shape[1] + head * config.own_queries) * (config.head_dim // 2)
                bulk_load(
                    queries + buffer * config.query_bytes + member * size, mQ.iterator + at, Int32(size), ready + buffer
                )
        cute.arch.sync_warp()

    @cute.jit
    def consume_shared(
        self, mPartial, mLse, full, empty, ready, taken, ring, queries, sMeta, sO, sL, turn, count, warp, lane, scale,
        cap,
    ):  # fmt: skip
        """One of the computing warps: its sequences' part of a segment, to memory."""
        config = self.config
        buffer = turn % 2
        cute.arch.mbarrier_wait(ready + buffer, turn // 2 % 2)
        begin, end, place, parts = (cute.arch.make_warp_uniform(sMeta[i, buffer]) for i in range(META))
        rQ, rSum, rM, rL, rZ, rO = self.registers()
        own = (queries + buffer * config.query_bytes + warp * (config.query_bytes // config.warps)).toint()
        unit = self.score_unit(self.load_queries(own, rQ, rSum, lane), scale)
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(taken + buffer)
        for rX in (rM, rL, rZ, rO):
            rX.fill(0.0)
        limit = end * config.block_size
        start = begin * config.block_size
        stages = (end - begin + config.stage_blocks - 1) // config.stage_blocks
        whole = (end - begin) // config.stage_blocks
        slot = count % config.stages
        phase = count // config.stages % 2
        held = Int32(-1)  # a slot is released when the next stage begins: see the decode kernel
        for j in cutlass.range(0, stages, unroll=1):
            self.release(empty, held)
            if j < whole:
                self.attend(
                    False, None, None, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, None, None, None, Int32(0), unit,
                    cap, start, Int32(0), limit, j, j == 0, slot, phase, lane,
                )  # fmt: skip
            else:
                self.attend(
                    True, None, None, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, None, None, None, Int32(0), unit,
                    cap, start, Int32(0), limit, j, j == 0, slot, phase, lane,
                )  # fmt: skip
            held = slot
            slot, phase = self.advance(slot, phase)
        self.release(empty, held)
        self.leave(mPartial, mLse, sO, sL, rM, rL, rZ, rO, place, parts, warp, lane)
        return count + stages

    @cute.jit
    def leave(self, mPartial, mLse, sO, sL, rM, rL, rZ, rO, place, parts, warp, lane):
        """A warp's partial results to memory: through shared memory, so that whole lines are written."""
        config = self.config
        sharer = lane % 4
        heads = config.own_queries
        first = warp * (config.members // config.warps)  # member
        for n in cutlass.range_constexpr(config.column_tiles):
            for c in cutlass.range_constexpr(2):
                for offset in (4, 8, 16):
                    rL[c, n] = rL[c, n] + cute.arch.shuffle_sync_bfly(rL[c, n], offset=offset)
                    rZ[c, n] = rZ[c, n] + cute.arch.shuffle_sync_bfly(rZ[c, n], offset=offset)
                query = 8 * n + 2 * sharer + c
                if query < config.queries:
                    if lane < 4:
                        sL[query, warp] = Float32(1.0) / rL[c, n]
                        slot = place + (first + query // heads) * parts
                        mLse[slot, query % heads] = rM[c, n] + log2(rL[c, n])
                    row = sO.toint() + 4 * (warp * config.queries + query) * config.out_row
                    self.spread(row, rO, rZ, c, n, lane)
        cute.arch.sync_warp()
        quads = config.head_dim // 4
        total = config.queries * quads
        for step in cutlass.range_constexpr((total + 31) // 32):
            item = 32 * step + lane
            if item < total:
                query = item // quads
                channel = item % quads * 4
                found = load_f32x4(sO.toint() + 4 * ((warp * config.queries + query) * config.out_row + channel))
                value = cute.make_rmem_tensor((4,), Float32)
                for e in cutlass.range_constexpr(4):
                    value[e] = found[e] * sL[query, warp]
                slot = place + (first + query // heads) * parts
                at = (Int64(slot) * heads + query % heads) * config.head_dim + channel
                cute.autovec_copy(value, cute.make_tensor((mPartial.iterator + at).align(16), cute.make_layout(4)))
        cute.arch.sync_warp()


def compile_prefix(config: DecodeConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in PrefixDecode.__call__, on the current stream."""
    arguments = (
        *ring_arguments(config),
        row_major(Int32, (cute.sym_int(), config.members), 4),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(), 8), 16),
        *part_arguments(config),
        Float32(1.0),
        Float32(1.0),
        Int32(0),
    )
    return compile_frame(PrefixDecode(config), arguments, options)
