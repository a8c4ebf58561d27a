"""The fetching warp of the decode kernel (sm_90a): tiles into the ring, queries and what a segment is before them."""

import cutlass
from cutlass import Int32, Int64, cute

from .attention_config import DecodeConfig
from .dsl.memory import bulk_load, bulk_stream

META = 8  # int32s of a segment that it hands on: head, begin, end, place, length, token


class DecodeFetch:
    """What the kernel class mixes in."""

    config: DecodeConfig

    @cute.jit
    def start_ring(self, full, empty, ready, taken, readers: cutlass.Constexpr):
        """One warp makes the barriers; `readers` warps take each stage, and all of them a segment's queries."""
        config = self.config
        with cute.arch.elect_one():
            for s in cutlass.range_constexpr(config.stages):
                cute.arch.mbarrier_init(full + s, 1)
                cute.arch.mbarrier_init(empty + s, readers)
            for s in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(ready + s, 1)
                cute.arch.mbarrier_init(taken + s, config.warps)
        cute.arch.mbarrier_init_fence()

    @cute.jit
    def produce(
        self, mQ, mKV, mTable, mLength, mRow, mSegment, full, empty, ready, taken, ring, queries, sMeta, first, last,
        lane,
    ):  # fmt: skip
        """One warp: the tiles of the CTA's segments into the ring, and each one's queries before them.

        Only a sequence's last token is of this step, and those `ahead` of it, so plan and tiles before them are fetched
        while the kernel that appends still runs. That kernel lets this one start when it has waited for all before it,
        and no sooner.
        """
        config = self.config
        ahead = config.stage_blocks
        slot = Int32(0)
        phase = Int32(1)  # of `empty`: what was never filled counts as emptied
        begun = Int32(0)  # stages of the first segment that are under way before its turn
        entry = Int32(0)
        sequence, head, begin, end, place, length, token = (Int32(0) for _ in range(7))
        stride = mKV.shape[1] * config.tile_bytes
        if first < last:
            sequence, head, begin, end, place, length, token = self.segment(mLength, mRow, mSegment, first)
            origin = mKV.iterator + Int64(head) * config.tile_bytes
            entry = mTable[sequence, cutlass.min(begin + lane, mTable.shape[1] - 1)]  # 32 blocks of the table at a time
            stored = length + (config.recent - 1) - mSegment[first, 7]  # in steps before
            old = cutlass.min(stored // config.block_size, end) - begin
            old = cutlass.max(cutlass.min(old, Int32(32)), Int32(0))
            begun = cutlass.min(old // ahead, Int32(config.stages))
            for i in cutlass.range(0, begun, config.at_once, unroll=1):
                slot, phase = self.fetch(
                    origin, stride, full, empty, ring, entry, ahead * i, ahead * begun, slot, phase
                )  # fmt: skip
        cute.arch.griddepcontrol_wait()
        for index in cutlass.range(first, last, unroll=1):
            turn = index - first
            buffer = turn % 2
            cute.arch.mbarrier_wait(taken + buffer, (turn // 2 + 1) % 2)
            with cute.arch.elect_one():
                for i, value in enumerate((head, begin, end, place, length, token)):
                    sMeta[i, buffer] = value
                cute.arch.mbarrier_arrive_and_expect_tx(ready + buffer, config.query_bytes)
                at = (Int64(token) * mQ.shape[1] + head * config.queries) * (config.head_dim // 2)
                bulk_load(
                    queries + buffer * config.query_bytes, mQ.iterator + at, Int32(config.query_bytes), ready + buffer
                )
            following = self.segment(mLength, mRow, mSegment, cutlass.min(index + 1, last - 1))
            origin = mKV.iterator + Int64(head) * config.tile_bytes
            blocks = end - begin
            chunks = (blocks + 31) // 32
            for chunk in cutlass.range(chunks, unroll=1):
                done = 32 * chunk
                here = cutlass.min(blocks - done, Int32(32))
                now = entry
                row = sequence
                column = begin + done + 32 + lane
                if chunk + 1 == chunks:
                    row = following[0]
                    column = following[2] + lane
                entry = mTable[row, cutlass.min(column, mTable.shape[1] - 1)]  # for the next chunk
                for i in cutlass.range(begun, (here + ahead - 1) // ahead, config.at_once, unroll=1):
                    slot, phase = self.fetch(origin, stride, full, empty, ring, now, ahead * i, here, slot, phase)
                begun = Int32(0)
            sequence, head, begin, end, place, length, token = following

    @cute.jit
    def segment(self, mLength, mRow, mSegment, index):
        """What a segment is: sequence, head, begin, end, place (-1 if its row has no other parts), length, token.

        The length is that of the tokens which this kernel reads: without the newest, where another reads those.
        """
        sequence, head, begin, end = (mSegment[index, i] for i in range(4))
        place = index if mSegment[index, 5] != 1 else Int32(-1)
        length = mLength[sequence]
        if cutlass.const_expr(self.config.recent):
            length = length - self.config.recent
        return sequence, head, begin, self.end_of(mSegment, index, end, length), place, length, mRow[sequence]

    @cute.jit
    def end_of(self, mSegment, index, end, length):
        """A row's last segment goes to the sequence's end, wherever that has come since the plan was made."""
        blocks = (length + (self.config.block_size - 1)) // self.config.block_size
        return blocks if index + 1 == mSegment[index, 4] + (mSegment[index, 5] & 0xFFFF) else end

    @cute.jit
    def fetch(self, origin, stride, full, empty, ring, entry, block, here, slot, phase):
        """Stages, `at_once` of them or what is left: blocks `block` ... of those (`here`) whose places lanes hold.

        origin   the KV head's tile of the pool's first block; stride  bytes from one block to the next
        entry    of each lane, the place of one of 32 blocks
        returns  the ring's next stage
        """
        config = self.config
        size = config.stage_blocks
        places = [cute.arch.shuffle_sync(entry, block + k) for k in range(config.at_once * size)]
        slots = [slot]
        cute.arch.mbarrier_wait(empty + slot, phase)
        slot, phase = self.advance(slot, phase)
        for i in cutlass.range_constexpr(1, config.at_once):
            slots.append(slot)
            if here - block > size * i:
                cute.arch.mbarrier_wait(empty + slot, phase)
                slot, phase = self.advance(slot, phase)
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(config.at_once):
                present = cutlass.min(here - block - size * i, Int32(size))
                target = ring + slots[i] * config.stage_bytes
                if present > 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(full + slots[i], present * config.tile_bytes)
                for k in cutlass.range_constexpr(size):
                    if k < present:
                        bulk_stream(
                            target + k * config.tile_bytes, origin + Int64(places[size * i + k]) * Int64(stride),
                            Int32(config.tile_bytes), full + slots[i],
                        )  # fmt: skip
        return slot, phase
