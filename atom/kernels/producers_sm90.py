# ruff: noqa: SIM102  (an `if` of the compiler around one of the GPU is not one condition)
"""Producers of quantized activations on Hopper (sm_90a), in CuTe DSL: ([add] RMSNorm | gate x up | plain) -> codes.

One CTA takes one token: it reads the row once into shared memory as float32 (residual add, squared sum or gated
product on the way), then each warp gathers groups of 128 columns in permuted order, finds their maximum, and writes
codes and scales, or bfloat16 values, in the layout that `gemm_sm90.py` reads. The rounding stands in
producer_encode_sm90.py.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float16, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from .dsl.arithmetic import reciprocal, warp_max, warp_sum
from .producer_config import ProducerConfig
from .producer_encode_sm90 import ProducerEncode

THREADS = 256
DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


class Producer(ProducerEncode):
    """The compile-time choices of one kernel; see ProducerConfig."""

    def __init__(self, config: ProducerConfig) -> None:
        self.config = config
        self.is_norm = config.source in ("norm", "add_norm")
        self.warps = THREADS // 32

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # [M, K] input, or the gate, or what is added to the residual, and then their sum
        mU: cute.Tensor,  # [M, K] up where the source is gated, the residual where it adds, else any
        mG: cute.Tensor,  # [K] float32 gain of the norm, else any
        mP: cute.Tensor,  # [K] int32 permutation, else any
        mQ: cute.Tensor,  # [M, words] int32: codes, four to a word, or bfloat16, two to a word
        mS: cute.Tensor,  # float32 [units, padded M] (group), [1, M] (token, or small under an outer scale), else any
        normal: Int32,  # columns before the outliers
        eps: Float32,
        stream: cuda.CUstream,
    ):
        self.kernel(mX, mU, mG, mP, mQ, mS, normal, eps).launch(
            grid=(mX.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mU: cute.Tensor, mG: cute.Tensor, mP: cute.Tensor, mQ: cute.Tensor,
               mS: cute.Tensor, normal: Int32, eps: Float32):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        warp = tid // 32
        lane = tid % 32
        K = mX.shape[1]
        smem = utils.SmemAllocator()
        sV = smem.allocate_tensor(Float32, cute.make_layout(config.max_columns), byte_alignment=16)
        sR = smem.allocate_tensor(Float32, cute.make_layout(2 * self.warps), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        squares = self.read(mX, mU, sV, token, tid, K)
        factor = Float32(1.0)
        if cutlass.const_expr(self.is_norm):
            squares = warp_sum(squares)
            if lane == 0:
                sR[warp] = squares
        cute.arch.sync_threads()
        if cutlass.const_expr(self.is_norm):
            total = Float32(0.0)
            for w in cutlass.range_constexpr(self.warps):
                total = total + sR[w]
            factor = cute.math.rsqrt(total / Float32(K) + eps)

        groups = (normal + 127) // 128
        value = cute.make_rmem_tensor((4,), Float32)
        if cutlass.const_expr(config.rounding == "group"):
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                largest = self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor)
                scale = self.scale(warp_max(largest), config.ratio, config.scale_format == "bf16")
                self.encode(value, scale, *config.code_range, mQ, token, 32 * g + lane)
                if lane == 0:
                    mS[g, token] = scale
        elif cutlass.const_expr(config.rounding == "token"):
            largest = self.largest_of_row(sV, sR, mG, mP, value, tid, groups, normal, factor)
            scale = self.scale(largest, config.ratio, config.scale_format == "bf16")
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor)
                if cutlass.const_expr(config.format == "fp8_e4m3"):
                    self.encode_e4m3(value, scale, mQ, token, 32 * g + lane)
                else:
                    self.encode(value, scale, *config.code_range, mQ, token, 32 * g + lane)
            if tid == 0:
                mS[0, token] = scale
        else:
            outer = Float32(1.0)
            if cutlass.const_expr(config.scale_format == "e4m3"):
                outer = self.outer_scale(self.largest_of_row(sV, sR, mG, mP, value, tid, groups, normal, factor))
                if tid == 0:
                    mS[0, token] = outer
            inverse_outer = reciprocal(outer)
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                column = 128 * g + 4 * lane
                largest = self.gather(sV, mG, mP, value, column, normal, factor)
                if cutlass.const_expr(config.rounding == "small"):
                    scale = self.small_scale(self.group_max(largest), inverse_outer)
                    self.round_small(value, scale, scale * outer)
                if column < normal:
                    self.store_bf16(value, mQ, token, column)
        if cutlass.const_expr(config.outliers):
            if warp == self.warps - 1:
                self.outliers(sV, mG, mP, mQ, mS, value, lane, token, normal, K, groups, factor)

    @cute.jit
    def largest_of_row(self, sV, sR, mG, mP, value, tid, groups, normal, factor):
        """The largest magnitude of the normal columns, in every thread."""
        warp = tid // 32
        lane = tid % 32
        largest = Float32(0.0)
        for g in cutlass.range(warp, groups, self.warps, unroll=1):
            largest = cute.arch.fmax(largest, self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor))
        largest = warp_max(largest)
        if lane == 0:
            sR[self.warps + warp] = largest
        cute.arch.sync_threads()
        for w in cutlass.range_constexpr(self.warps):
            largest = cute.arch.fmax(largest, sR[self.warps + w])
        return largest

    @cute.jit
    def read(self, mX, mU, sV, token, tid, K):
        """The row as float32 into shared memory; returns this thread's sum of squares."""
        config = self.config
        dtype = mX.element_type
        squares = Float32(0.0)
        for i in cutlass.range(tid, K // 8, THREADS, unroll=1):
            at = Int64(token) * K + 8 * i
            if cutlass.const_expr(config.strided):
                at = Int64(token) * mX.stride[0] + 8 * i
            x = cute.make_rmem_tensor((8,), dtype)
            cute.autovec_copy(cute.make_tensor((mX.iterator + at).align(16), cute.make_layout(8)), x)
            v = cute.make_rmem_tensor((8,), Float32)
            v.store(x.load().to(Float32))
            if cutlass.const_expr(config.source in ("silu", "gelu_tanh")):
                u = cute.make_rmem_tensor((8,), dtype)
                cute.autovec_copy(cute.make_tensor((mU.iterator + at).align(16), cute.make_layout(8)), u)
                for e in cutlass.range_constexpr(8):
                    v[e] = self.activate(v[e]) * Float32(u[e])
            if cutlass.const_expr(config.source == "add_norm"):
                old = cute.make_rmem_tensor((8,), dtype)
                cute.autovec_copy(cute.make_tensor((mU.iterator + at).align(16), cute.make_layout(8)), old)
                for e in cutlass.range_constexpr(8):
                    x[e] = dtype(Float32(old[e]) + v[e])  # rounded as the residual stream is stored
                    v[e] = Float32(x[e])
                cute.autovec_copy(x, cute.make_tensor((mX.iterator + at).align(16), cute.make_layout(8)))
            for e in cutlass.range_constexpr(8):
                squares = squares + v[e] * v[e]
            cute.autovec_copy(v, cute.make_tensor((sV.iterator + 8 * i).align(16), cute.make_layout(8)))
        return squares

    @cute.jit
    def activate(self, x):
        if cutlass.const_expr(self.config.source == "silu"):
            return x / (Float32(1.0) + cute.math.exp(-x))
        inner = Float32(0.7978845608028654) * (x + Float32(0.044715) * x * x * x)
        # tanh(a) = 1 - 2 / (1 + exp(2 a)): safe at both ends
        return x * (Float32(1.0) - Float32(1.0) / (Float32(1.0) + cute.math.exp(Float32(2.0) * inner)))

    @cute.jit
    def gather(self, sV, mG, mP, value, column, normal, factor):
        """Four permuted (and normed) values from `column` on, zero past `normal`; returns the largest magnitude."""
        config = self.config
        largest = Float32(0.0)
        for e in cutlass.range_constexpr(4):
            value[e] = Float32(0.0)
            if column + e < normal:
                source = column + e
                if cutlass.const_expr(config.permuted):
                    source = mP[column + e]
                x = sV[source]
                if cutlass.const_expr(self.is_norm):
                    x = x * factor * mG[source]
                value[e] = x
            largest = cute.arch.fmax(largest, cute.arch.fmax(value[e], -value[e]))
        return largest

    @cute.jit
    def outliers(self, sV, mG, mP, mQ, mS, value, lane, token, normal, K, groups, factor):
        """One warp: at most 256 columns under one INT8 scale, padded with zeros to units of 64."""
        largest = Float32(0.0)
        for part in cutlass.range_constexpr(2):
            largest = cute.arch.fmax(largest, self.gather(sV, mG, mP, value, normal + 128 * part + 4 * lane, K, factor))
        scale = self.scale(warp_max(largest), 1.0 / 127.0, True)
        units = (K - normal + 63) // 64
        for part in cutlass.range_constexpr(2):
            self.gather(sV, mG, mP, value, normal + 128 * part + 4 * lane, K, factor)
            if 2 * part + lane // 16 < units:
                self.encode(value, scale, -128, 127, mQ, token, 32 * groups + 32 * part + lane)
        if lane < units:
            mS[groups + lane, token] = scale


def compile_producer(config: ProducerConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in Producer.__call__, on the current stream."""
    dtype = DTYPES[config.dtype]
    m, k, ku, gains, perms, padded = (cute.sym_int() for _ in range(6))
    if config.strided:
        pitch = cute.sym_int64(divisibility=8)
        x, up = (make_fake_tensor(dtype, (m, k), (pitch, 1), assumed_align=16) for _ in range(2))
    else:
        x = make_fake_compact_tensor(dtype, (m, k), stride_order=(1, 0), assumed_align=16)
        up = make_fake_compact_tensor(dtype, (cute.sym_int(), ku), stride_order=(1, 0), assumed_align=16)
    words = cute.sym_int(divisibility=4 if config.writes_bf16 else 16)
    return cute.compile(
        Producer(config),
        x,
        up,
        make_fake_compact_tensor(Float32, (gains,), stride_order=(0,), assumed_align=4),
        make_fake_compact_tensor(Int32, (perms,), stride_order=(0,), assumed_align=4),
        make_fake_compact_tensor(Int32, (m, words), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Float32, (cute.sym_int(), padded), stride_order=(1, 0), assumed_align=4),
        Int32(1),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
