# ruff: noqa: SIM102  (an `if` of the compiler around one of the GPU is not one condition)
"""Producers of quantized activations on Hopper (sm_90a), in CuTe DSL: (RMSNorm | gate x up | plain) -> codes.

One CTA takes one token: it reads the row once into shared memory as float32 (squared sum or gated product on the
way), then each warp gathers groups of 128 columns in permuted order, finds their maximum, and writes codes and scales
in the layout that `gemm_sm90.py` reads. The rounding is that of atom/quant/rounding.py, instruction by instruction:
maxima times a float32 constant, scales rounded to their storage format, values times the scale's reciprocal, ties to
even.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from .dsl.arithmetic import reciprocal, round_to_int, warp_max, warp_sum
from .producer_config import ProducerConfig

THREADS = 256
DTYPES = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}


class Producer:
    """The compile-time choices of one kernel; see ProducerConfig."""

    def __init__(self, config: ProducerConfig) -> None:
        self.config = config
        self.warps = THREADS // 32

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,  # [M, K] input, or the gate
        mU: cute.Tensor,  # [M, K] up where the source is gated, else any
        mG: cute.Tensor,  # [K] float32 gain of the norm, else any
        mP: cute.Tensor,  # [K] int32 permutation, else any
        mQ: cute.Tensor,  # [M, columns / 4] int32: codes, four to a word
        mS: cute.Tensor,  # float32 [units, padded M] (groups) or [1, M] (token)
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
        if cutlass.const_expr(config.source == "norm"):
            squares = warp_sum(squares)
            if lane == 0:
                sR[warp] = squares
        cute.arch.sync_threads()
        if cutlass.const_expr(config.source == "norm"):
            total = Float32(0.0)
            for w in cutlass.range_constexpr(self.warps):
                total = total + sR[w]
            factor = cute.math.rsqrt(total / Float32(K) + eps)

        groups = (normal + 127) // 128
        value = cute.make_rmem_tensor((4,), Float32)
        if cutlass.const_expr(config.granularity == "group"):
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                largest = self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor)
                scale = self.scale(warp_max(largest), config.ratio, config.bf16_scale)
                self.encode(value, scale, config.qmin, config.qmax, mQ, token, 32 * g + lane)
                if lane == 0:
                    mS[g, token] = scale
        else:
            largest = Float32(0.0)
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                largest = cute.arch.fmax(largest, self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor))
            largest = warp_max(largest)
            if lane == 0:
                sR[self.warps + warp] = largest
            cute.arch.sync_threads()
            for w in cutlass.range_constexpr(self.warps):
                largest = cute.arch.fmax(largest, sR[self.warps + w])
            scale = self.scale(largest, config.ratio, config.bf16_scale)
            for g in cutlass.range(warp, groups, self.warps, unroll=1):
                self.gather(sV, mG, mP, value, 128 * g + 4 * lane, normal, factor)
                self.encode(value, scale, config.qmin, config.qmax, mQ, token, 32 * g + lane)
            if tid == 0:
                mS[0, token] = scale
        if cutlass.const_expr(config.outliers):
            if warp == self.warps - 1:
                self.outliers(sV, mG, mP, mQ, mS, value, lane, token, normal, K, groups, factor)

    @cute.jit
    def read(self, mX, mU, sV, token, tid, K):
        """The row as float32 into shared memory; returns this thread's sum of squares."""
        config = self.config
        dtype = mX.element_type
        squares = Float32(0.0)
        for i in cutlass.range(tid, K // 8, THREADS, unroll=1):
            at = Int64(token) * K + 8 * i
            x = cute.make_rmem_tensor((8,), dtype)
            cute.autovec_copy(cute.make_tensor((mX.iterator + at).align(16), cute.make_layout(8)), x)
            v = cute.make_rmem_tensor((8,), Float32)
            v.store(x.load().to(Float32))
            if cutlass.const_expr(config.source in ("silu", "gelu_tanh")):
                u = cute.make_rmem_tensor((8,), dtype)
                cute.autovec_copy(cute.make_tensor((mU.iterator + at).align(16), cute.make_layout(8)), u)
                for e in cutlass.range_constexpr(8):
                    v[e] = self.activate(v[e]) * Float32(u[e])
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
                if cutlass.const_expr(config.source == "norm"):
                    x = x * factor * mG[source]
                value[e] = x
            largest = cute.arch.fmax(largest, cute.arch.fmax(value[e], -value[e]))
        return largest

    @cute.jit
    def scale(self, largest, ratio: cutlass.Constexpr, bf16: cutlass.Constexpr):
        """atom/quant/rounding.py: maximum x ratio, 1 for a zero maximum, on the storage format's grid."""
        raw = cute.arch.fmin(largest * Float32(ratio), Float32(self.config.largest_scale))
        if raw <= Float32(0.0):
            raw = Float32(1.0)
        raw = cute.arch.fmax(raw, Float32(2.0**-126))
        if cutlass.const_expr(bf16):
            raw = Float32(BFloat16(raw))
        return raw

    @cute.jit
    def encode(self, value, scale, qmin: cutlass.Constexpr, qmax: cutlass.Constexpr, mQ, token, word):
        inverse = reciprocal(scale)
        packed = Uint32(0)
        for e in cutlass.range_constexpr(4):
            scaled = cute.arch.fmin(cute.arch.fmax(value[e] * inverse, Float32(qmin)), Float32(qmax))
            packed = packed | ((round_to_int(scaled) & Uint32(255)) << (8 * e))
        mQ[token, word] = Int32(packed)

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
    return cute.compile(
        Producer(config),
        make_fake_compact_tensor(dtype, (m, k), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(dtype, (cute.sym_int(), ku), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Float32, (gains,), stride_order=(0,), assumed_align=4),
        make_fake_compact_tensor(Int32, (perms,), stride_order=(0,), assumed_align=4),
        make_fake_compact_tensor(Int32, (m, cute.sym_int(divisibility=16)), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Float32, (cute.sym_int(), padded), stride_order=(1, 0), assumed_align=4),
        Int32(1),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
