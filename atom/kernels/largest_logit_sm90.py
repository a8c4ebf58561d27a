"""The largest of a row of bfloat16 logits and where its token goes: for kernels in which a CTA takes a row (sm_90a)."""

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from .draw_config import FAULTY
from .dsl.arithmetic import from_bits, max_or_nan


class LargestLogit:
    """What a kernel class mixes in; `threads` of its CTA."""

    threads: int

    @cute.jit
    def largest(self, mL, row, tid, V, words):
        """The largest logit of this thread's warp (or NaN) and the first token that has it, in every lane."""
        best = -Float32.inf
        at = Int32(0)
        for i in cutlass.range(tid, V // 8, self.threads, unroll=4):
            self.load(mL, row, i, words)
            top = -Float32.inf
            for w in cutlass.range_constexpr(4):
                top = max_or_nan(top, max_or_nan(from_bits(words[w] << 16), from_bits(words[w] & Uint32(0xFFFF0000))))
            if top > best or top != top:
                best = top
                at = i
        self.load(mL, row, at, words)
        place = 8 * at
        for w in cutlass.range_constexpr(3, -1, -1):
            if from_bits(words[w] & Uint32(0xFFFF0000)) == best:
                place = 8 * at + 2 * w + 1
            if from_bits(words[w] << 16) == best:
                place = 8 * at + 2 * w
        return self.first_of_warp(best, place)

    @cute.jit
    def first_of_warp(self, best, place):
        """The largest value of a warp (or NaN), and the first place that has it."""
        for offset in (16, 8, 4, 2, 1):
            other = cute.arch.shuffle_sync_bfly(best, offset=offset)
            there = cute.arch.shuffle_sync_bfly(place, offset=offset)
            if other > best or other != other or (other == best and there < place):
                best = other
                place = there
        return best, place

    @cute.jit
    def tell(self, mLane, mLast, mT, address, row, token, is_number):
        """Write a row's token where the next step, the sampler and the host look for it; 0 and FAULTY if it has none.

        mLane, mLast, mT, address  see Greedy.__call__
        """
        found = Int64(token)
        told = found
        if not is_number:
            found = Int64(0)
            told = Int64(FAULTY)
        mLast[mLane[row]] = found
        mT[row] = found
        host = cute.make_ptr(Int64, address + 8 * Int64(row), cute.AddressSpace.gmem, assumed_align=8)
        cute.make_tensor(host, cute.make_layout(1))[0] = told

    @cute.jit
    def load(self, mL, row, vector, words):
        at = Int64(row) * mL.shape[1] + 8 * Int64(vector)
        source = cute.make_ptr(Uint32, (mL.iterator + at).toint(), cute.AddressSpace.gmem, assumed_align=16)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), words)
