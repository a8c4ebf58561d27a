# ruff: noqa: SIM102  (an `if` of the compiler inside or around one of the GPU is not one condition)
"""Low-bit GEMM on Hopper (sm_90a), written in CuTe DSL: y[M, N] = x[M, K] @ w[N, K].T.

One kernel for every kind of packed weight (gemm_kinds.py). The operands are swapped: weights stand on the 64-row
side of wgmma, tokens are wgmma's N. A producer warp streams *units* of packed weights (64 rows x 128 columns) and
tiles of activations through shared memory; each consumer warpgroup decodes the units of its own 64 rows into
registers, or multiplies them as they stand where they need no decoding.

What a reader must know: a *promoted* kind adds the sum of every unit to a float32 sum (weight scale x token scale);
the others leave the whole sum over K to wgmma and there is nothing to promote. `split` CTAs share one output tile
along K and add their partial sums in rank order: the same bits on every run. This file launches the kernel; what feeds
it stands in gemm_loads_sm90.py, the consumers' main loop in gemm_mainloop_sm90.py, what follows in
gemm_epilogue_sm90.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int8, Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.nvgpu import warpgroup as wg
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .dsl.arguments import row_major
from .gemm_config import GemmConfig
from .gemm_decode_sm90 import decoder
from .gemm_epilogue_sm90 import GemmEpilogue
from .gemm_loads_sm90 import GemmLoads
from .gemm_mainloop_sm90 import GemmMainloop


class PackedWeightGemm(GemmLoads, GemmMainloop, GemmEpilogue):
    """The compile-time choices of one kernel; see GemmConfig for their meaning."""

    def __init__(self, config: GemmConfig) -> None:
        self.config = config
        self.kind = config.kind
        self.codec = None if config.kind.is_verbatim else decoder(config.weight)
        self.tile_m = config.tile_m
        self.rows = 64 * config.warpgroups // config.ways
        self.consumers = 128 * config.warpgroups
        self.sharers = self.consumers // config.ways  # threads that hold sums to be stored
        self.threads = self.consumers + (128 if config.registers else 32)  # one warp produces, alone or in a warpgroup
        self.unit_words = config.kind.unit_bytes // 4
        self.cluster = config.multicast * (config.split if config.clustered else 1)
        self.slabs = config.kind.operand_bytes  # 128 bytes of every token that one TMA box holds, in a unit
        self.x_type = BFloat16 if config.kind.operand == "bf16" else Int8  # E4M3 travels as bytes
        self.x_bytes = config.x_bytes
        self.w_bytes = config.w_bytes

    @cute.jit
    def __call__(
        self,
        mW: cute.Tensor,  # [row tiles, units, unit bytes / 4] uint32
        mX: cute.Tensor,  # [M, padded K] of bytes, or [M, K] bfloat16; rows begin at multiples of 16 bytes
        mS: cute.Tensor,  # float32: [units, padded M] (token scales by group) or [1, M]; [2, M] with outliers' own
        mC: cute.Tensor,  # [N] float32 channel scales (of a channel-scaled kind)
        mB: cute.Tensor,  # [N] bfloat16 bias
        mY: cute.Tensor,  # [M, N] bfloat16
        mE: cute.Tensor,  # float32 scratch: CTAs x tile_m x 64 x warpgroups where K is split, else any
        int4_units: Int32,
        max_ctas: Int32,  # how many CTAs the GPU holds at once
        stream: cuda.CUstream,
    ):
        self.start(mW, mX, mS, mC, mB, mY, mY, mE, int4_units, max_ctas, stream)

    @cute.jit
    def start(self, mW, mX, mS, mC, mB, mY, mR, mE, int4_units, max_ctas, stream):
        """Launch; `mR` is what is added to the products, of mY's shape, or mY where nothing is."""
        config = self.config
        box = (self.tile_m, 128 // self.slabs)
        atom = wg.make_smem_layout_atom(wg.SmemLayoutAtomKind.K_SW128, self.x_type)
        boxes = self.slabs * config.ways * config.stages
        x_layout = cute.tile_to_shape(atom, (*box, boxes), order=(0, 1, 2))
        if cutlass.const_expr(config.multicast > 1):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
        x_atom, x_tensor = cpasync.make_tiled_tma_atom(
            op,
            mX,
            cute.slice_(x_layout, (None, None, 0)),
            box,
            num_multicast=config.multicast,
        )
        row_groups = cute.ceil_div(mY.shape[1], self.rows * config.multicast)
        token_tiles = cute.ceil_div(mY.shape[0], self.tile_m)
        clusters = row_groups * token_tiles
        if cutlass.const_expr(config.split == 1):
            clusters = cutlass.min(clusters * config.tail, max_ctas // config.multicast)
        whole = row_groups * token_tiles  # tiles of one CTA each, or of a split; those behind them are shared
        if cutlass.const_expr(config.tail > 1):
            left = whole % clusters
            whole = whole - (left if left * config.tail <= clusters else 0)
        self.kernel(
            x_atom, x_tensor, x_layout, mW, mS, mC, mB, mY, mR, mE, int4_units, row_groups, token_tiles, whole
        ).launch(
            grid=(clusters * config.multicast * config.split, 1, 1),
            block=(self.threads, 1, 1),
            cluster=(self.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.ctas_per_sm if config.bounded else 1,
            preferred_smem_carveout=100 if config.bounded else None,
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
        mR: cute.Tensor,
        mE: cute.Tensor,
        int4_units: Int32,
        row_groups: Int32,
        token_tiles: Int32,
        whole: Int32,
    ):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        bx, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        warp = cute.arch.make_warp_uniform(tid // 32)
        rank = bx % (config.multicast * config.split)
        split_rank = rank if cutlass.const_expr(config.split > 1) else Int32(0)
        units = mW.shape[1]
        work = bx // (config.multicast * config.split)  # of row_groups * token_tiles, then every `stride`-th
        stride = blocks // (config.multicast * config.split)
        total = row_groups * token_tiles
        begin = units * split_rank // config.split
        end = units * (split_rank + 1) // config.split
        if cutlass.const_expr(config.tail > 1):
            total = whole + (total - whole) * config.tail

        smem = utils.SmemAllocator()
        full = smem.allocate_array(Int64, config.stages)
        empty = smem.allocate_array(Int64, config.stages)
        pool = smem.allocate(config.pool_bytes, 1024)
        sX = cute.make_tensor(cute.recast_ptr(pool, x_layout.inner, self.x_type), x_layout.outer)
        w_words = cute.recast_ptr(pool + self.x_bytes * config.ways * config.stages, dtype=Uint32)
        sW = cute.make_tensor(w_words, cute.make_layout((self.unit_words, config.warpgroups, config.stages)))
        if cutlass.const_expr(self.kind.is_verbatim):  # both operands as wgmma takes them
            w_atom = wg.make_smem_layout_atom(wg.SmemLayoutAtomKind.K_SW128, self.operand)
            a_layout = cute.tile_to_shape(w_atom, (64, 128, config.warpgroups * config.stages), order=(0, 1, 2))
            w_codes = cute.recast_ptr(pool + self.x_bytes * config.ways * config.stages, a_layout.inner, self.operand)
            sA = cute.make_tensor(w_codes, a_layout.outer)
            sXm = cute.make_tensor(cute.recast_ptr(pool, x_layout.inner, self.operand), x_layout.outer)
        s_words = cute.recast_ptr(pool + (self.x_bytes * config.ways + self.w_bytes) * config.stages, dtype=Float32)
        sS = cute.make_tensor(s_words, cute.make_layout((self.tile_m, config.stages)))

        producer = 4 * config.warpgroups  # the warp that loads; it makes the barriers, and waits for nobody
        if warp == producer:
            with cute.arch.elect_one():
                for s in cutlass.range_constexpr(config.stages):
                    cute.arch.mbarrier_init(full + s, 1)
                    cute.arch.mbarrier_init(empty + s, 4 * config.warpgroups * config.multicast)
            cute.arch.mbarrier_init_fence()
            cute.arch.sync_warp()  # another lane may be the first to use them
        if cutlass.const_expr(config.multicast > 1):  # peers signal these barriers
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        if warp == producer:
            cute.arch.barrier_arrive(barrier_id=7, number_of_threads=self.consumers + 32, aligned=False)
        if warp < producer:
            cute.arch.barrier(barrier_id=7, number_of_threads=self.consumers + 32)
        if cutlass.const_expr(config.pdl):
            cute.arch.griddepcontrol_launch_dependents()

        if warp >= producer:
            if cutlass.const_expr(config.registers):
                cute.arch.setmaxregister_decrease(24)
            if warp == producer:
                cpasync.prefetch_descriptor(x_atom)
                stage = Int32(0)
                phase = Int32(1)
                first = Int32(1)
                for part in cutlass.range(work, total, stride, unroll=1):
                    item = part
                    if cutlass.const_expr(config.tail > 1):
                        item, begin, end = self.share_of(part, whole, units)
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
            acc = cute.make_rmem_tensor(acc_shape, self.sum_type)
            out = cute.make_rmem_tensor(acc_shape, Float32)
            sums = out if cutlass.const_expr(config.sums_float) else acc
            stage = Int32(0)
            phase = Int32(0)
            first = Int32(1)
            staging = pool + (config.ring_bytes + group // config.ways * config.staging_bytes)
            scales = pool + (config.ring_bytes + config.stagings_bytes + group * config.scale_bytes)
            scales = cute.recast_ptr(scales, dtype=Float32)
            sT = cute.make_tensor(scales, cute.make_layout((self.tile_m, max(config.scale_rows, 1))))
            row_values = cute.make_rmem_tensor((4,), Float32)
            token_values = cute.make_rmem_tensor((-(-self.tile_m // 128) * max(config.scale_rows, 1),), Float32)
            for part in cutlass.range(work, total, stride, unroll=1):
                item = part
                if cutlass.const_expr(config.tail > 1):
                    item, begin, end = self.share_of(part, whole, units)
                row_tile, token0 = self.place(item, row_groups, token_tiles, rank)
                row0 = row_tile * self.rows
                if cutlass.const_expr(config.ways == 1):
                    row0 = row0 + group * 64
                self.fetch_row_values(mC, mB, row_values, thread, row0, mY.shape[1])
                if cutlass.const_expr(config.pdl):
                    if first == 1:
                        cute.arch.griddepcontrol_wait()
                        first = Int32(0)
                met = Int32(0)
                if cutlass.const_expr(not config.clustered):
                    met = self.count_to_meet(mE, tid, item)
                self.fetch_token_scales(mS, token_values, thread, token0, mY.shape[0])
                (out if cutlass.const_expr(self.kind.promoted) else acc).fill(0)
                own_units, own_int4 = self.units_of(group, begin, end, int4_units)
                if cutlass.const_expr(self.kind.is_verbatim):
                    consume = self.consume_alternating if config.pairs else self.consume_verbatim
                    stage, phase = consume(sXm, sA, acc, out, full, empty, thread, group, own_units, stage, phase)
                else:
                    stage, phase = self.consume(
                        sX, sW, sS, sT, acc, out, full, empty, thread, group, own_units, own_int4, stage, phase,
                        row_values, token_values,
                    )  # fmt: skip
                if cutlass.const_expr(config.ways > 1):
                    if own_units < (end - begin + config.ways - 1) // config.ways:  # a stage without a unit for it
                        cute.arch.mbarrier_wait(full + stage, phase)
                        self.release(empty, stage)
                        stage, phase = self.advance(stage, phase)
                    self.merge(pool, sums, thread, group)
                if cutlass.const_expr(not config.scaled_early):
                    self.share_scales(sT, token_values, thread, group)
                place = (row0, token0, split_rank, item, met, own_units < units)
                if cutlass.const_expr(config.ways > 1):
                    if group == 0:
                        self.finish(staging, sums, sT, row_values, mE, mY, mR, tid, thread, group, *place)
                else:
                    self.finish(staging, sums, sT, row_values, mE, mY, mR, tid, thread, group, *place)
            if cutlass.const_expr(config.multicast > 1):
                self.cluster_sync(self.cluster)  # peers may still write to or signal this CTA's shared memory

    @cute.jit
    def finish(
        self, staging, sums, sT, row_values, mE, mY, mR, tid, thread, group, row0, token0, rank, item, met, is_share
    ):  # fmt: skip
        """From sums in registers to memory; those of a tile of the last round may be of a share of K."""
        low = token0
        high = cutlass.min(token0 + self.tile_m, mY.shape[0])
        if cutlass.const_expr(self.config.split > 1):
            self.exchange(mE, sums, tid, rank, high - token0, item, met)
            low = token0 + rank * self.config.share_tokens
            high = cutlass.min(low + self.config.share_tokens, high)
        if cutlass.const_expr(self.config.tail > 1):
            if is_share:
                bx, _, _ = cute.arch.block_idx()
                rank = bx % self.config.tail
                item = bx // self.config.tail
                met = self.count_to_meet(mE, tid, item)  # here, for want of registers in the main loop
                self.exchange(mE, sums, tid, rank, high - token0, item, met)
                low = token0 + rank * self.config.share_tokens
                high = cutlass.min(low + self.config.share_tokens, high)
        self.store(staging, sums, sT, row_values, mY, mR, thread, group, row0, token0, low, high)

    @cute.jit
    def units_of(self, group, begin, end, int4_units):
        """(units that a warpgroup multiplies, how many of them are INT4) of those from begin to end."""
        count = end - begin
        int4 = cutlass.min(cutlass.max(int4_units - begin, Int32(0)), count)
        if cutlass.const_expr(self.config.ways > 1):
            ways = self.config.ways
            count = (count - group + (ways - 1)) // ways
            int4 = (int4 - group + (ways - 1)) // ways
        return count, int4

    @cute.jit
    def share_of(self, part, whole, units):
        """(tile, first unit, end of its units): all of K of the first tiles, a share of the others.

        Every CTA has one share at most, and those of a tile are neighbours: `whole` is a number of whole rounds.
        """
        tail = self.config.tail
        item = part
        begin = Int32(0)
        end = units
        if part >= whole:
            item = whole + (part - whole) // tail
            rank = (part - whole) % tail
            begin = units * rank // tail
            end = units * (rank + 1) // tail
        return item, begin, end

    @cute.jit
    def place(self, item, row_groups, token_tiles, rank):
        """Work item to (row tile, first token): 8 token tiles run side by side, so that both operands stay in L2."""
        row_tile, token_tile = item, Int32(0)
        if token_tiles > 1:  # not for few tokens: a division takes as long as a load's first instructions
            per = 8 * row_groups
            block = item // per
            width = cutlass.min(token_tiles - 8 * block, Int32(8))
            local = item - block * per
            row_tile = local // width
            token_tile = 8 * block + local % width
        if cutlass.const_expr(self.config.multicast > 1):
            row_tile = row_tile * self.config.multicast + rank
        return row_tile, token_tile * self.tile_m

    @cute.jit
    def cluster_sync(self, ctas: cutlass.Constexpr):
        if cutlass.const_expr(ctas > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()


class AddingGemm(PackedWeightGemm):
    """The same with one operand more, which is added to the products."""

    @cute.jit
    def __call__(
        self,
        mW: cute.Tensor,
        mX: cute.Tensor,
        mS: cute.Tensor,
        mC: cute.Tensor,
        mB: cute.Tensor,
        mY: cute.Tensor,
        mR: cute.Tensor,  # [M, N] bfloat16; may be mY
        mE: cute.Tensor,
        int4_units: Int32,
        max_ctas: Int32,
        stream: cuda.CUstream,
    ):
        self.start(mW, mX, mS, mC, mB, mY, mR, mE, int4_units, max_ctas, stream)


def compile_gemm(config: GemmConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU.

    Returns the TVM-FFI function (weights, x, token scales, channel scales, bias, y, [residual,] scratch, int4 units,
    resident CTAs); it launches on the caller's current stream. Shapes and dtypes: PackedWeightGemm.__call__.
    """
    kernel = AddingGemm(config) if config.residual else PackedWeightGemm(config)
    m, n, tiles, units, padded, channels, biases = (cute.sym_int() for _ in range(7))
    pitch = cute.sym_int64(divisibility=8 if kernel.x_type is BFloat16 else 16)  # of rows: TMA wants 16 bytes
    outputs = 2 if config.residual else 1  # what is added has the output's shape
    fakes = (
        row_major(Uint32, (tiles, units, kernel.unit_words), 16),
        make_fake_tensor(kernel.x_type, (m, cute.sym_int()), (pitch, 1), assumed_align=16),
        row_major(Float32, (cute.sym_int(), padded), 16),
        row_major(Float32, (channels,), 4),
        row_major(BFloat16, (biases,), 2),
        *(row_major(BFloat16, (m, n), 2) for _ in range(outputs)),
        row_major(Float32, (cute.sym_int(),), 16),
    )
    return cute.compile(
        kernel,
        *fakes,
        Int32(1),
        Int32(132),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
