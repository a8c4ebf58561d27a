"""Partial results of split rows to outputs, on Hopper (sm_90a), in CuTe DSL: the end of a split decode attention.

One CTA takes one row (sequence and KV head) and query head; groups of threads take every `groups`-th partial result, a
thread four channels of it, and add up in a fixed order: the same bits on every run.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from .attention_config import MergeConfig
from .dsl.tensor_core import exp2

LOWEST = -1.0e30


class MergePartials:
    """The compile-time choices of one kernel; see MergeConfig."""

    def __init__(self, config: MergeConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mMerge: cute.Tensor,  # [M, 4] int32, AttentionPlan.merges; rows of zeros beyond
        mRow: cute.Tensor,  # [B] int32: the sequence's query token
        mPartial: cute.Tensor,  # [slots, queries, head_dim] float32
        mLse: cute.Tensor,  # [slots, queries] float32
        mO: cute.Tensor,  # [T, num_heads, head_dim] bfloat16
        stream: cuda.CUstream,
    ):
        self.kernel(mMerge, mRow, mPartial, mLse, mO).launch(
            grid=(mMerge.shape[0], self.config.queries, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, mMerge: cute.Tensor, mRow: cute.Tensor, mPartial: cute.Tensor, mLse: cute.Tensor, mO: cute.Tensor):
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        row, query, _ = cute.arch.block_idx()
        smem = utils.SmemAllocator()
        sO = smem.allocate_tensor(Float32, cute.make_layout((config.head_dim, config.groups)), byte_alignment=16)
        sM = smem.allocate_tensor(Float32, cute.make_layout(config.groups), byte_alignment=16)
        sL = smem.allocate_tensor(Float32, cute.make_layout(config.groups), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        first = mMerge[row, 2]
        count = mMerge[row, 3]
        if count > 0:
            group = tid // config.quads
            channel = tid % config.quads * 4
            top = Float32(LOWEST)
            weight = Float32(0.0)
            value = cute.make_rmem_tensor((4,), Float32)
            value.fill(0.0)
            part = cute.make_rmem_tensor((4,), Float32)
            if group < config.groups:
                for i in cutlass.range(group, count, config.groups, unroll=4):
                    slot = first + i
                    lse = mLse[slot, query]
                    at = (Int64(slot) * config.queries + query) * config.head_dim + channel
                    cute.autovec_copy(cute.make_tensor((mPartial.iterator + at).align(16), cute.make_layout(4)), part)
                    higher = cute.arch.fmax(top, lse)
                    shrink = exp2(top - higher)
                    share = exp2(lse - higher)
                    top = higher
                    weight = weight * shrink + share
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] * shrink + share * part[e]
                for e in cutlass.range_constexpr(4):
                    sO[channel + e, group] = value[e]
                if channel == 0:
                    sM[group] = top
                    sL[group] = weight
            cute.arch.sync_threads()
            if tid < config.quads:
                top = Float32(LOWEST)
                for g in cutlass.range_constexpr(config.groups):
                    top = cute.arch.fmax(top, sM[g])
                weight = Float32(0.0)
                value.fill(0.0)
                for g in cutlass.range_constexpr(config.groups):
                    share = exp2(sM[g] - top)
                    weight = weight + share * sL[g]
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] + share * sO[channel + e, g]
                inverse = Float32(1.0) / weight
                for e in cutlass.range_constexpr(4):
                    value[e] = value[e] * inverse
                out = cute.make_rmem_tensor((4,), BFloat16)
                out.store(value.load().to(BFloat16))
                token = mRow[mMerge[row, 0]]
                head = mMerge[row, 1] * config.queries + query
                at = (Int64(token) * mO.shape[1] + head) * config.head_dim + channel
                cute.autovec_copy(out, cute.make_tensor((mO.iterator + at).align(8), cute.make_layout(4)))


def compile_merge(config: MergeConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in MergePartials.__call__, on the current stream."""
    dim, queries = config.head_dim, config.queries

    def compact(dtype, shape, align):
        order = tuple(range(len(shape) - 1, -1, -1))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    return cute.compile(
        MergePartials(config),
        compact(Int32, (cute.sym_int(), 4), 16),
        compact(Int32, (cute.sym_int(),), 4),
        compact(Float32, (cute.sym_int(), queries, dim), 16),
        compact(Float32, (cute.sym_int(), queries), 4),
        compact(BFloat16, (cute.sym_int(), cute.sym_int(), dim), 16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
