"""A token's row on its way into registers: loads, residual, gate, what is found over the row, permutation.

Columns travel in chunks of 8. Without a permutation a thread rounds the chunks that it loads. With one, every CTA
takes the whole row into shared memory as it is, and each thread gathers its chunks from there.
"""

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, cute

from .dsl.arithmetic import max_of_magnitudes, warp_max_magnitude, warp_sum
from .dsl.memory import (
    load_shared_16,
    load_shared_f32,
    load_u32x4,
    peer_address,
    raise_at_peer,
    send_to_peer,
    store_shared_u32x4,
)
from .dsl.packed_floats import add, unpack
from .dsl.tensor_core import exp2, reciprocal_approx
from .dsl.wide_access import load_words, store_words
from .producer_config import CHUNK, ProducerConfig


class ProducerRows:
    """What happens to a row before it is rounded; the kernel class adds the rest."""

    config: ProducerConfig
    warps: int
    reads: int
    size: int
    words: int
    is_full: bool
    room: int
    runs: int

    @cute.jit
    def first_slot(self, i: cutlass.Constexpr, tid, rank):
        """The first slot of this thread's i-th run."""
        config = self.config
        return ((rank * self.runs + i) * config.threads + tid) * config.run

    @cute.jit
    def slot_of(self, j: cutlass.Constexpr, tid, rank):
        """The slot of this thread's j-th chunk before a rotation; behind it, chunks of a run stand in order.

        Lanes that turn runs take the four chunks of theirs in four orders, so that eight lanes' lie in all banks.
        """
        config = self.config
        place = j % config.run
        if cutlass.const_expr(config.turns_runs):
            place = Int32(place) ^ ((tid >> 1) & 3)
        return self.first_slot(j // config.run, tid, rank) + place

    @cute.jit
    def source_chunk(self, slot):
        """The chunk of the input that a slot holds, and whether there is one."""
        config = self.config
        chunk = slot
        there = slot < config.row_chunks
        if cutlass.const_expr(config.outliers > 0 and not self.is_full):
            there = slot < config.normal_chunks
            if slot >= config.outlier_slot:
                chunk = slot - (config.outlier_slot - config.normal_chunks)
                there = chunk < config.row_chunks
        return chunk, there

    @cute.jit
    def place_of_read(self, j: cutlass.Constexpr, tid, rank):
        """The chunk of the input that a thread reads as its j-th, and whether there is one."""
        config = self.config
        chunk = Int32(j * config.threads) + tid
        there = chunk < config.row_chunks
        if cutlass.const_expr(not config.permuted):
            chunk, there = self.source_chunk(self.slot_of(j, tid, rank))
        return chunk, there

    @cute.jit
    def places(self, mX, mU, token, tid, rank):
        """Where this thread's chunks of a row lie: addresses in x, those in the second input, whether there is one."""
        config = self.config
        found = []
        for j in cutlass.range_constexpr(self.reads):
            chunk, there = self.place_of_read(j, tid, rank)
            at = Int64(token * config.row_chunks + chunk) * (CHUNK * self.size)  # chunks are counted in 32 bits
            if cutlass.const_expr(config.strided):
                at = (Int64(token) * (mX.stride[0] // CHUNK) + chunk) * (CHUNK * self.size)
            second = None
            if cutlass.const_expr(config.reads_two):
                second = mU.iterator.toint() + at
            found.append((mX.iterator.toint() + at, second, there))
        return found

    @cute.jit
    def load(self, places, rX, rU):
        """What this thread reads of a row, into registers; zeros where there is nothing."""
        for j in cutlass.range_constexpr(self.reads):
            first, second, there = places[j]
            if cutlass.const_expr(self.is_full):
                self.load_chunk(first, second, rX, rU, j)
            else:
                if there:
                    self.load_chunk(first, second, rX, rU, j)

    @cute.jit
    def load_chunk(self, first, second, rX, rU, j: cutlass.Constexpr):
        for q in cutlass.range_constexpr(self.words // 4):
            words = load_words(first + 16 * q)
            for w in cutlass.range_constexpr(4):
                rX[4 * q + w, j] = words[w]
            if cutlass.const_expr(self.config.reads_two):
                words = load_words(second + 16 * q)
                for w in cutlass.range_constexpr(4):
                    rU[4 * q + w, j] = words[w]

    @cute.jit
    def combine(self, rX, rU, value, j: cutlass.Constexpr):
        """Chunk j as float32 into `value`: the input itself, the gated product, or the residual sum, also into rX."""
        config = self.config
        if cutlass.const_expr(config.source == "add_norm"):
            for w in cutlass.range_constexpr(self.words):
                rX[w, j] = add(rU[w, j], rX[w, j], config.dtype)  # rounded as the residual stream is stored
        x = unpack([rX[w, j] for w in range(self.words)], config.dtype)
        if cutlass.const_expr(config.is_gated):
            up = unpack([rU[w, j] for w in range(self.words)], config.dtype)
            x = [self.activate(x[e]) * up[e] for e in range(CHUNK)]
        for e in cutlass.range_constexpr(CHUNK):
            value[e] = x[e]

    @cute.jit
    def activate(self, x):
        """silu, or gelu by tanh(a) = 1 - 2 / (1 + exp(2 a)): safe at both ends."""
        if cutlass.const_expr(self.config.source == "silu"):
            return x * sigmoid(x)
        inner = Float32(0.7978845608028654) * (x + Float32(0.044715) * x * x * x)
        return x * sigmoid(inner + inner)

    @cute.jit
    def store_sum(self, mT, rX, token, tid, rank):
        """The residual sum to memory; of CTAs that all have the row each writes a part."""
        config = self.config
        for j in cutlass.range_constexpr(self.reads):
            chunk, there = self.place_of_read(j, tid, rank)
            if cutlass.const_expr(config.permuted and config.parts > 1):
                there = there and j // config.chunks == rank
            if there:
                at = mT.iterator.toint() + Int64(token * config.row_chunks + chunk) * (CHUNK * self.size)
                for q in cutlass.range_constexpr(self.words // 4):
                    store_words(at + 16 * q, [rX[4 * q + w, j] for w in range(4)])

    @cute.jit
    def share(self, sV, rX, j: cutlass.Constexpr, tid, rank):
        """Chunk j as it was read into shared memory."""
        chunk, there = self.place_of_read(j, tid, rank)
        at = sV.iterator.toint() + chunk * (CHUNK * self.size)
        if cutlass.const_expr(self.is_full):
            for q in cutlass.range_constexpr(self.words // 4):
                store_shared_u32x4(at + 16 * q, [rX[4 * q + w, j] for w in range(4)])
        else:
            if there:
                for q in cutlass.range_constexpr(self.words // 4):
                    store_shared_u32x4(at + 16 * q, [rX[4 * q + w, j] for w in range(4)])

    @cute.jit
    def take_chunk(self, sV, offset: cutlass.Constexpr, value, j: cutlass.Constexpr, tid, rank):
        """This thread's j-th chunk from the row that begins `offset` bytes into shared memory, as float32."""
        chunk, there = self.place_of_read(j, tid, rank)
        at = sV.iterator.toint() + (offset + chunk * (CHUNK * self.size))
        if cutlass.const_expr(self.is_full):
            self.take_words(at, value)
        else:
            value.fill(0.0)
            if there:
                self.take_words(at, value)

    @cute.jit
    def take_words(self, at, value):
        words = []
        for q in cutlass.range_constexpr(self.words // 4):
            words += list(load_u32x4(at + 16 * q))
        found = unpack(words, self.config.dtype)
        for e in cutlass.range_constexpr(CHUNK):
            value[e] = found[e]

    @cute.jit
    def tell_row(
        self, sR, peers, at: cutlass.Constexpr, values, sums: cutlass.Constexpr, tid, is_whole: cutlass.Constexpr
    ):
        """This warp's sums, or maxima of what is not negative, to all that work on the row; see hear_row.

        values    this thread's part of each
        sums      of each, whether it is a sum
        peers     what find_peers returns
        at        where in sR there is room for `parts x warps` sums and, `self.room` behind it, for as many maxima;
                  in a cluster for one, of all warps, which is 0 at first
        is_whole  whether each CTA of the token has all of it, so that none needs to ask the others
        """
        config = self.config
        warp = tid // 32
        lane = tid % 32
        of_warp = [over_warp(values[i], sums[i]) for i in range(len(sums))]
        if cutlass.const_expr(config.clustered and not is_whole):
            if lane < config.parts:
                for i in cutlass.range_constexpr(len(sums)):
                    place, barrier = peers[0 if sums[i] else 1]
                    if cutlass.const_expr(sums[i]):  # each has a place of its own, so that they are added in one order
                        send_to_peer(place, barrier, of_warp[i])
                    else:
                        raise_at_peer(place, barrier, of_warp[i])
        else:
            if lane == 0:
                for i in cutlass.range_constexpr(len(sums)):
                    sR[at + self.room_of(sums[i]) + warp] = of_warp[i]

    @cute.jit
    def hear_row(self, sR, met, at: cutlass.Constexpr, sums: cutlass.Constexpr, tid, is_whole: cutlass.Constexpr):
        """Those sums and maxima over the whole row, in every thread, once all warps have told theirs."""
        config = self.config
        clustered = config.clustered and not is_whole
        if cutlass.const_expr(clustered):
            for i in cutlass.range_constexpr(len(sums)):
                wait_awake(met + (0 if sums[i] else 1))
        else:
            cute.arch.sync_threads()
        count = self.warps * (config.parts if clustered else 1)
        found = []
        for is_sum in sums:
            if cutlass.const_expr(clustered and not is_sum):
                found.append(sR[at + self.room])
            else:
                found.append(self.over_warps(sR, at + self.room_of(is_sum), count, is_sum, tid % 32))
        return found

    @cute.jit
    def find_peers(self, sR, met, tid, rank):
        """For the sum and for the maximum: where it goes in the CTA that this lane tells, and what counts it there.

        met   barriers that count what the CTAs of a cluster send, one for the sum and one for the maximum
        """
        peer = cutlass.min(tid % 32, Int32(self.config.parts - 1))
        places = [sR.iterator.toint() + 4 * at for at in (rank * self.warps + tid // 32, self.room)]
        return [(peer_address(places[i], peer), peer_address((met + i).toint(), peer)) for i in range(2)]

    def room_of(self, is_sum: bool) -> int:
        return 0 if is_sum else self.room

    @cute.jit
    def over_warps(self, sR, at: cutlass.Constexpr, count: cutlass.Constexpr, is_sum: cutlass.Constexpr, lane):
        """The sum or maximum of what `count` warps left in shared memory."""
        value = Float32(0.0)
        if cutlass.const_expr(count > 16):
            for i in cutlass.range_constexpr(-(-count // 32)):
                part = Float32(0.0)
                if 32 * i + lane < count:
                    part = sR[at + 32 * i + lane]
                value = reduced([value, part], is_sum)
            value = over_warp(value, is_sum)
        else:
            value = reduced([sR[at + i] for i in range(count)], is_sum)
        return value

    @cute.jit
    def gather(self, rI, offset: cutlass.Constexpr, value, j: cutlass.Constexpr):
        """The values of slot j in permuted order: they lie in shared memory, `offset` bytes behind rI's addresses."""
        for e in cutlass.range_constexpr(CHUNK):
            address = rI[e, j]
            if cutlass.const_expr(self.config.dtype == "float32"):
                value[e] = load_shared_f32(address, offset)
            else:
                value[e] = load_shared_16(address, offset, self.config.dtype)

    @cute.jit
    def largest(self, value, found):
        """The largest magnitude of a chunk, or `found` if that is larger."""
        pairs = [max_of_magnitudes(value[e], value[e + 1]) for e in range(0, CHUNK, 2)]
        return reduced([found, *pairs], False)


@cute.jit
def wait_awake(barrier: Any):
    """Wait for the first phase of a barrier, never asleep as in cute.arch.mbarrier_wait: waking takes 0.05 us."""
    is_there = cute.arch.mbarrier_test_wait(barrier, 0)
    while not is_there:
        is_there = cute.arch.mbarrier_test_wait(barrier, 0)


@cute.jit
def sigmoid(x: Any):
    """1 / (1 + exp(-x)); 0 or 1 at the ends."""
    return reciprocal_approx(Float32(1.0) + exp2(x * Float32(-1.4426950408889634)))


def over_warp(value: Any, is_sum: bool) -> Any:
    """The sum over a warp, or the maximum of what is not negative, in every lane."""
    return warp_sum(value) if is_sum else warp_max_magnitude(value)


def reduced(values: list[Any], is_sum: bool) -> Any:
    """The sum or maximum of values, pairwise."""
    while len(values) > 1:
        pairs = [
            (values[i] + values[i + 1] if is_sum else cute.arch.fmax(values[i], values[i + 1]))
            for i in range(0, len(values) - 1, 2)
        ]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]
