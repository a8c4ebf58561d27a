"""NVFP4 and MXFP4 GEMM on Blackwell of compute capability 10.0 (sm_100a), in CuTe DSL: tcgen05 with block scales.

Both operands stay E2M1; the tensor core multiplies by the scales, which lie in tensor memory beside the sums. Weights
stand on the 128-row side, tokens on the other, so that a thread of the end has one feature and all tokens of the tile.
One tile of 128 x 128 a CTA: a warp copies tiles (TMA), a warp multiplies, four warps write. Compiled, never yet run.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.pipeline as pipeline
import cutlass.utils as utils
import cutlass.utils.blackwell_helpers as blackwell
import cutlass.utils.blockscaled_layout as blockscaled
from cutlass import Float4E2M1FN, Float8E4M3FN, Float8E8M0FNU, Float32, Int16, Int32, Int64, Uint8, cute
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.memory import TmemAllocator

from .dsl.arguments import row_major
from .fp4_config import Fp4Config
from .fp4_kernel import Fp4Output, compile_fp4
from .fp4_layout import COLUMNS

TILE = (128, 128, COLUMNS)  # features, tokens, columns of a stage
STAGES = 8
COLUMNS_OF_SUMS, COLUMNS_ALLOCATED = 128, 256  # of tensor memory: float32 sums, and with the scales a power of two
WRITERS, MULTIPLIER, LOADER = 4, 4, 5  # warps 0 ... 3 write
THREADS = 192


class BlockScaledGemm(Fp4Output):
    """The compile-time choices of one kernel; see Fp4Config."""

    def __init__(self, config: Fp4Config) -> None:
        super().__init__(config)
        self.scale_dtype = Float8E4M3FN if config.group_size == 16 else Float8E8M0FNU

    @cute.jit
    def __call__(
        self,
        mW: cute.Tensor,  # [N, padded K / 2] uint8: weights, fp4_layout.pack_codes
        mSW: cute.Tensor,  # uint8, flat: their scales, fp4_layout.pack_scales
        mX: cute.Tensor,  # [T, padded K / 2] uint8: codes of the tokens
        mSX: cute.Tensor,  # uint8, flat: their scales
        mC: cute.Tensor,  # [1] or [N] float32 outer scale of the weights
        mS: cute.Tensor,  # [T] float32 outer scale of each token, else any
        mB: cute.Tensor,  # [N] bfloat16 bias, else any
        mY: cute.Tensor,  # [T, N] bfloat16
        stream: cuda.CUstream,
    ):
        config = self.config
        shape = (TILE[0], TILE[1], 64)
        one = tcgen05.CtaGroup.ONE
        if cutlass.const_expr(config.group_size == 16):
            op = tcgen05.MmaMXF4NVF4Op(self.scale_dtype, shape, one, tcgen05.OperandSource.SMEM)
        else:
            op = tcgen05.MmaMXF4Op(shape, one, tcgen05.OperandSource.SMEM)
        mma = cute.make_tiled_mma(op)
        vmnk = cute.tiled_divide(cute.make_layout((1, 1, 1)), (mma.thr_id.shape,)).shape
        layouts = (
            blackwell.make_smem_layout_a(mma, TILE, Float4E2M1FN, STAGES),
            blackwell.make_smem_layout_b(mma, TILE, Float4E2M1FN, STAGES),
            blockscaled.make_smem_layout_sfa(mma, TILE, config.group_size, STAGES),
            blockscaled.make_smem_layout_sfb(mma, TILE, config.group_size, STAGES),
        )
        stages = [cute.slice_(layout, (None, None, None, 0)) for layout in layouts]
        load = cpasync.CopyBulkTensorTileG2SOp(one)
        make_a, make_b = cute.nvgpu.make_tiled_tma_atom_A, cute.nvgpu.make_tiled_tma_atom_B
        gW, gSW = self.operand(mW, mSW)
        gX, gSX = self.operand(mX, mSX)
        copies = (
            make_a(load, gW, stages[0], TILE, mma, vmnk),
            make_b(load, gX, stages[1], TILE, mma, vmnk),
            make_a(load, gSW, stages[2], TILE, mma, vmnk, internal_type=Int16),
            make_b(load, gSX, stages[3], TILE, mma, vmnk, internal_type=Int16),
        )
        dtypes = (Float4E2M1FN, Float4E2M1FN, self.scale_dtype, self.scale_dtype)
        self.stage_bytes = sum(cute.size_in_bytes(dtype, stage) for dtype, stage in zip(dtypes, stages, strict=True))
        self.kernel(mma, *(part for copy in copies for part in copy), mC, mS, mB, mY, *layouts).launch(
            grid=(cute.ceil_div(mY.shape[1], TILE[0]), cute.ceil_div(mY.shape[0], TILE[1]), 1),
            block=(THREADS, 1, 1),
            cluster=(1, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.jit
    def operand(self, codes, scales):
        """Codes [rows, columns, 1] as E2M1, and their scales in tiles, as tensors for TMA."""
        rows = codes.shape[0]
        columns = cute.assume(codes.shape[1] * 2, COLUMNS)
        layout = cute.make_layout((rows, columns, 1), stride=(columns, 1, rows * columns))
        whole = cute.make_tensor(cute.recast_ptr(codes.iterator, dtype=Float4E2M1FN), layout)
        tiles = blockscaled.tile_atom_to_shape_SF(whole.shape, self.config.group_size)
        return whole, cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=self.scale_dtype), tiles)

    @cute.kernel
    def kernel(
        self, mma: cute.TiledMma,
        copy_w: cute.CopyAtom, mW: cute.Tensor, copy_x: cute.CopyAtom, mX: cute.Tensor,
        copy_sw: cute.CopyAtom, mSW: cute.Tensor, copy_sx: cute.CopyAtom, mSX: cute.Tensor,
        mC: cute.Tensor, mS: cute.Tensor, mB: cute.Tensor, mY: cute.Tensor,
        layout_w: cute.ComposedLayout, layout_x: cute.ComposedLayout, layout_sw: cute.Layout, layout_sx: cute.Layout,
    ):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        band, token_tile, _ = cute.arch.block_idx()
        smem = utils.SmemAllocator()
        full_and_empty = smem.allocate_array(Int64, 2 * STAGES)
        done = smem.allocate_array(Int64, 2)
        holder = smem.allocate_array(Int32, 1)
        sW = smem.allocate_tensor(Float4E2M1FN, layout_w.outer, byte_alignment=1024, swizzle=layout_w.inner)
        sX = smem.allocate_tensor(Float4E2M1FN, layout_x.outer, byte_alignment=1024, swizzle=layout_x.inner)
        sSW = smem.allocate_tensor(self.scale_dtype, layout_sw, byte_alignment=1024)
        sSX = smem.allocate_tensor(self.scale_dtype, layout_sx, byte_alignment=1024)
        one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
        loads, tiles = pipeline.PipelineTmaUmma.create(
            barrier_storage=full_and_empty,
            num_stages=STAGES,
            producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1),
            tx_count=self.stage_bytes,
        ).make_participants()
        sums_of, sums_for = pipeline.PipelineUmmaAsync.create(
            barrier_storage=done,
            num_stages=1,
            producer_group=one,
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32 * WRITERS),
        ).make_participants()
        tmem = TmemAllocator(holder, barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS))
        tmem.allocate(COLUMNS_ALLOCATED)
        tmem.wait_for_alloc()
        base = tmem.retrieve_ptr(Float32)
        tAcc = cute.make_tensor(base, mma.make_fragment_C(mma.partition_shape_C(TILE[:2])).layout)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        part = mma.get_slice(0)
        tiles_w, tiles_x = (TILE[0], TILE[2]), (TILE[1], TILE[2])
        at_w, at_x, flat = (band, None), (token_tile, None), (None, None, 0)
        gW, sWs = self.parts(copy_w, sW, part.partition_A(cute.local_tile(mW[flat], tiles_w, at_w)))
        gX, sXs = self.parts(copy_x, sX, part.partition_B(cute.local_tile(mX[flat], tiles_x, at_x)))
        gSW, sSWs = self.parts(copy_sw, sSW, part.partition_A(cute.local_tile(mSW[flat], tiles_w, at_w)))
        gSX, sSXs = self.parts(copy_sx, sSX, part.partition_B(cute.local_tile(mSX[flat], tiles_x, at_x)))
        steps = cute.size(gW, mode=[1])
        if warp == LOADER:
            for step in cutlass.range(steps, unroll=1):
                slot = loads.acquire_and_advance()
                for copy, source, target in (
                    (copy_w, gW, sWs), (copy_x, gX, sXs), (copy_sw, gSW, sSWs), (copy_sx, gSX, sSXs),
                ):  # fmt: skip
                    cute.copy(copy, source[None, step], target[None, slot.index], tma_bar_ptr=slot.barrier)
            loads.tail()
        if warp == MULTIPLIER:
            self.multiply(mma, sW, sX, sSW, sSX, layout_sw, layout_sx, base, tAcc, tiles, sums_of, steps)
        tmem.relinquish_alloc_permit()
        if warp < WRITERS:
            self.write(mC, mS, mB, mY, tAcc, sums_for, band, token_tile, tid)
        cute.arch.barrier()
        tmem.free(base)

    @cute.jit
    def parts(self, copy, shared, whole):
        """(source [.., steps], target [.., stages]) of a tensor copy."""
        target, source = cpasync.tma_partition(
            copy, 0, cute.make_layout(1), cute.group_modes(shared, 0, 3), cute.group_modes(whole, 0, 3)
        )
        return cute.filter_zeros(source), cute.filter_zeros(target)

    @cute.jit
    def multiply(self, mma, sW, sX, sSW, sSX, layout_sw, layout_sx, base, tAcc, tiles, sums_of, steps):
        """Scales of a stage into tensor memory, then the products of its codes, in order; one warp."""
        size = self.config.group_size
        fW, fX = mma.make_fragment_A(sW), mma.make_fragment_B(sX)
        whole = (None, None, None, 0)
        place = cute.recast_ptr(base + COLUMNS_OF_SUMS, dtype=self.scale_dtype)
        tSW = cute.make_tensor(place, blockscaled.make_tmem_layout_sfa(mma, TILE, size, cute.slice_(layout_sw, whole)))
        place = cute.recast_ptr(
            base + (COLUMNS_OF_SUMS + tcgen05.find_tmem_tensor_col_offset(tSW)), dtype=self.scale_dtype
        )
        tSX = cute.make_tensor(place, blockscaled.make_tmem_layout_sfb(mma, TILE, size, cute.slice_(layout_sx, whole)))
        move_w, from_w, to_w = self.scale_copy(sSW, tSW)
        move_x, from_x, to_x = self.scale_copy(sSX, tSX)
        sums = sums_of.acquire_and_advance()
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(steps, unroll=1):
            slot = tiles.wait_and_advance()
            stage = (None, None, None, None, slot.index)
            cute.copy(move_w, from_w[stage], to_w)
            cute.copy(move_x, from_x[stage], to_x)
            for k in cutlass.range_constexpr(TILE[2] // 64):
                mma.set(tcgen05.Field.SFA, tSW[None, None, k].iterator)
                mma.set(tcgen05.Field.SFB, tSX[None, None, k].iterator)
                cute.gemm(mma, tAcc, fW[None, None, k, slot.index], fX[None, None, k, slot.index], tAcc)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            slot.release()
        sums.commit()

    @cute.jit
    def scale_copy(self, shared, target):
        """A copy of one stage of scales from shared to tensor memory: (copy, source [.., stages], target)."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(tcgen05.CtaGroup.ONE), self.scale_dtype)
        compact = cute.filter_zeros(target)
        copy = tcgen05.make_s2t_copy(atom, compact)
        mine = copy.get_slice(0)
        source = tcgen05.get_s2t_smem_desc_tensor(copy, mine.partition_S(cute.filter_zeros(shared)))
        return copy, source, mine.partition_D(compact)

    @cute.jit
    def write(self, mC, mS, mB, mY, tAcc, sums_for, band, token_tile, tid):
        """Scale, add the bias; a thread has one feature and all tokens of the tile, 32 threads a line of each token."""
        tokens, features = mY.shape
        sums = sums_for.wait_and_advance()
        atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition.x32, tcgen05.Pack.NONE), Float32)
        feature = band * TILE[0] + tid
        factor = Float32(1.0)
        offset = Float32(0.0)
        if feature < features:
            factor, offset = self.feature_values(mC, mB, feature)
        blocks = cute.flat_divide(tAcc[((None, None), 0, 0)], (TILE[0], 32))  # [128, 32, 1, tokens / 32]
        copy = tcgen05.make_tmem_copy(atom, blocks[None, None, 0, 0])
        mine = copy.get_slice(tid)
        source = mine.partition_S(blocks)
        values = cute.make_rmem_tensor(mine.partition_D(cute.make_identity_tensor((TILE[0], 32))).shape, Float32)
        for block in cutlass.range_constexpr(TILE[1] // 32):
            cute.copy(copy, source[None, None, None, 0, block], values)
            cute.arch.fence_view_async_tmem_load()
            for e in cutlass.range_constexpr(32):
                token = token_tile * TILE[1] + 32 * block + e
                if feature < features and token < tokens:
                    self.put(mS, mY, values[e], factor, offset, token, feature)
        sums.release()


def compile_gemm(config: Fp4Config, options: str = "") -> object:
    """Compile one kernel for sm_100a; needs no GPU. Arguments as in BlockScaledGemm.__call__, on the current stream."""
    t, n, row_bytes = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=COLUMNS // 2)
    weight = row_major(Uint8, (n, row_bytes), 128), row_major(Uint8, (cute.sym_int(),), 128)
    x = row_major(Uint8, (t, row_bytes), 128), row_major(Uint8, (cute.sym_int(),), 128)
    return compile_fp4(BlockScaledGemm(config), weight, x, (t, n), f"--gpu-arch sm_100a {options}")
