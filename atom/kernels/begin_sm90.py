"""The first kernel of a decode step on Hopper (sm_90a), in CuTe DSL: it fetches the step from the host's memory.

One CTA takes one token. Its record and its block table lie in page-locked memory and are read from there, before the
kernel waits for what runs ahead of it; copies by the copy engine would cost the GPU 10 us of standing still each. A
step of the last step's sequences needs no tables: its records have what is new. Then the token is looked up (it may be
what its lane sampled last), its embedding becomes the hidden state, and its position the cosines and sines of every
rope the model has.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute.runtime import make_fake_stream

from .begin_config import BLOCKS, LANE, NEWEST, POSITION, RECORD_WORDS, RING, SLOT, SOURCE, TOKEN
from .dsl.arguments import row_major

THREADS = 256


class Begin:
    @cute.jit
    def __call__(
        self,
        records: Int64,  # address of int32 [B, RECORD_WORDS] on the host
        tables: Int64,  # address of int32 [B, width] on the host
        width: Int32,  # 0: the last step's tables, grown by at most a block each
        mLast: cute.Tensor,  # [lanes] int64: the token that each lane sampled last
        mE: cute.Tensor,  # [V, hidden] bfloat16
        scale: Float32,  # of embeddings
        mF: cute.Tensor,  # [ropes, head_dim / 2] float32: radians per position
        mA: cute.Tensor,  # [ropes] float32: factors of cosines and sines
        mH: cute.Tensor,  # [B, hidden] bfloat16: hidden states
        mR: cute.Tensor,  # [2, ropes, most B, head_dim / 2] float32: cosines, sines
        mI: cute.Tensor,  # [4, most B] int64: positions, slots, lanes, rows of exact tokens
        mN: cute.Tensor,  # [most B] int32: lengths
        mT: cute.Tensor,  # [most B, max blocks] int32: block tables
        mG: cute.Tensor,  # [most B] int32: rings
        recent: Int32,  # tokens of a recent window; 0: there is none
        capacity: Int32,  # rows of a ring
        stream: cuda.CUstream,
    ):
        self.kernel(records, tables, width, mLast, mE, scale, mF, mA, mH, mR, mI, mN, mT, mG, recent, capacity).launch(
            grid=(mH.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, records: Int64, tables: Int64, width: Int32, mLast: cute.Tensor, mE: cute.Tensor, scale: Float32,
               mF: cute.Tensor, mA: cute.Tensor, mH: cute.Tensor, mR: cute.Tensor, mI: cute.Tensor,
               mN: cute.Tensor, mT: cute.Tensor, mG: cute.Tensor, recent: Int32, capacity: Int32):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        smem = utils.SmemAllocator()
        sW = smem.allocate_tensor(Int32, cute.make_layout(RECORD_WORDS), byte_alignment=16)
        table = tables + 4 * Int64(row) * Int64(width)
        block = Int32(0)
        if tid < width:
            block = self.fetch(table, tid)
        if tid < RECORD_WORDS:  # one request over the bus
            sW[tid] = self.fetch(records + Int64(row) * (4 * RECORD_WORDS), tid)
        cute.arch.sync_threads()
        token = Int64(sW[TOKEN])
        source = sW[SOURCE]
        position = sW[POSITION]
        blocks = sW[BLOCKS]
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        if width == 0:
            if tid == 0:
                mT[row, blocks - 1] = sW[NEWEST]
        else:
            if tid < blocks:
                mT[row, tid] = block
            for i in cutlass.range(tid + THREADS, blocks, THREADS, unroll=1):
                mT[row, i] = self.fetch(table, i)
        if tid == 0:
            mN[row] = position + 1
            mI[0, row] = Int64(position)
            mI[1, row] = Int64(sW[SLOT])
            mI[2, row] = Int64(sW[LANE])
            if recent > 0:
                ring = sW[RING]
                mG[row] = ring
                exact = ring + position % capacity
                if ring < 0:  # a line, from the oldest token that this one reads exactly
                    exact = ~ring + cutlass.min(position, recent - 1)
                mI[3, row] = Int64(exact)
        if source >= 0:
            token = mLast[source]
        half = mF.shape[1]
        for i in cutlass.range(tid, mF.shape[0] * half, THREADS, unroll=1):
            rope = i // half
            channel = i % half
            angle = Float32(position) * mF[rope, channel]
            mR[0, rope, row, channel] = cute.math.cos(angle) * mA[rope]
            mR[1, rope, row, channel] = cute.math.sin(angle) * mA[rope]
        hidden = mE.shape[1]
        x = cute.make_rmem_tensor((8,), BFloat16)
        for i in cutlass.range(tid, hidden // 8, THREADS, unroll=2):
            cute.autovec_copy(self.vector(mE, token * hidden + 8 * i), x)
            if scale != Float32(1.0):
                for e in cutlass.range_constexpr(8):
                    x[e] = BFloat16(Float32(x[e]) * scale)
            cute.autovec_copy(x, self.vector(mH, Int64(row) * hidden + 8 * i))

    @cute.jit
    def fetch(self, address, word):
        """An int32 of the host's memory, past the caches: it changes while kernels run."""
        return cute.arch.inline_ptx(
            "ld.relaxed.sys.global.s32 {$w0}, [{$r0}];",
            write_only_types=[Int32],
            read_only_args=[address + 4 * Int64(word)],
        )

    @cute.jit
    def vector(self, tensor, at):
        return cute.make_tensor((tensor.iterator + at).align(16), cute.make_layout(8))


class Bring:
    """Words from the host's memory to the GPU's."""

    @cute.jit
    def __call__(self, source: Int64, mX: cute.Tensor, stream: cuda.CUstream):
        quads = mX.shape[0] // 4
        self.kernel(source, mX).launch(
            grid=((quads + THREADS - 1) // THREADS, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, source: Int64, mX: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        part, _, _ = cute.arch.block_idx()
        quad = part * THREADS + tid
        cute.arch.griddepcontrol_launch_dependents()
        if quad < mX.shape[0] // 4:
            a, b, c, d = cute.arch.inline_ptx(
                "ld.volatile.global.v4.s32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
                write_only_types=[Int32] * 4,
                read_only_args=[source + 16 * Int64(quad)],
            )
            cute.arch.griddepcontrol_wait()
            words = cute.make_rmem_tensor((4,), Int32)
            words[0] = a
            words[1] = b
            words[2] = c
            words[3] = d
            cute.autovec_copy(words, cute.make_tensor((mX.iterator + 4 * quad).align(16), cute.make_layout(4)))


def compile_begin(options: str = "") -> object:
    """Compile the kernel for sm_90a; needs no GPU. Arguments as in Begin.__call__, on the current stream."""
    hidden, half, most, ropes = cute.sym_int(divisibility=8), cute.sym_int(), cute.sym_int(), cute.sym_int()
    return cute.compile(
        Begin(),
        Int64(0),
        Int64(0),
        Int32(1),
        row_major(Int64, (cute.sym_int(),), 8),
        row_major(BFloat16, (cute.sym_int(), hidden), 16),
        Float32(1.0),
        row_major(Float32, (ropes, half), 4),
        row_major(Float32, (ropes,), 4),
        row_major(BFloat16, (cute.sym_int(), hidden), 16),
        row_major(Float32, (2, ropes, most, half), 4),
        row_major(Int64, (4, most), 8),
        row_major(Int32, (most,), 4),
        row_major(Int32, (most, cute.sym_int()), 4),
        row_major(Int32, (most,), 4),
        Int32(0),
        Int32(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )


def compile_bring(options: str = "") -> object:
    """Compile the kernel for sm_90a; needs no GPU. Takes an address on the host and int32 [n], n a multiple of 4."""
    return cute.compile(
        Bring(),
        Int64(0),
        row_major(Int32, (cute.sym_int(divisibility=4),), 16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
