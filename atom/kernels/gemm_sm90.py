"""Low-bit GEMM on Hopper (sm_90a), written in CuTe DSL: y[M, N] = x[M, K] @ w[N, K].T.

One kernel for every packed weight format. The operands are swapped: weights stand on the 64-row side of wgmma and
come from registers, tokens are wgmma's N. A producer warp streams *units* of packed weights (64 rows x 128 columns
of INT4, or x 64 columns of INT8: the same number of bytes, `gemm_pack.py`) and tiles of activation codes through
shared memory; each consumer warpgroup decodes the units of its own 64 rows.

What a reader must know: `scales="group"` promotes the integer sum of every unit to float32 (weight scale x token
scale); `scales="channel"` multiplies the INT4 code by an integer group scale while decoding, so that the whole sum
over K stays one INT32 and there is nothing to promote. A cluster of `split` CTAs shares one output tile along K and
adds its partial sums in rank order through distributed shared memory: the same bits on every run.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int8, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync
from cutlass.cute.nvgpu import warpgroup as wg
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from .dsl.memory import bulk_load, load_global_f32x4, load_u32x4, pack_bf16x2, store_matrix_transposed
from .gemm_config import UNIT_BYTES, GemmConfig
from .gemm_pack import CODE_BYTES


class PackedWeightGemm:
    """The compile-time choices of one kernel; see GemmConfig for their meaning."""

    def __init__(self, config: GemmConfig) -> None:
        self.config = config
        self.integer = config.scales == "channel"  # one INT32 sum over all of K
        self.tile_m = config.tile_m
        self.rows = 64 * config.warpgroups
        self.consumers = 128 * config.warpgroups
        self.threads = self.consumers + (128 if config.registers else 32)  # one warp produces, alone or in a warpgroup
        self.unit_words = UNIT_BYTES // 4
        self.cluster = config.split * config.multicast
        self.x_bytes = self.tile_m * 128
        self.w_bytes = UNIT_BYTES * config.warpgroups

    def tiled_mma(self) -> cute.TiledMma:
        """INT8 wgmma, 64 x tile_m, A from registers. Built where it is used: its accumulate flag is traced state."""
        major = OperandMajorMode.K
        shape = (64, self.tile_m)
        return sm90.make_trivial_tiled_mma(Int8, Int8, major, major, Int32, (1, 1, 1), shape, wg.OperandSource.RMEM)

    @cute.jit
    def __call__(
        self,
        mW: cute.Tensor,  # [row tiles, units, unit bytes / 4] uint32
        mX: cute.Tensor,  # [M, padded K] int8
        mS: cute.Tensor,  # float32: [units, padded M] (token scales by group) or [1, M]
        mC: cute.Tensor,  # [N] float32 channel scales (scales="channel")
        mB: cute.Tensor,  # [N] bfloat16 bias
        mY: cute.Tensor,  # [M, N] bfloat16
        mE: cute.Tensor,  # float32 scratch: CTAs x tile_m x 64 x warpgroups where K is split, else any
        int4_units: Int32,
        max_ctas: Int32,  # how many CTAs the GPU holds at once
        stream: cuda.CUstream,
    ):
        config = self.config
        atom = wg.make_smem_layout_atom(wg.SmemLayoutAtomKind.K_SW128, Int8)
        x_layout = cute.tile_to_shape(atom, (self.tile_m, 128, config.stages), order=(0, 1, 2))
        if cutlass.const_expr(config.multicast > 1):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
        x_atom, x_tensor = cpasync.make_tiled_tma_atom(
            op,
            mX,
            cute.slice_(x_layout, (None, None, 0)),
            (self.tile_m, 128),
            num_multicast=config.multicast,
        )
        row_groups = cute.ceil_div(mY.shape[1], self.rows * config.multicast)
        token_tiles = cute.ceil_div(mY.shape[0], self.tile_m)
        clusters = row_groups * token_tiles
        if cutlass.const_expr(config.split == 1):
            clusters = cutlass.min(clusters, max_ctas // self.cluster)
        self.kernel(
            x_atom, x_tensor, x_layout, mW, mS, mC, mB, mY, mE, int4_units, row_groups, token_tiles
        ).launch(
            grid=(clusters * self.cluster, 1, 1),
            block=(self.threads, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=config.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        x_atom: cute.CopyAtom,
        mX: cute.Tensor,
        x_layout: cute.ComposedLayout,
        mW: cute.Tensor,
        mS: cute.Tensor,
        mC: cute.Tensor,
        mB: cute.Tensor,
        mY: cute.Tensor,
        mE: cute.Tensor,
        int4_units: Int32,
        row_groups: Int32,
        token_tiles: Int32,
    ):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        bx, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(tid // 32)
        rank = bx % self.cluster
        split_rank = rank if cutlass.const_expr(config.split > 1) else Int32(0)
        units = mW.shape[1]
        begin = units * split_rank // config.split
        end = units * (split_rank + 1) // config.split
        work = bx // self.cluster  # of row_groups * token_tiles, then every `stride`-th
        stride = blocks // self.cluster
        total = row_groups * token_tiles

        smem = utils.SmemAllocator()
        full = smem.allocate_array(Int64, config.stages)
        empty = smem.allocate_array(Int64, config.stages)
        pool = smem.allocate(config.pool_bytes, 1024)
        sX = cute.make_tensor(cute.recast_ptr(pool, x_layout.inner, Int8), x_layout.outer)
        w_words = cute.recast_ptr(pool + self.x_bytes * config.stages, dtype=Uint32)
        sW = cute.make_tensor(w_words, cute.make_layout((self.unit_words, config.warpgroups, config.stages)))
        s_words = cute.recast_ptr(pool + (self.x_bytes + self.w_bytes) * config.stages, dtype=Float32)
        sS = cute.make_tensor(s_words, cute.make_layout((self.tile_m, config.stages)))

        if warp == 0:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(config.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 4 * config.warpgroups * config.multicast)
            cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()
        if cutlass.const_expr(config.pdl):
            cute.arch.griddepcontrol_launch_dependents()

        if warp >= 4 * config.warpgroups:
            if cutlass.const_expr(config.registers):
                cute.arch.setmaxregister_decrease(24)
            if warp == 4 * config.warpgroups:
                stage = Int32(0)
                phase = Int32(1)
                first = Int32(1)
                for item in cutlass.range(work, total, stride, unroll=1):
                    row_tile, token0 = self.place(item, row_groups, token_tiles, rank)
                    stage, phase = self.produce(
                        x_atom, mX, sX, mW, sW, mS, sS, full, empty, rank, row_tile, token0, begin, end, int4_units,
                        stage, phase, first,
                    )  # fmt: skip
                    first = Int32(0)
            self.cluster_sync(self.cluster)
        else:
            if cutlass.const_expr(config.registers):
                cute.arch.setmaxregister_increase(config.registers)
            thread = tid % 128
            group = cute.arch.make_warp_uniform(tid // 128)
            acc_shape = self.tiled_mma().partition_shape_C((64, self.tile_m))
            acc = cute.make_rmem_tensor(acc_shape, Int32)
            out = cute.make_rmem_tensor(acc_shape, Float32)
            stage = Int32(0)
            phase = Int32(0)
            first = Int32(1)
            for item in cutlass.range(work, total, stride, unroll=1):
                row_tile, token0 = self.place(item, row_groups, token_tiles, rank)
                if cutlass.const_expr(self.integer):
                    acc.fill(0)
                else:
                    out.fill(0.0)
                stage, phase = self.consume(
                    sX, sW, sS, acc, out, full, empty, thread, group, begin, end, int4_units, stage, phase
                )
                if cutlass.const_expr(config.pdl):
                    if first == 1:
                        cute.arch.griddepcontrol_wait()
                        first = Int32(0)
                low = token0
                high = cutlass.min(token0 + self.tile_m, mY.shape[0])
                if cutlass.const_expr(config.split > 1):
                    share = self.exchange(mE, acc, out, tid, split_rank, high - token0)
                    low = token0 + split_rank * share
                    high = cutlass.min(low + share, high)
                self.store(pool, acc, out, mS, mC, mB, mY, thread, group, row_tile, token0, low, high)
            if cutlass.const_expr(config.multicast > 1):
                self.cluster_sync(self.cluster)  # peers may still write to or signal this CTA's shared memory

    @cute.jit
    def place(self, item, row_groups, token_tiles, rank):
        """Work item to (row tile, first token): 8 token tiles run side by side, so that both operands stay in L2."""
        per = 8 * row_groups
        block = item // per
        width = cutlass.min(token_tiles - 8 * block, Int32(8))
        local = item - block * per
        row_tile = local // width
        if cutlass.const_expr(self.config.multicast > 1):
            row_tile = row_tile * self.config.multicast + rank
        return row_tile, (8 * block + local % width) * self.tile_m

    @cute.jit
    def cluster_sync(self, ctas: cutlass.Constexpr):
        if cutlass.const_expr(ctas > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def produce(
        self, x_atom, mX, sX, mW, sW, mS, sS, full, empty, rank, row_tile, token0, begin, end, int4_units,
        stage, phase, first,
    ):  # fmt: skip
        """One warp: weights, activation codes and token scales of units begin .. end into the ring of stages."""
        config = self.config
        last_tile = mW.shape[0] - 1
        scale_bytes = Int32(0)
        if cutlass.const_expr(config.token_scales == "group"):
            scale_bytes = cutlass.min(Int32(self.tile_m), mS.shape[1] - token0) * 4
        # 64-column steps: an INT8 unit starts on any of them, an INT4 unit on every second
        box = cute.domain_offset((token0, 0), mX)
        gX = cute.local_tile(box, (self.tile_m, 128), (0, None))
        half = cute.local_tile(cute.domain_offset((0, 64), box), (self.tile_m, 128), (0, None))
        x_cta = rank % config.multicast
        x_ctas = cute.make_layout(config.multicast)
        s_group = cute.group_modes(sX, 0, 2)
        tXsX, tXgX = cpasync.tma_partition(x_atom, x_cta, x_ctas, s_group, cute.group_modes(gX, 0, 2))
        _, tXgH = cpasync.tma_partition(x_atom, x_cta, x_ctas, s_group, cute.group_modes(half, 0, 2))
        mask = cutlass.Int16((1 << config.multicast) - 1)

        count = end - begin
        early = cutlass.min(count, Int32(config.stages)) * first
        # weights never depend on the kernel before this one: fetch them before waiting for it (PDL)
        for i in cutlass.range(early, unroll=1):
            self.load_weights(mW, sW, full, row_tile, last_tile, begin + i, i, scale_bytes)
        if cutlass.const_expr(config.pdl):
            if first == 1:
                cute.arch.griddepcontrol_wait()
        for i in cutlass.range(count, unroll=1):
            unit = begin + i
            if i >= early:
                cute.arch.mbarrier_wait(empty + stage, phase)
                self.load_weights(mW, sW, full, row_tile, last_tile, unit, stage, scale_bytes)
            step = 2 * unit if unit < int4_units else int4_units + unit
            if step % 2 == 0:
                self.load_tokens(x_atom, tXgX[None, step // 2], tXsX[None, stage], full + stage, mask)
            else:
                self.load_tokens(x_atom, tXgH[None, step // 2], tXsX[None, stage], full + stage, mask)
            if cutlass.const_expr(config.token_scales == "group"):
                with cute.arch.elect_one():
                    source = mS.iterator + (Int64(unit) * mS.shape[1] + token0)
                    bulk_load(sS.iterator + stage * self.tile_m, source, scale_bytes, full + stage)
            stage += 1
            if stage == config.stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase

    @cute.jit
    def load_weights(self, mW, sW, full, row_tile, last_tile, unit, stage, scale_bytes):
        config = self.config
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.w_bytes + self.x_bytes + scale_bytes)
            for g in cutlass.range_constexpr(config.warpgroups):
                tile = cutlass.min(row_tile * config.warpgroups + g, last_tile)  # rows past N: loaded, never stored
                source = mW.iterator + (Int64(tile) * mW.shape[1] + unit) * self.unit_words
                target = sW.iterator + (stage * config.warpgroups + g) * self.unit_words
                bulk_load(target, source, Int32(UNIT_BYTES), full + stage)

    @cute.jit
    def load_tokens(self, x_atom, source, target, barrier, mask):
        if cutlass.const_expr(self.config.multicast > 1):
            cute.copy(x_atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)
        else:
            cute.copy(x_atom, source, target, tma_bar_ptr=barrier)

    @cute.jit
    def consume(self, sX, sW, sS, acc, out, full, empty, thread, group, begin, end, int4_units, stage, phase):
        """One warpgroup: decode the units of its 64 rows and multiply them with the tokens."""
        config = self.config
        tiled_mma = self.tiled_mma()
        tCrB = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(sX))
        rA = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
        rA32 = cute.recast_tensor(rA, Uint32)
        raw = cute.make_rmem_tensor((8,), Uint32)
        loaded = cute.make_rmem_tensor((2,), Float32)
        scale = cute.make_rmem_tensor((2,), Float32)
        raw.fill(0)
        loaded.fill(0.0)
        middle = cutlass.min(cutlass.max(int4_units, begin), end)
        start = begin
        if cutlass.const_expr(config.pairs):
            # few tokens: two units at a time, so that the latencies of one hide those of the other
            acc2 = cute.make_rmem_tensor(acc.shape, Int32)
            rA2 = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
            raw2 = cute.make_rmem_tensor((8,), Uint32)
            scale2 = cute.make_rmem_tensor((2,), Float32)
            if cutlass.const_expr(self.integer):
                acc2.fill(0)
            for _ in cutlass.range((middle - begin) // 2, unroll=1):
                first = stage
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, scale, thread, group, stage)
                stage, phase = self.advance(stage, phase)
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw2, scale2, thread, group, stage)
                self.decode_int4(raw, scale, rA32)
                self.decode_int4(raw2, scale2, cute.recast_tensor(rA2, Uint32))
                self.multiply_pair(rA, rA2, tCrB, acc, acc2, first, stage)
                self.promote(acc, out, sS, scale, thread, first)
                self.release(empty, first)
                self.promote(acc2, out, sS, scale2, thread, stage)
                self.release(empty, stage)
                stage, phase = self.advance(stage, phase)
            start = begin + (middle - begin) // 2 * 2
            if cutlass.const_expr(self.integer):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    acc[i] = acc[i] + acc2[i]
        if start < end:  # a CTA of a split may have no unit
            cute.arch.mbarrier_wait(full + stage, phase)
            self.load_unit(sW, raw, loaded, thread, group, stage)
        # The next unit's codes are fetched before wgmma is issued and land while it runs. Not after: ptxas may give
        # them the registers of A, which wgmma still reads (seen: results that changed from run to run). And without
        # a branch on whether they have arrived: ptxas then serializes the four wgmmas of a unit.
        for unit in cutlass.range(start, middle, unroll=1):
            scale.store(loaded.load())
            self.decode_int4(raw, scale, rA32)
            this = stage
            stage, phase = self.advance(stage, phase)
            if unit + 1 < end:
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, loaded, thread, group, stage)
            self.multiply(rA, tCrB, acc, this, 4)
            self.promote(acc, out, sS, scale, thread, this)
            self.release(empty, this)
        if cutlass.const_expr(config.int8_units):
            for unit in cutlass.range(cutlass.max(start, middle), end, unroll=1):
                scale.store(loaded.load())
                for j in cutlass.range_constexpr(8):
                    rA32[j] = raw[j]
                this = stage
                stage, phase = self.advance(stage, phase)
                if unit + 1 < end:
                    cute.arch.mbarrier_wait(full + stage, phase)
                    self.load_unit(sW, raw, loaded, thread, group, stage)
                self.multiply(rA, tCrB, acc, this, 2)
                self.promote(acc, out, sS, scale, thread, this)
                self.release(empty, this)
        return stage, phase

    @cute.jit
    def multiply_pair(self, rA, rA2, tCrB, acc, acc2, stage, stage2):
        """Both units' products in one group of wgmma, alternating between two accumulators."""
        one = self.tiled_mma()
        two = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(4):
            one.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            two.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            cute.gemm(one, acc, rA[None, None, k], tCrB[None, None, k, stage], acc)
            cute.gemm(two, acc2, rA2[None, None, k], tCrB[None, None, k, stage2], acc2)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def advance(self, stage, phase):
        stage += 1
        if stage == self.config.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def load_unit(self, sW, raw, scale, thread, group, stage):
        """This thread's 32 bytes of codes and the scales of its two rows."""
        base = sW.iterator + (stage * self.config.warpgroups + group) * self.unit_words
        for h in cutlass.range_constexpr(2):
            words = load_u32x4(base + (h * 512 + thread * 4))
            for j in cutlass.range_constexpr(4):
                raw[4 * h + j] = words[j]
        row = (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            if cutlass.const_expr(self.integer):
                factors = cute.make_tensor(cute.recast_ptr(base + CODE_BYTES // 4, dtype=Uint8), cute.make_layout(64))
                scale[r] = cute.arch.inline_ptx(
                    "mov.b32 {$w0}, {$r0};",
                    write_only_types=[Float32],
                    read_only_args=[Uint32(factors[row + 8 * r])],
                )
            else:
                scales = cute.make_tensor(
                    cute.recast_ptr(base + CODE_BYTES // 4, dtype=BFloat16), cute.make_layout(64)
                )
                scale[r] = Float32(scales[row + 8 * r])

    @cute.jit
    def decode_int4(self, raw, scale, rA32):
        """8 packed words to the 16 register words of wgmma's A: low nibbles are row r, high nibbles row r + 8."""
        if cutlass.const_expr(self.integer):
            # code + 8 times an unsigned factor fits a byte; 128 - 8 * factor re-centres it: two instructions for
            # four weights (the trick of LiquidGEMM, arXiv:2509.01229)
            factor = cute.recast_tensor(scale, Uint32)
            centre0 = Uint32(0x80808080) - factor[0] * Uint32(0x08080808)
            centre1 = Uint32(0x80808080) - factor[1] * Uint32(0x08080808)
            for j in cutlass.range_constexpr(8):
                low = raw[j] & Uint32(0x0F0F0F0F)
                high = (raw[j] >> 4) & Uint32(0x0F0F0F0F)
                rA32[2 * j] = (low * factor[0] + centre0) ^ Uint32(0x80808080)
                rA32[2 * j + 1] = (high * factor[1] + centre1) ^ Uint32(0x80808080)
        else:  # the code stays in the byte's high half: 16 * code, the packed scale holds the 1/16
            for j in cutlass.range_constexpr(8):
                rA32[2 * j] = (raw[j] << 4) & Uint32(0xF0F0F0F0)
                rA32[2 * j + 1] = raw[j] & Uint32(0xF0F0F0F0)

    @cute.jit
    def multiply(self, rA, tCrB, acc, stage, steps: cutlass.Constexpr):
        tiled_mma = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(steps):
            tiled_mma.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            cute.gemm(tiled_mma, acc, rA[None, None, k], tCrB[None, None, k, stage], acc)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def promote(self, acc, out, sS, scale, thread, stage):
        """out += sum of the unit x weight scale (of the row) x token scale (of the column)."""
        if cutlass.const_expr(not self.integer):
            column = 2 * (thread % 4)
            for j in cutlass.range_constexpr(self.tile_m // 8):
                for c in cutlass.range_constexpr(2):
                    if cutlass.const_expr(self.config.token_scales == "group"):
                        token = sS[8 * j + column + c, stage]
                        for r in cutlass.range_constexpr(2):
                            i = 4 * j + 2 * r + c
                            out[i] = out[i] + Float32(acc[i]) * (scale[r] * token)
                    else:
                        for r in cutlass.range_constexpr(2):
                            i = 4 * j + 2 * r + c
                            out[i] = out[i] + Float32(acc[i]) * scale[r]

    @cute.jit
    def release(self, empty, stage):
        """This warp has read the stage: tell the producer (of every CTA that shares it)."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if cutlass.const_expr(self.config.multicast > 1):
                for peer in cutlass.range_constexpr(self.config.multicast):
                    cute.arch.mbarrier_arrive(empty + stage, peer)
            else:
                cute.arch.mbarrier_arrive(empty + stage)

    @cute.jit
    def store(self, pool, acc, out, mS, mC, mB, mY, thread, group, row_tile, token0, low, high):
        """Scale, add the bias, transpose through this warpgroup's own staging, 16 tokens x 64 features at a time."""
        config = self.config
        features = mY.shape[1]
        tokens = mY.shape[0]
        lane = thread % 32
        feature0 = (row_tile * config.warpgroups + group) * 64
        row = feature0 + (thread // 32) * 16 + lane // 4
        row_scale = cute.make_rmem_tensor((2,), Float32)
        offset = cute.make_rmem_tensor((2,), Float32)
        for r in cutlass.range_constexpr(2):
            row_scale[r] = Float32(1.0)
            offset[r] = Float32(0.0)
            if row + 8 * r < features:
                if cutlass.const_expr(self.integer):
                    row_scale[r] = mC[row + 8 * r]
                if cutlass.const_expr(config.bias):
                    offset[r] = Float32(mB[row + 8 * r])
        staging = pool + (config.ring_bytes + group * config.staging_bytes)
        # stmatrix: lane l addresses token l % 8 (+ 8 for l >= 16) and features 8 * (l // 8 % 2) of its warp's 16
        target = staging + ((lane % 8 + 8 * (lane // 16)) * 144 + ((thread // 32) * 2 + lane // 8 % 2) * 16)
        chunk_tokens = config.chunk_tokens
        for chunk in cutlass.range_constexpr(self.tile_m // chunk_tokens):
            if token0 + chunk * chunk_tokens < high and token0 + (chunk + 1) * chunk_tokens > low:
                for t in cutlass.range_constexpr(chunk_tokens // 16):
                    words = []
                    for half in cutlass.range_constexpr(2):
                        pair = []
                        j = (chunk * chunk_tokens + 16 * t) // 8 + half  # 8 tokens each
                        scales = []
                        for c in cutlass.range_constexpr(2):
                            factor = Float32(1.0)
                            if cutlass.const_expr(config.token_scales == "token"):
                                token = token0 + 8 * j + 2 * (lane % 4) + c
                                factor = mS[0, cutlass.min(token, tokens - 1)]
                            scales.append(factor)
                        for r in cutlass.range_constexpr(2):
                            for c in cutlass.range_constexpr(2):
                                i = 4 * j + 2 * r + c
                                value = Float32(acc[i]) if cutlass.const_expr(self.integer) else out[i]
                                if cutlass.const_expr(config.token_scales == "token"):
                                    value = value * scales[c]
                                if cutlass.const_expr(self.integer):
                                    value = value * row_scale[r]
                                if cutlass.const_expr(config.bias):
                                    value = value + offset[r]
                                pair.append(value)
                        words.append(pack_bf16x2(pair[0], pair[1]))
                        words.append(pack_bf16x2(pair[2], pair[3]))
                    store_matrix_transposed(target + 144 * 16 * t, words[0], words[1], words[2], words[3])
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=128)
                for i in cutlass.range_constexpr(chunk_tokens // 16):
                    local = i * 16 + thread // 8
                    token = token0 + chunk * chunk_tokens + local
                    feature = feature0 + (thread % 8) * 8
                    source = staging + (local * 144 + (thread % 8) * 16)
                    if token >= low and token < high and feature < features:
                        row_bf16 = cute.make_tensor(
                            cute.recast_ptr(source, dtype=BFloat16).align(16), cute.make_layout(8)
                        )
                        if cutlass.const_expr(config.aligned):
                            place = mY.iterator + (Int64(token) * features + feature)
                            cute.autovec_copy(row_bf16, cute.make_tensor(place.align(16), cute.make_layout(8)))
                        else:
                            for e in cutlass.range_constexpr(8):
                                if feature + e < features:
                                    mY[token, feature + e] = row_bf16[e]
                cute.arch.barrier(barrier_id=2 + group, number_of_threads=128)

    @cute.jit
    def exchange(self, mE, acc, out, tid, rank, tokens):
        """Add up the split's partial sums in registers, in rank order; each CTA does so for its share of the tokens.

        They travel through global memory (L2), in fragment order: [CTA, 8 tokens, thread, 4] words. Distributed
        shared memory moved them at 4 bytes a nanosecond and SM (H200), loads and bulk copies alike.
        """
        config = self.config
        blocks = self.tile_m // 8
        share = -(-blocks // config.split)
        bx, _, _ = cute.arch.block_idx()
        part = cute.make_rmem_tensor((4,), Float32)
        part_int = cute.recast_tensor(part, Int32)
        for j in cutlass.range_constexpr(blocks):
            if 8 * j < tokens and rank != j // share:
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(self.integer):
                        part_int[e] = acc[4 * j + e]
                    else:
                        part[e] = out[4 * j + e]
                cute.autovec_copy(part, self.partial(mE, bx, j, tid))
        cute.arch.fence_acq_rel_cluster()
        self.cluster_sync(config.split)
        for j in cutlass.range_constexpr(blocks):
            if 8 * j < tokens and rank == j // share:
                total = cute.make_rmem_tensor((4,), Float32)
                total_int = cute.recast_tensor(total, Int32)
                total.fill(0.0)
                parts = cute.make_rmem_tensor((4, config.split), Float32)
                parts_int = cute.recast_tensor(parts, Int32)
                for p in cutlass.range_constexpr(config.split):
                    if p != rank:
                        words = load_global_f32x4(self.partial(mE, bx - rank + p, j, tid).iterator)
                        for e in cutlass.range_constexpr(4):
                            parts[e, p] = words[e]
                    else:
                        for e in cutlass.range_constexpr(4):
                            if cutlass.const_expr(self.integer):
                                parts_int[e, p] = acc[4 * j + e]
                            else:
                                parts[e, p] = out[4 * j + e]
                for p in cutlass.range_constexpr(config.split):
                    for e in cutlass.range_constexpr(4):
                        if cutlass.const_expr(self.integer):
                            total_int[e] = total_int[e] + parts_int[e, p]
                        else:
                            total[e] = total[e] + parts[e, p]
                for e in cutlass.range_constexpr(4):
                    if cutlass.const_expr(self.integer):
                        acc[4 * j + e] = total_int[e]
                    else:
                        out[4 * j + e] = total[e]
        return share * 8

    @cute.jit
    def partial(self, mE, cta, block, tid):
        at = ((Int64(cta) * (self.tile_m // 8) + block) * self.consumers + tid) * 4
        return cute.make_tensor((mE.iterator + at).align(16), cute.make_layout(4))


def compile_gemm(config: GemmConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU.

    Returns the TVM-FFI function (weights, x, token scales, channel scales, bias, y, scratch, int4 units, resident CTAs), launching on the
    caller's current stream.
    """
    kernel = PackedWeightGemm(config)
    m, n, k, tiles, units, padded, channels, biases = (cute.sym_int() for _ in range(8))
    fakes = (
        make_fake_compact_tensor(Uint32, (tiles, units, kernel.unit_words), stride_order=(2, 1, 0), assumed_align=16),
        make_fake_compact_tensor(Int8, (m, cute.sym_int(divisibility=64)), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Float32, (cute.sym_int(), padded), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Float32, (channels,), stride_order=(0,), assumed_align=4),
        make_fake_compact_tensor(BFloat16, (biases,), stride_order=(0,), assumed_align=2),
        make_fake_compact_tensor(BFloat16, (m, n), stride_order=(1, 0), assumed_align=2),
        make_fake_compact_tensor(Float32, (cute.sym_int(),), stride_order=(0,), assumed_align=16),
    )
    return cute.compile(
        kernel,
        *fakes,
        Int32(1),
        Int32(132),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
