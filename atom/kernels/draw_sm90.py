"""A token drawn from each row of logits on Hopper (sm_90a), in CuTe DSL: min-p, top-k, top-p and draw in one kernel.

One CTA takes one row and reads it three times, from L2 for the most part: for its largest logit, for the filters, and
for the mass of its tiles. bfloat16 has 65536 values, so a filter needs no sort: logits are counted by value, the
largest first, and the counts say exactly where the k-th token and the share p of the mass lie. Ties fall on one side
together. Counts are integers and masses are added in a fixed order: the same bits on every run, in every batch.

The draw is that of serving/sampler.py: first one of the tiles by their mass, then a token of it, both as the argmax of
log-probability plus Gumbel noise that is a function of the row's key.
"""

import math

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Float64, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .draw_config import (
    BINS,
    GREEDY,
    KEY,
    LOG_MIN_P,
    LOG_RANGE,
    MULTIPLIERS,
    TEMPERATURE,
    THREADS,
    TILE,
    TOP_K,
    TOP_P,
)
from .dsl.arguments import row_major
from .dsl.arithmetic import from_bits, warp_sum
from .dsl.memory import count_in_shared
from .dsl.tensor_core import exp2
from .largest_logit_sm90 import LargestLogit

WARPS = THREADS // 32
EACH = BINS // THREADS  # bins of a thread
LOG2_E = math.log2(math.e)
SIGN = 0x8000


class Draw(LargestLogit):
    threads = THREADS

    @cute.jit
    def __call__(
        self,
        mL: cute.Tensor,  # [S, V] bfloat16, V a multiple of 8
        mW: cute.Tensor,  # [words, S] int64, serving/sampling_plan.py: Word
        mN: cute.Tensor,  # [TILE + tiles] int64: what a candidate adds to a row's key, tokens of a tile before tiles
        mLane: cute.Tensor,  # [S] int64
        mLast: cute.Tensor,  # [lanes] int64: entry mLane[s] becomes row s's token
        mT: cute.Tensor,  # [S] int64: the tokens
        address: Int64,  # address of int64 [S], on the host or the GPU: the tokens, FAULTY where there is none
        stream: cuda.CUstream,
    ):
        self.kernel(mL, mW, mN, mLane, mLast, mT, address).launch(
            grid=(mL.shape[0], 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, mL: cute.Tensor, mW: cute.Tensor, mN: cute.Tensor, mLane: cute.Tensor, mLast: cute.Tensor,
               mT: cute.Tensor, address: Int64):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        row, _, _ = cute.arch.block_idx()
        warp = tid // 32
        lane = tid % 32
        smem = utils.SmemAllocator()
        sH = smem.allocate_tensor(Int32, cute.make_layout(BINS), byte_alignment=16)
        sM = smem.allocate_tensor(Float32, cute.make_layout(THREADS), byte_alignment=16)  # of tiles
        sV = smem.allocate_tensor(Float32, cute.make_layout(WARPS), byte_alignment=16)
        sD = smem.allocate_tensor(Float64, cute.make_layout(WARPS), byte_alignment=16)
        sI = smem.allocate_tensor(Int32, cute.make_layout(WARPS), byte_alignment=16)
        sE = smem.allocate_tensor(Int32, cute.make_layout(4), byte_alignment=16)  # ends of top-k and of top-p
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()

        V = mL.shape[1]
        key = mW[KEY, row]
        temperature = Float32(self.as_float(mW[TEMPERATURE, row]))
        top_k = mW[TOP_K, row]
        top_p = Float32(self.as_float(mW[TOP_P, row]))
        log_min_p = Float32(self.as_float(mW[LOG_MIN_P, row]))
        is_greedy = self.as_float(mW[GREEDY, row]) > Float64(0.0)
        words = cute.make_rmem_tensor((4,), Uint32)

        best, token = self.largest(mL, row, tid, V, words)
        if lane == 0:
            sV[warp] = best
            sI[warp] = token
        cute.arch.sync_threads()
        best, token = self.first_of_warp(sV[lane], sI[lane])
        cute.arch.sync_threads()
        is_number = best - best == Float32(0.0)
        if is_number and not is_greedy:
            inverse = Float32(LOG2_E) / temperature
            top = self.order(self.high_half(best))
            end = Int32(2 * SIGN)  # values further below the largest than this are dropped
            if log_min_p > -Float32.inf:
                end = self.end_of_min_p(top, temperature, best / temperature + log_min_p)
            if top_k < Int64(V) or top_p < Float32(1.0):
                for i in cutlass.range(tid, BINS // 4, THREADS, unroll=1):
                    self.clear(sH, i)
                if tid < 4:
                    sE[tid] = Int32(0)
                cute.arch.sync_threads()
                for i in cutlass.range(tid, V // 8, THREADS, unroll=4):
                    self.load(mL, row, i, words)
                    for w in cutlass.range_constexpr(4):
                        self.count(sH, top - self.order(words[w] & Uint32(0xFFFF)))
                        self.count(sH, top - self.order(words[w] >> 16))
                cute.arch.sync_threads()
                end = self.filter(sH, sM, sV, sI, sE, tid, top, best, inverse, end, top_k, top_p)

            least = -Float32.inf
            if end < top:
                least = self.value(top - end)
            self.weigh(mL, sM, row, warp, lane, V, words, best, inverse, least)
            cute.arch.sync_threads()
            tiles = (V + TILE - 1) // TILE
            score = Float64(-math.inf)
            if tid < tiles and sM[tid] > Float32(0.0):
                score = Float64(cute.math.log(sM[tid])) - self.noise(key + mN[TILE + tid])
            tile = self.choose(score, tid, sD, sI, tid)
            score = Float64(-math.inf)
            place = tile * TILE + tid
            if tid < TILE and place < V:
                x = Float32(mL[row, place])
                if x >= least:
                    score = Float64(x / temperature) - self.noise(key + mN[tid])
            token = self.choose(score, place, sD, sI, tid)
        if tid == 0:
            self.tell(mLane, mLast, mT, address, row, token, is_number)

    # --- filters ---

    @cute.jit
    def end_of_min_p(self, top, temperature, floor):
        """How far below the largest the last value stands whose scaled logit reaches `floor`, in values of bfloat16."""
        end = Int32(0)
        beyond = top
        for _ in cutlass.range(16, unroll=1):
            middle = (end + beyond) // 2
            if self.value(top - middle) / temperature >= floor:
                end = middle
            else:
                beyond = middle
        return end

    @cute.jit
    def filter(self, sH, sM, sV, sI, sE, tid, top, best, inverse, end, top_k, top_p):
        """How far below the largest the last kept value stands, in values of bfloat16; min-p keeps it within `end`."""
        warp = tid // 32
        lane = tid % 32
        first = EACH * tid
        tokens = Int32(0)
        for i in cutlass.range(EACH, unroll=1):
            tokens = tokens + sH[first + i]
        before = self.sum_before(tokens, sI, warp, lane)
        if before < top_k and Int64(before + tokens) >= top_k:  # the k-th token is one of this thread's
            at = Int32(0)
            so_far = before + sH[first]
            while Int64(so_far) < top_k:
                at = at + 1
                so_far = so_far + sH[first + at]
            sE[0] = first + at + 1
        cute.arch.sync_threads()
        if sE[0] > 0 and sE[0] - 1 < end:
            end = sE[0] - 1
        mass = Float32(0.0)
        for i in cutlass.range(EACH, unroll=1):
            mass = mass + self.mass(sH, first + i, top, best, inverse, end)
        ahead = self.mass_before(mass, sV, sM, warp, lane)
        wanted = top_p * sM[WARPS]  # of the whole
        last = Int32(0)
        if ahead < wanted and mass > Float32(0.0):
            running = ahead
            for i in cutlass.range(EACH, unroll=1):
                part = self.mass(sH, first + i, top, best, inverse, end)
                if part > Float32(0.0) and running < wanted:
                    last = first + i
                running = running + part
        last = self.warp_largest(last)
        if lane == 0:
            sI[warp] = last
        cute.arch.sync_threads()
        last = self.warp_largest(sI[lane])
        if top_p < Float32(1.0):
            end = last
        return end

    @cute.jit
    def mass(self, sH, bin, top, best, inverse, end):
        """The mass of a bin's tokens if it is kept; the largest token's is 1."""
        number = sH[bin]
        found = Float32(0.0)
        if number > 0 and bin <= end:
            found = Float32(number) * exp2((self.value(top - bin) - best) * inverse)
        return found

    @cute.jit
    def running_sum(self, x, lane):
        """The sum of x over the lanes up to this one, this one included."""
        for offset in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_up(x, offset=offset)
            if lane >= offset:
                x = x + other
        return x

    @cute.jit
    def sum_before(self, x, sI, warp, lane):
        """The sum of x over the threads before this one; of integers."""
        total = self.running_sum(x, lane)
        if lane == 31:
            sI[warp] = total
        cute.arch.sync_threads()
        before = Int32(0)
        for w in cutlass.range_constexpr(WARPS):
            if w < warp:
                before = before + sI[w]
        cute.arch.sync_threads()
        return before + total - x

    @cute.jit
    def mass_before(self, x, sV, sM, warp, lane):
        """The sum of x over the threads before this one, always added in one order; the whole sum goes to sM[WARPS]."""
        total = self.running_sum(x, lane)
        if lane == 31:
            sV[warp] = total
        before = cute.arch.shuffle_sync_up(total, offset=1)
        if lane == 0:
            before = Float32(0.0)
        cute.arch.sync_threads()
        all_before = Float32(0.0)
        whole = Float32(0.0)
        for w in cutlass.range_constexpr(WARPS):
            if w == warp:
                all_before = whole
            whole = whole + sV[w]
        if warp == 0 and lane == 0:
            sM[WARPS] = whole
        cute.arch.sync_threads()
        return all_before + before

    @cute.jit
    def warp_largest(self, x):
        for offset in (16, 8, 4, 2, 1):
            other = cute.arch.shuffle_sync_bfly(x, offset=offset)
            if other > x:
                x = other
        return x

    # --- the draw ---

    @cute.jit
    def weigh(self, mL, sM, row, warp, lane, V, words, best, inverse, least):
        """The mass of each tile's tokens that reach `least`, one warp a tile; the largest token's is 1."""
        for tile in cutlass.range(warp, (V + TILE - 1) // TILE, WARPS, unroll=1):
            mass = Float32(0.0)
            for part in cutlass.range_constexpr(TILE // 256):
                vector = tile * (TILE // 8) + 32 * part + lane
                if vector < V // 8:
                    self.load(mL, row, vector, words)
                    for w in cutlass.range_constexpr(4):
                        mass = mass + self.weight(from_bits(words[w] << 16), best, inverse, least)
                        mass = mass + self.weight(from_bits(words[w] & Uint32(0xFFFF0000)), best, inverse, least)
            mass = warp_sum(mass)
            if lane == 0:
                sM[tile] = mass

    @cute.jit
    def weight(self, x, best, inverse, least):
        found = Float32(0.0)
        if x >= least:
            found = exp2((x - best) * inverse)
        return found

    @cute.jit
    def noise(self, value):
        """The logarithm of a standard exponential variable for key + counter: serving/random.py, bit by bit."""
        value = (value ^ (value >> Int64(32))) * Int64(MULTIPLIERS[0])
        value = (value ^ (value >> Int64(29))) * Int64(MULTIPLIERS[1])
        value = (value >> Int64(12)) & Int64(2**52 - 1)
        return cute.math.log(Float64(LOG_RANGE) - cute.math.log(Float64(value) + Float64(0.5)))

    @cute.jit
    def choose(self, score, place, sD, sI, tid):
        """The place of the CTA's largest score, in every thread; the first of equal ones."""
        warp = tid // 32
        lane = tid % 32
        score, place = self.best_of_warp(score, place)
        if lane == 0:
            sD[warp] = score
            sI[warp] = place
        cute.arch.sync_threads()
        score, place = self.best_of_warp(sD[lane], sI[lane])
        cute.arch.sync_threads()
        return place

    @cute.jit
    def best_of_warp(self, score, place):
        for offset in (16, 8, 4, 2, 1):
            other = self.shuffle_double(score, offset)
            there = cute.arch.shuffle_sync_bfly(place, offset=offset)
            if other > score or (other == score and there < place):
                score = other
                place = there
        return score, place

    @cute.jit
    def shuffle_double(self, x, offset: cutlass.Constexpr):
        low, high = cute.arch.inline_ptx(
            "mov.b64 {{$w0}, {$w1}}, {$r0};", write_only_types=[Uint32, Uint32], read_only_args=[x]
        )
        low = cute.arch.shuffle_sync_bfly(low, offset=offset)
        high = cute.arch.shuffle_sync_bfly(high, offset=offset)
        return cute.arch.inline_ptx(
            "mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Float64], read_only_args=[low, high]
        )

    # --- bits ---

    @cute.jit
    def order(self, bits):
        """16 bits of a bfloat16 as an integer that grows with its value; both zeros are one."""
        key = Int32(bits) + SIGN
        if bits >= Uint32(SIGN):
            key = Int32(2 * SIGN) - Int32(bits)
        return key

    @cute.jit
    def value(self, key):
        """The bfloat16 whose `order` this is, as float32."""
        found = Uint32(key - SIGN)
        if key < Int32(SIGN):
            found = Uint32(2 * SIGN - key)
        return from_bits(found << 16)

    @cute.jit
    def high_half(self, x):
        return cute.arch.inline_ptx(
            "{ .reg .b32 t; mov.b32 t, {$r0}; shr.u32 {$w0}, t, 16; }", write_only_types=[Uint32], read_only_args=[x]
        )

    @cute.jit
    def as_float(self, word):
        return cute.arch.inline_ptx("mov.b64 {$w0}, {$r0};", write_only_types=[Float64], read_only_args=[word])

    # --- memory ---

    @cute.jit
    def clear(self, sH, quad):
        zeros = cute.make_rmem_tensor((4,), Int32)
        zeros.fill(0)
        cute.autovec_copy(zeros, cute.make_tensor((sH.iterator + 4 * quad).align(16), cute.make_layout(4)))

    @cute.jit
    def count(self, sH, bin):
        if bin < Int32(BINS):
            count_in_shared((sH.iterator + bin).toint())


def compile_draw(options: str = "") -> object:
    """Compile the kernel for sm_90a; needs no GPU. Arguments as in Draw.__call__, on the current stream."""
    rows = cute.sym_int()

    return cute.compile(
        Draw(),
        row_major(BFloat16, (rows, cute.sym_int(divisibility=8)), 16),
        row_major(Int64, (cute.sym_int(), rows), 8),
        row_major(Int64, (cute.sym_int(),), 8),
        row_major(Int64, (rows,), 8),
        row_major(Int64, (cute.sym_int(),), 8),
        row_major(Int64, (rows,), 8),
        Int64(0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
