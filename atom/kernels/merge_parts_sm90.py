"""Attention over some keys and over others, merged by their sums, on Hopper (sm_90a), in CuTe DSL.

What a merge in torch costs is launches and float32 copies; this reads two results, writes one, and rounds once. A
thread takes eight channels of a head of a token.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .dsl.arguments import row_major
from .dsl.memory import pack_bf16x2
from .dsl.packed_bf16 import high_float, low_float
from .dsl.tensor_core import exp2
from .dsl.wide_access import load_streamed, store_words
from .merge_config import MergeConfig

LOG2_E = 1.4426950408889634


class MergeParts:
    """The compile-time choices of one kernel; see MergeConfig."""

    def __init__(self, config: MergeConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mOut: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: two bfloat16 each; read and written
        mSums: cute.Tensor,  # [num_heads, T] float32: its logarithms of sums of exponentials
        mOther: cute.Tensor,  # [n, num_heads, head_dim / 2] uint32
        mOtherSums: cute.Tensor,  # [num_heads, n] float32
        mPlace: cute.Tensor | None,  # [n] int64: rows of mOut, each once, where config.has_places
        first: Int32,  # else the first of n rows of mOut
        stream: cuda.CUstream,
    ):
        config = self.config
        items = mOther.shape[0] * mOther.shape[1] * config.groups
        self.kernel(mOut, mSums, mOther, mOtherSums, mPlace, first).launch(
            grid=((items + config.threads - 1) // config.threads, 1, 1),
            block=(config.threads, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self, mOut: cute.Tensor, mSums: cute.Tensor, mOther: cute.Tensor, mOtherSums: cute.Tensor,
        mPlace: Any, first: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        heads = mOther.shape[1]
        item = cta * config.threads + tid
        row = item // config.groups
        group = item - row * config.groups
        index = row // heads
        head = row - index * heads
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        if index < mOther.shape[0]:
            place = Int64(first + index)
            if cutlass.const_expr(config.has_places):
                place = mPlace[index]
            bytes_of_row = 2 * config.head_dim
            at = mOut.iterator.toint() + (place * heads + head) * bytes_of_row + 16 * group
            own = load_streamed(at)
            other = load_streamed(mOther.iterator.toint() + Int64(row) * bytes_of_row + 16 * group)
            sums = mSums[head, place]
            share = Float32(1.0) / (Float32(1.0) + exp2((sums - mOtherSums[head, index]) * Float32(LOG2_E)))
            merged = []
            for w in cutlass.range_constexpr(4):
                pair = []
                for half in (low_float, high_float):
                    value = half(own[w])
                    pair.append(value + share * (half(other[w]) - value))
                merged.append(pack_bf16x2(pair[0], pair[1]))
            store_words(at, merged)


def compile_merge(config: MergeConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in MergeParts.__call__, on the current stream."""
    heads, half = cute.sym_int(), config.head_dim // 2
    return cute.compile(
        MergeParts(config),
        row_major(Uint32, (cute.sym_int(), heads, half), 16),
        row_major(Float32, (heads, cute.sym_int()), 4),
        row_major(Uint32, (cute.sym_int(), heads, half), 16),
        row_major(Float32, (heads, cute.sym_int()), 4),
        row_major(Int64, (cute.sym_int(),), 8) if config.has_places else None,
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
