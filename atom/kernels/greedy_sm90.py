"""The best token of each row of logits on Hopper (sm_90a), in CuTe DSL, and where the next step finds it.

One CTA takes one row: each thread keeps the largest of its vectors of eight logits and which one that was, then warps
and the CTA reduce values with their places. Logits were written by the product before and mostly still lie in L2.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from .dsl.arithmetic import from_bits, max_or_nan

THREADS = 1024
WARPS = THREADS // 32
FAULTY = -1  # what is reported for a row without a number to choose by


class Greedy:
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
        best = -Float32.inf
        at = Int32(0)
        words = cute.make_rmem_tensor((4,), Uint32)
        for i in cutlass.range(tid, V // 8, THREADS, unroll=4):
            self.load(mL, row, i, words)
            top = -Float32.inf
            for w in cutlass.range_constexpr(4):
                top = max_or_nan(top, max_or_nan(from_bits(words[w] << 16), from_bits(words[w] & Uint32(0xFFFF0000))))
            if top > best or top != top:
                best = top
                at = i
        # the first of the vector's elements that is the largest
        self.load(mL, row, at, words)
        place = 8 * at
        for w in cutlass.range_constexpr(3, -1, -1):
            if from_bits(words[w] & Uint32(0xFFFF0000)) == best:
                place = 8 * at + 2 * w + 1
            if from_bits(words[w] << 16) == best:
                place = 8 * at + 2 * w

        best, place = self.reduce(best, place)
        if lane == 0:
            sV[warp] = best
            sI[warp] = place
        cute.arch.sync_threads()
        if warp == 0:
            best, place = self.reduce(sV[lane], sI[lane])
            if lane == 0:
                token = Int64(place)
                told = token
                if best - best != Float32(0.0):  # infinite, or no number
                    token = Int64(0)
                    told = Int64(FAULTY)
                mLast[mLane[row]] = token
                mT[row] = token
                host = cute.make_ptr(Int64, address + 8 * Int64(row), cute.AddressSpace.gmem, assumed_align=8)
                cute.make_tensor(host, cute.make_layout(1))[0] = told

    @cute.jit
    def load(self, mL, row, vector, words):
        at = Int64(row) * mL.shape[1] + 8 * Int64(vector)
        source = cute.make_ptr(Uint32, (mL.iterator + at).toint(), cute.AddressSpace.gmem, assumed_align=16)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), words)

    @cute.jit
    def reduce(self, best, place):
        """The largest of a warp (or NaN), and the first place that has it."""
        for offset in (16, 8, 4, 2, 1):
            other = cute.arch.shuffle_sync_bfly(best, offset=offset)
            there = cute.arch.shuffle_sync_bfly(place, offset=offset)
            if other > best or other != other or (other == best and there < place):
                best = other
                place = there
        return best, place


def compile_greedy(options: str = "") -> object:
    """Compile the kernel for sm_90a; needs no GPU. Arguments as in Greedy.__call__, on the current stream."""
    rows = cute.sym_int()
    return cute.compile(
        Greedy(),
        make_fake_compact_tensor(BFloat16, (rows, cute.sym_int(divisibility=8)), stride_order=(1, 0), assumed_align=16),
        make_fake_compact_tensor(Int64, (rows,), stride_order=(0,), assumed_align=8),
        make_fake_compact_tensor(Int64, (cute.sym_int(),), stride_order=(0,), assumed_align=8),
        make_fake_compact_tensor(Int64, (rows,), stride_order=(0,), assumed_align=8),
        Int64(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
