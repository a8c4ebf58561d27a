"""The best token of each row of logits on Hopper (sm_90a), in CuTe DSL, and where the next step finds it.

One CTA takes one row: each thread keeps the largest of its vectors of eight logits and which one that was, then warps
and the CTA reduce values with their places. Logits were written by the product before and mostly still lie in L2.
"""

import cuda.bindings.driver as cuda
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .dsl.arguments import row_major
from .largest_logit_sm90 import LargestLogit

THREADS = 1024
WARPS = THREADS // 32


class Greedy(LargestLogit):
    threads = THREADS

    @cute.jit
    def __call__(
        self,
        mL: cute.Tensor,  # [S, V] bfloat16, V a multiple of 8
        mLane: cute.Tensor,  # [S] int64
        mLast: cute.Tensor,  # [lanes] int64: entry mLane[s] becomes row s's token
        mT: cute.Tensor,  # [S] int64: the tokens
        address: Int64,  # address of int64 [S], on the host or the GPU: the tokens, FAULTY where there is none
        stream: cuda.CUstream,
    ):
        self.kernel(mL, mLane, mLast, mT, address).launch(
            grid=(mL.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, mL: cute.Tensor, mLane: cute.Tensor, mLast: cute.Tensor, mT: cute.Tensor, address: Int64):
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        warp = tid // 32
        lane = tid % 32
        smem = utils.SmemAllocator()
        sV = smem.allocate_tensor(Float32, cute.make_layout(WARPS), byte_alignment=16)
        sI = smem.allocate_tensor(Int32, cute.make_layout(WARPS), byte_alignment=16)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        V = mL.shape[1]
        words = cute.make_rmem_tensor((4,), Uint32)
        best, place = self.largest(mL, row, tid, V, words)
        if lane == 0:
            sV[warp] = best
            sI[warp] = place
        cute.arch.sync_threads()
        if warp == 0:
            best, place = self.first_of_warp(sV[lane], sI[lane])
            if lane == 0:
                # infinite, or no number: best - best is not 0
                self.tell(mLane, mLast, mT, address, row, place, best - best == Float32(0.0))


def compile_greedy(options: str = "") -> object:
    """Compile the kernel for sm_90a; needs no GPU. Arguments as in Greedy.__call__, on the current stream."""
    rows = cute.sym_int()
    return cute.compile(
        Greedy(),
        row_major(BFloat16, (rows, cute.sym_int(divisibility=8)), 16),
        row_major(Int64, (rows,), 8),
        row_major(Int64, (cute.sym_int(),), 8),
        row_major(Int64, (rows,), 8),
        Int64(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
