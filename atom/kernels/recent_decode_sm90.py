"""Decode attention over the newest tokens of each sequence, exact in a ring store, on Hopper (sm_90a), in CuTe DSL.

The kernel beside paged_decode_sm90.py where a scheme reads the last `tokens` keys and values unrounded
(paged_step.RecentStep): its partial results are what that one adds to those of the rounded tokens. A warp takes 16
tokens of a row (a sequence and KV head), its `config.tiles` warps put theirs together in shared memory.

What a reader must know: both products stand on their heads, as in decode_stage_sm90.py. Nothing is staged: a lane loads
its fragments of mma from global memory, eight neighbouring channels at a time, which takes channels in another order
than they lie in; queries are loaded in the same order, and outputs come out as eight neighbours. This kernel stands
between the one that appends and the decode kernel, which may start as soon as all CTAs of this one have: what that
fetches early was there before the kernel that appends. This one asks for its lines before it waits.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils as utils
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .decode_stage_sm90 import LOG2_E, LOWEST
from .dsl.arguments import row_major
from .dsl.memory import load_f32x4, pack_bf16x2, store_f32x4
from .dsl.tensor_core import exp2, log2, mma_bf16, pick_bytes, transpose_8x8
from .dsl.wide_access import load_streamed, prefetch_line
from .recent_config import RecentConfig


class RecentDecode:
    """The compile-time choices of one kernel; see RecentConfig."""

    def __init__(self, config: RecentConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: turned queries, two bfloat16 each
        mRing: cute.Tensor,  # [rows, 2, num_kv_heads, head_dim / 2] uint32: exact keys (0) and values (1)
        mLength: cute.Tensor,  # [B or more] int32: tokens of each sequence; 0: it has no query here
        mRow: cute.Tensor,  # [B or more] int32: which of the T tokens is the sequence's query
        mStart: cute.Tensor,  # [B] int32: the first row of each sequence's ring; ~row (negative): there is no ring, its
        # newest tokens lie one behind the other from that row on
        mO: cute.Tensor,  # [T, num_heads, head_dim] bfloat16: written where no token is older
        mNear: cute.Tensor,  # [T, num_heads, head_dim] float32: else this
        mNearLse: cute.Tensor,  # [T, num_heads] float32: and this, log2 of the sum of exponentials
        scale: Float32,  # of scores
        is_early: Int32,  # as the decode kernel's
        capacity: Int32,  # rows of a ring: the token at position p lies in row p % capacity of it
        stream: cuda.CUstream,
    ):
        config = self.config
        rows = mStart.shape[0] * mRing.shape[2]
        self.kernel(mQ, mRing, mLength, mRow, mStart, mO, mNear, mNearLse, scale, is_early, capacity).launch(
            grid=((rows + config.rows - 1) // config.rows, 1, 1),
            block=(32 * config.warps, 1, 1),
            stream=stream,
            preferred_smem_carveout=100,  # as the decode kernel that shares SMs with it
            min_blocks_per_mp=2,  # given, so that all loads are under way before the first product waits
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mRing: cute.Tensor, mLength: cute.Tensor, mRow: cute.Tensor, mStart: cute.Tensor,
        mO: cute.Tensor, mNear: cute.Tensor, mNearLse: cute.Tensor, scale: Float32, is_early: Int32, capacity: Int32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        lane = tid % 32
        smem = utils.SmemAllocator()
        sO = smem.allocate(4 * config.warps * config.queries * config.out_row, 16)
        sM = smem.allocate_tensor(Float32, cute.make_layout((8 * config.columns, config.warps)), byte_alignment=16)
        sL = smem.allocate_tensor(Float32, cute.make_layout((8 * config.columns, config.warps)), byte_alignment=16)
        kv_heads = mRing.shape[2]
        rows = mStart.shape[0] * kv_heads
        index = cta * config.rows + warp // config.tiles
        sequence = cutlass.min(index, rows - 1) // kv_heads
        head = cutlass.min(index, rows - 1) - sequence * kv_heads
        cute.arch.griddepcontrol_launch_dependents()  # before the wait: as if the decode kernel followed the last one
        if is_early == 0:
            cute.arch.griddepcontrol_wait()
        length = mLength[sequence]
        token = mRow[sequence]
        start = mStart[sequence]
        if index >= rows:
            length = Int32(0)
        count = cutlass.min(length, Int32(config.tokens))
        base = (length - count) % capacity
        if start < 0:
            start = ~start
            base = Int32(0)
        if length > 0 and is_early != 0:
            self.ask(mRing, head, start, base, count, capacity, warp, lane)
        cute.arch.griddepcontrol_wait()
        if length > 0:
            self.attend(
                mQ, mRing, sO, sM, sL, token, head, start, base, count, capacity,
                scale * Float32(LOG2_E), warp, lane,
            )  # fmt: skip
            if cutlass.const_expr(config.tiles == 1):
                cute.arch.sync_warp()
            else:
                cute.arch.barrier(barrier_id=1 + warp // config.tiles, number_of_threads=32 * config.tiles)
            self.finish(mO, mNear, mNearLse, sO, sM, sL, token, head, length, warp, lane)

    @cute.jit
    def place(self, j, base, count, capacity):
        """The row of a ring in which the j-th of the newest tokens lies; of those that are not there, the last."""
        row = base + cutlass.min(j, count - 1)
        if row >= capacity:
            row -= capacity
        return row

    @cute.jit
    def ask(self, mRing, head, start, base, count, capacity, warp, lane):
        """A warp's keys and values into L2: a lane's lines of one token's key or value."""
        config = self.config
        j = 16 * (warp % config.tiles) + lane // 2
        row = start + self.place(j, base, count, capacity)
        line = Int64(row) * 2 + lane % 2
        at = mRing.iterator.toint() + (line * mRing.shape[2] + head) * (2 * config.head_dim)
        for byte in cutlass.range_constexpr(0, 2 * config.head_dim, 128):
            prefetch_line(at + byte)

    @cute.jit
    def attend(
        self, mQ, mRing, sO, sM, sL, token, head, start, base, count, capacity, unit, warp, lane
    ):  # fmt: skip
        """A warp's 16 tokens: maximum, sum and output of each query head to shared memory."""
        config = self.config
        row = lane // 4
        sharer = lane % 4
        first = 16 * (warp % config.tiles)
        line = Int64(4 * config.head_dim) * mRing.shape[2]  # bytes of a ring's row: keys and values
        keys_at = mRing.iterator.toint() + line * start + 2 * config.head_dim * head
        values_at = keys_at + line // 2
        keys = []  # of the lane's two tokens, then of the rounds
        for r in cutlass.range_constexpr(2):
            at = keys_at + line * self.place(first + row + 8 * r, base, count, capacity)
            groups = [cutlass.min(4 * u + sharer, config.groups - 1) for u in range(config.key_rounds)]
            keys.append([load_streamed(at + 16 * group) for group in groups])
        queries = []
        for n in cutlass.range_constexpr(config.columns):
            query = head * config.queries + cutlass.min(8 * n + row, config.queries - 1)
            at = mQ.iterator.toint() + (Int64(token) * mQ.shape[1] + query) * (2 * config.head_dim)
            found = []
            for u in cutlass.range_constexpr(config.key_rounds):
                group = 4 * u + sharer
                words = load_streamed(at + 16 * cutlass.min(group, config.groups - 1))
                if cutlass.const_expr(4 * u + 3 >= config.groups):  # past the row's end
                    words = [word if group < config.groups else Uint32(0) for word in words]
                found.append(words)
            queries.append(found)
        values = []  # of the lane's four tokens, then of the rounds
        for q in cutlass.range_constexpr(4):
            j = first + 2 * sharer + q % 2 + 8 * (q // 2)
            at = values_at + line * self.place(j, base, count, capacity)
            groups = [cutlass.min(8 * i + row, config.groups - 1) for i in range(config.value_rounds)]
            values.append([load_streamed(at + 16 * group) for group in groups])
        weights = []  # of each column tile: two registers of mma's B
        for n in cutlass.range_constexpr(config.columns):
            sums = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
            for u in cutlass.range_constexpr(config.key_rounds):
                for w in cutlass.range_constexpr(0, 4, 2):
                    sums = mma_bf16(
                        keys[0][u][w], keys[1][u][w], keys[0][u][w + 1], keys[1][u][w + 1], queries[n][u][w],
                        queries[n][u][w + 1], *sums,
                    )  # fmt: skip
            weights.append(self.weigh(sums, sM, sL, n, first + row, count, unit, warp, lane))
        for i in cutlass.range_constexpr(config.value_rounds):
            found = []
            for w in cutlass.range_constexpr(4):
                a, b, c, d = (values[q][i][w] for q in range(4))
                tile = [pick_bytes(x, y, Uint32(half)) for x, y in ((a, b), (c, d)) for half in (0x5410, 0x7632)]
                zeros = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
                found.append([mma_bf16(*tile, *weights[n], *zeros) for n in range(config.columns)])
            group = 8 * i + row
            for n in cutlass.range_constexpr(config.columns):
                for c in cutlass.range_constexpr(2):
                    query = 8 * n + 2 * sharer + c
                    if query < config.queries and group < config.groups:
                        target = sO.toint() + 4 * ((warp * config.queries + query) * config.out_row + 8 * group)
                        for half in cutlass.range_constexpr(2):
                            pairs = [found[2 * half + w][n] for w in range(2)]
                            store_f32x4(target + 16 * half, pairs[0][c], pairs[0][2 + c], pairs[1][c], pairs[1][2 + c])

    @cute.jit
    def weigh(self, sums, sM, sL, n: cutlass.Constexpr, j, count, unit, warp, lane):
        """Weights of a column tile as two registers of mma's B; their maximum and sum to shared memory."""
        pairs: list[list[Any]] = [[], []]  # of each of the lane's two tokens: its two heads
        for c in cutlass.range_constexpr(2):
            scores = []
            top = Float32(LOWEST)
            for r in cutlass.range_constexpr(2):
                score = sums[2 * r + c] * unit
                score = score if j + 8 * r < count else Float32(-cutlass.Float32.inf)
                scores.append(score)
                top = cute.arch.fmax(top, score)
            for offset in (4, 8, 16):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=offset))
            total = Float32(0.0)
            for r in cutlass.range_constexpr(2):
                weight = exp2(scores[r] - top)
                pairs[r].append(weight)
                total = total + weight
            for offset in (4, 8, 16):
                total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
            if lane < 4:
                sM[8 * n + 2 * lane + c, warp] = top
                sL[8 * n + 2 * lane + c, warp] = total
        return [transpose_8x8(pack_bf16x2(*pair)) for pair in pairs]

    @cute.jit
    def finish(self, mO, mNear, mNearLse, sO, sM, sL, token, head, length, warp, lane):
        """A row's warps: what each found, put together, to memory; four channels of a head at a time."""
        config = self.config
        threads = 32 * config.tiles
        quads = config.head_dim // 4
        total = config.queries * quads
        own = warp // config.tiles * config.tiles  # the row's first warp
        for step in cutlass.range_constexpr((total + threads - 1) // threads):
            item = threads * step + 32 * (warp - own) + lane
            if item < total:
                query = item // quads
                channel = item % quads * 4
                top = Float32(LOWEST)
                for w in cutlass.range_constexpr(config.tiles):
                    top = cute.arch.fmax(top, sM[query, own + w])
                value = cute.make_rmem_tensor((4,), Float32)
                value.fill(0.0)
                weight = Float32(0.0)
                for w in cutlass.range_constexpr(config.tiles):
                    share = exp2(sM[query, own + w] - top)
                    weight = weight + share * sL[query, own + w]
                    part = load_f32x4(
                        sO.toint() + 4 * (((own + w) * config.queries + query) * config.out_row + channel)
                    )
                    for e in cutlass.range_constexpr(4):
                        value[e] = value[e] + share * part[e]
                inverse = Float32(1.0) / weight
                for e in cutlass.range_constexpr(4):
                    value[e] = value[e] * inverse
                row = Int64(token) * mO.shape[1] + head * config.queries + query
                at = row * config.head_dim + channel
                if length > config.tokens:
                    cute.autovec_copy(value, cute.make_tensor((mNear.iterator + at).align(16), cute.make_layout(4)))
                    if channel == 0:
                        cute.make_tensor(mNearLse.iterator + row, cute.make_layout(1))[0] = top + log2(weight)
                else:
                    out = cute.make_rmem_tensor((4,), BFloat16)
                    out.store(value.load().to(BFloat16))
                    cute.autovec_copy(out, cute.make_tensor((mO.iterator + at).align(8), cute.make_layout(4)))


def compile_recent(config: RecentConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in RecentDecode.__call__, on the current stream."""
    tokens, heads, dim = cute.sym_int(), cute.sym_int(), config.head_dim
    return cute.compile(
        RecentDecode(config),
        row_major(Uint32, (tokens, heads, dim // 2), 16),
        row_major(Uint32, (cute.sym_int(), 2, cute.sym_int(), dim // 2), 16),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(Int32, (cute.sym_int(),), 4),
        row_major(BFloat16, (cute.sym_int(), heads, dim), 16),
        row_major(Float32, (cute.sym_int(), heads, dim), 16),
        row_major(Float32, (cute.sym_int(), heads), 4),
        Float32(1.0),
        Int32(1),
        Int32(16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
