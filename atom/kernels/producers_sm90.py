# ruff: noqa: SIM102  (an `if` of the compiler around one of the GPU is not one condition)
"""Producers of quantized activations on Hopper (sm_90a), in CuTe DSL: ([add] RMSNorm | gate x up | plain) -> codes.

A thread holds a few chunks of 8 columns of a token from the load to the store. Few tokens: a CTA or more for each, laid
out for the shortest way. Many tokens: CTAs that stay, the next token's row on its way while one is rounded. What
happens to a row before it is rounded stands in producer_rows_sm90.py and producer_rotation_sm90.py, from values to what
lies in memory in producer_write_sm90.py, the rounding itself in producer_encode_sm90.py.
"""

from math import sqrt
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float16, Float32, Int8, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .dsl.arguments import row_major
from .dsl.arithmetic import reciprocal_root
from .dsl.held import hold_address, hold_word
from .dsl.memory import bulk_load
from .dsl.wide_access import load_floats, load_words
from .producer_config import CHUNK, ProducerConfig
from .producer_rotation_sm90 import ProducerRotation
from .producer_rows_sm90 import ProducerRows
from .producer_write_sm90 import ProducerWrite

DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


class Producer(ProducerRows, ProducerRotation, ProducerWrite):
    """The compile-time choices of one kernel; see ProducerConfig."""

    def __init__(self, config: ProducerConfig) -> None:
        self.config = config
        self.warps = config.threads // 32
        self.runs = config.chunks // config.run
        held = config.threads * config.chunks * config.parts
        assert held >= config.slots and config.threads % 32 == 0
        assert config.parts <= 8 or not config.clustered
        read = config.row_chunks
        self.reads = -(-read // config.threads) if config.permuted else config.chunks
        self.is_full = (
            read == self.reads * config.threads if config.permuted else held == config.slots == read
        )  # no thread reads past a row
        self.fills = held == config.slots == config.outlier_slot + config.outliers // CHUNK == read
        self.size = config.dtype_bytes
        self.words = CHUNK * self.size // 4  # of a chunk
        self.stays = config.ctas_per_sm > 0
        assert not self.stays or not (config.reads_two or config.strided or config.parts > 1)
        self.rows = config.stages if self.stays else 1 if config.permuted else 0  # in shared memory
        self.row = (read + 1) * CHUNK  # the last chunk holds zeros
        self.room = -(-self.warps * config.parts // 4) * 4  # for what the warps found

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # [M, K] input, or the gate, or what is added to the residual
        mU: cute.Tensor,  # [M, K] up where the source is gated, the residual where it adds, else any
        mT: cute.Tensor,  # [M, K] their sum where the source adds, else any
        mG: cute.Tensor,  # [slots x 8] float32 gain of the norm in the order of slots, zero where there is no column
        mP: cute.Tensor,  # int32 [slots x 8] columns in that order, K where none is, then [slots] to put codes back
        mQ: cute.Tensor,  # [M, width] int8 codes, or bfloat16
        mS: cute.Tensor,  # float32 [units, padded M] (group), [1, M] (token, or small under an outer scale), else any
        eps: Float32,
        limit: Int32,  # CTAs that fit the GPU at a time, where they stay
        stream: cuda.CUstream,
    ):
        config = self.config
        ctas = mX.shape[0]
        if cutlass.const_expr(config.ctas_per_sm > 0):
            ctas = cutlass.min(ctas, limit // config.parts)
        self.kernel(mX, mU, mT, mG, mP, mQ, mS, eps).launch(
            grid=(ctas * config.parts, 1, 1),
            block=(config.threads, 1, 1),
            cluster=(config.parts if config.clustered else 1, 1, 1),
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=config.ctas_per_sm,
            preferred_smem_carveout=100,  # as the GEMM's: an SM need not be emptied to be divided anew
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mU: cute.Tensor, mT: cute.Tensor, mG: cute.Tensor, mP: cute.Tensor,
               mQ: cute.Tensor, mS: cute.Tensor, eps: Float32):  # fmt: skip
        config = self.config
        cute.arch.griddepcontrol_launch_dependents()
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        rank = cta % config.parts
        first = cta // config.parts
        step = ctas // config.parts
        M = mX.shape[0]
        dtype = mX.element_type
        smem = utils.SmemAllocator()
        sV: Any = None
        full: Any = None
        if cutlass.const_expr(self.rows > 0):
            sV = smem.allocate_tensor(dtype, cute.make_layout(self.rows * self.row), byte_alignment=16)
        if cutlass.const_expr(self.stays):
            full = smem.allocate_array(Int64, config.stages)
            if tid == 0:
                for s in cutlass.range_constexpr(config.stages):
                    cute.arch.mbarrier_init(full + s, 1)
            cute.arch.mbarrier_init_fence()
        sR = smem.allocate_tensor(Float32, cute.make_layout(2 * config.stages * self.room), byte_alignment=16)
        met: Any = None
        peers: Any = None
        if cutlass.const_expr(config.clustered):
            met = smem.allocate_array(Int64, 2)
            if tid == 0:
                for s in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(met + s, 1)
            cute.arch.mbarrier_init_fence()
            if tid == 0:
                sR[self.room] = Float32(0.0)  # the largest value so far
                for s in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_arrive_and_expect_tx(met + s, 4 * self.warps * config.parts)
            cute.arch.cluster_arrive()
            peers = self.find_peers(sR, met, tid, rank)

        # What does not depend on the launch before this one: columns and gains of this thread's slots.
        rI = cute.make_rmem_tensor((CHUNK, config.chunks), Int32)
        rG = cute.make_rmem_tensor((CHUNK, config.chunks), Float32)
        rO = cute.make_rmem_tensor((config.chunks,), Uint32)
        rI.fill(config.columns)
        rG.fill(0.0)
        for j in cutlass.range_constexpr(config.chunks):
            self.load_constants(mG, mP, sV, rI, rG, rO, j, self.slot_of(j, tid, rank))
        if cutlass.const_expr(config.permuted):
            if tid < self.rows * CHUNK:
                sV[tid // CHUNK * self.row + config.row_chunks * CHUNK + tid % CHUNK] = dtype(0.0)
        if cutlass.const_expr(self.stays):
            cute.arch.sync_threads()
        places = None
        if cutlass.const_expr(not self.stays):
            places = self.places(mX, mU, first, tid, rank)
            self.hold_arguments(mX, mU, mT, mQ, mS, eps)
        cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(self.stays):
            for s in cutlass.range_constexpr(config.stages):
                self.fetch(mX, sV, full, s, first + s * step, tid)
            phase = Int32(0)
            ahead = config.stages * step
            for start in cutlass.range(first, M, ahead, unroll=1):
                for s in cutlass.range_constexpr(config.stages):
                    token = start + s * step
                    if token < M:
                        cute.arch.mbarrier_wait(full + s, phase)
                        self.token(mX, places, mT, mQ, mS, sV, sR, full, met, peers, rI, rG, rO, eps, s, token,
                                   ahead, tid, rank)  # fmt: skip
                phase = phase ^ 1
        else:
            self.token(mX, places, mT, mQ, mS, sV, sR, full, met, peers, rI, rG, rO, eps, 0, first, M, tid, rank)

    @cute.jit
    def hold_arguments(self, mX, mU, mT, mQ, mS, eps):
        """Read what is used behind the wait for the launch in front."""
        config = self.config
        tensors = [mX, mQ]
        if cutlass.const_expr(config.reads_two):
            tensors.append(mU)
        if cutlass.const_expr(config.source == "add_norm"):
            tensors.append(mT)
        if cutlass.const_expr(config.rounding != "none" and config.scale_format != "e8m0"):
            tensors.append(mS)
        for tensor in tensors:
            hold_address(tensor.iterator.toint())
        if cutlass.const_expr(config.outliers > 0):
            hold_word(Int32(mS.stride[0]))
        if cutlass.const_expr(config.is_norm):
            hold_word(eps)

    @cute.jit
    def fetch(self, mX, sV, full, stage: cutlass.Constexpr, token, tid):
        """Ask for the row of a token, if there is one; `full` counts its arrival."""
        columns = self.config.row_chunks * CHUNK
        if cute.arch.make_warp_uniform(tid // 32) == 0 and token < mX.shape[0]:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, columns * self.size)
                source = mX.iterator + Int64(token) * columns
                bulk_load(sV.iterator + stage * self.row, source, Int32(columns * self.size), full + stage)

    @cute.jit
    def load_constants(self, mG, mP, sV, rI, rG, rO, j: cutlass.Constexpr, slot):
        """Addresses in shared memory and gains of one slot, and the word that puts its codes back in place."""
        config = self.config
        there = slot < config.slots
        rO[j] = Uint32(0x76543210)
        if there:
            if cutlass.const_expr(config.reorders):
                rO[j] = Uint32(mP[CHUNK * config.slots + slot])
            for half in cutlass.range_constexpr(2):
                at = 4 * (slot * CHUNK + 4 * half)
                if cutlass.const_expr(config.permuted):
                    columns = load_words(mP.iterator.toint() + at)
                    for e in cutlass.range_constexpr(4):
                        rI[4 * half + e, j] = Int32(columns[e])
                if cutlass.const_expr(config.is_norm):
                    gains = load_floats(mG.iterator.toint() + at)
                    for e in cutlass.range_constexpr(4):
                        rG[4 * half + e, j] = gains[e]
        if cutlass.const_expr(config.permuted):
            for e in cutlass.range_constexpr(CHUNK):
                rI[e, j] = sV.iterator.toint() + self.size * rI[e, j]

    @cute.jit
    def token(
        self, mX, places, mT, mQ, mS, sV, sR, full, met, peers, rI, rG, rO, eps, stage: cutlass.Constexpr, token, ahead,
        tid, rank,
    ):  # fmt: skip
        """One token from its row to its codes; once the row is read, that of the token `ahead` takes its place.

        places  of the row in memory, where CTAs do not stay
        """
        config = self.config
        values = [cute.make_rmem_tensor((CHUNK,), Float32) for _ in range(config.chunks)]
        squares = Float32(0.0)
        if cutlass.const_expr(self.stays):
            squares = self.take(sV, rI, values, stage, tid, rank)
        else:
            squares = self.read(places, mT, sV, values, token, tid, rank)
        room = 2 * stage * self.room
        total = Float32(0.0)
        if cutlass.const_expr(config.permuted and not self.stays):  # the whole row must be there before it is gathered
            if cutlass.const_expr(config.is_norm):
                self.tell_row(sR, peers, room, [squares], (True,), tid, True)
                (total,) = self.hear_row(sR, met, room, (True,), tid, True)
            else:
                cute.arch.sync_threads()

        largest = [Float32(0.0) for _ in range(self.runs)]
        of_row = Float32(0.0)
        for i in cutlass.range_constexpr(self.runs):
            slot = self.first_slot(i, tid, rank)
            for j in cutlass.range_constexpr(i * config.run, (i + 1) * config.run):
                if cutlass.const_expr(config.permuted and not self.stays):
                    self.gather(rI, 0, values[j], j)
                if cutlass.const_expr(config.is_norm):
                    for e in cutlass.range_constexpr(CHUNK):
                        values[j][e] = values[j][e] * rG[e, j]
                if cutlass.const_expr(config.rotation > 0 and not config.turns_runs):
                    self.rotate(values[j], slot)
            if cutlass.const_expr(config.turns_runs):
                self.rotate_run(values[i * config.run : (i + 1) * config.run], tid)
            for j in cutlass.range_constexpr(i * config.run, (i + 1) * config.run):
                if cutlass.const_expr(config.rounding != "none"):
                    largest[i] = self.largest(values[j], largest[i])
            if cutlass.const_expr(config.outliers == 0):
                of_row = cute.arch.fmax(of_row, largest[i])
            else:
                if slot < config.outlier_slot:
                    of_row = cute.arch.fmax(of_row, largest[i])
        told = []  # what is yet to be found over the row, and whether it is a sum
        if cutlass.const_expr(config.is_norm and (self.stays or not config.permuted)):
            told.append((squares, True))
        if cutlass.const_expr(config.needs_row_max):
            told.append((of_row, False))
        sums = tuple(is_sum for _, is_sum in told)
        if cutlass.const_expr(len(told) > 0):
            self.tell_row(sR, peers, room, [value for value, _ in told], sums, tid, False)
        raw = [self.unit_raw(largest[i], self.first_slot(i, tid, rank)) for i in range(self.runs)]
        if cutlass.const_expr(len(told) > 0 or self.stays):
            heard = self.hear_row(sR, met, room, sums, tid, False)
            if cutlass.const_expr(config.needs_row_max):
                of_row = heard[-1]
            if cutlass.const_expr(True in sums):
                total = heard[0]
        if cutlass.const_expr(self.stays):
            self.fetch(mX, sV, full, stage, token + ahead, tid)
        factor = Float32(1.0)  # of the norm and the rotation, which the values lack until they are rounded
        if cutlass.const_expr(config.is_norm):
            factor = reciprocal_root(total / Float32(config.columns) + eps)
        if cutlass.const_expr(config.turns_all):
            factor = factor * Float32(1.0 / sqrt(config.rotation))
        if cutlass.const_expr(config.lacks_factor):
            of_row = of_row * factor
        for i in cutlass.range_constexpr(self.runs):
            run = values[i * config.run : (i + 1) * config.run]
            back = [rO[j] for j in range(i * config.run, (i + 1) * config.run)]
            signs = None
            if cutlass.const_expr(config.turns_runs):
                signs = self.signs_of_run(tid)
            if cutlass.const_expr(config.lacks_factor):
                raw[i] = raw[i] * factor
            self.write(mQ, mS, run, back, signs, raw[i], of_row, factor, token, self.first_slot(i, tid, rank))

    @cute.jit
    def read(self, places, mT, sV, values, token, tid, rank):
        """The row from memory, into `values` or shared memory; returns this thread's sum of squares."""
        config = self.config
        rX = cute.make_rmem_tensor((self.words, self.reads), Uint32)
        rU = cute.make_rmem_tensor((self.words, self.reads if config.reads_two else 1), Uint32)
        rX.fill(0)
        rU.fill(0)
        self.load(places, rX, rU)
        if cutlass.const_expr(config.clustered):
            cute.arch.cluster_wait()  # the others' barriers and zeros stand
        squares = [Float32(0.0), Float32(0.0)]
        for j in cutlass.range_constexpr(self.reads):
            value = values[j if not config.permuted else 0]
            self.combine(rX, rU, value, j)
            self.add_squares(squares, value)
            if cutlass.const_expr(config.permuted):
                self.share(sV, rX, j, tid, rank)
        if cutlass.const_expr(config.source == "add_norm"):
            self.store_sum(mT, rX, token, tid, rank)
        return squares[0] + squares[1]

    @cute.jit
    def take(self, sV, rI, values, stage: cutlass.Constexpr, tid, rank):
        """The row that has arrived in shared memory into `values`; returns this thread's sum of squares."""
        config = self.config
        offset = stage * self.row * self.size
        squares = [Float32(0.0), Float32(0.0)]
        for j in cutlass.range_constexpr(config.chunks):
            if cutlass.const_expr(config.permuted):
                self.gather(rI, offset, values[j], j)
            else:
                self.take_chunk(sV, offset, values[j], j, tid, rank)
            self.add_squares(squares, values[j])
        return squares[0] + squares[1]

    @cute.jit
    def add_squares(self, squares, value):
        """Squares of a chunk added to two sums, so that no long chain forms."""
        if cutlass.const_expr(self.config.is_norm):
            for e in cutlass.range_constexpr(CHUNK):
                squares[e % 2] = squares[e % 2] + value[e] * value[e]


def compile_producer(config: ProducerConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in Producer.__call__, on the current stream."""
    dtype = DTYPES[config.dtype]
    m, gains, perms, padded = (cute.sym_int() for _ in range(4))
    k = config.row_chunks * CHUNK
    if config.strided:
        pitch = cute.sym_int64(divisibility=8)
        x, up = (make_fake_tensor(dtype, (m, k), (pitch, 1), assumed_align=16) for _ in range(2))
    else:
        x = row_major(dtype, (m, k), 16)
        up = row_major(dtype, (m if config.reads_two else cute.sym_int(), k), 16)
    return cute.compile(
        Producer(config),
        x,
        up,
        row_major(dtype, (m if config.source == "add_norm" else cute.sym_int(), k), 16),
        row_major(Float32, (gains,), 4),
        row_major(Int32, (perms,), 4),
        row_major(BFloat16 if config.writes_bf16 else Int8, (m, config.width), 16),
        row_major(Float32, (cute.sym_int(), padded), 4),
        Float32(1.0),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
