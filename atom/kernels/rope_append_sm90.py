"""RoPE, rounding and appending to a paged cache on Hopper (sm_90a), in CuTe DSL: one launch for a ragged step.

A lane holds 8 channels of the first half of a head and their partners in the second: it turns them alone, and all that
it reads and writes is wide. 4 to 16 lanes share a head, a warp has several heads of one kind (queries, keys or values)
and takes `parts` such tasks of one token. Pairs of bfloat16 are turned together (dsl/packed_bf16.py); scales, zero
points and codes are found in append_codes_sm90.py. What is written equals what the reference writes, bit for bit.
Tokens with a negative slot are turned and not stored.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .append_codes_sm90 import AppendCodes
from .attention_config import AppendConfig
from .dsl.arguments import row_major
from .dsl.arithmetic import reciprocal
from .dsl.memory import pack_bf16x2
from .dsl.packed_bf16 import (
    add_pairs,
    multiply_pairs,
    subtract_pairs,
)
from .dsl.wide_access import load_floats, load_streamed, load_words, store_words
from .head_transforms_sm90 import expand_pairs, hadamard, normalize, reflect, round_pairs


class RopeAppend(AppendCodes):
    """The compile-time choices of one kernel; see AppendConfig."""

    def __init__(self, config: AppendConfig) -> None:
        self.config = config
        self.qmax = {"int4": 15, "int8": 255}.get(config.kv, 0)
        self.half = config.head_dim // 2

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: two bfloat16 each
        mK: cute.Tensor,  # [T, num_kv_heads, head_dim / 2] uint32
        mV: cute.Tensor,  # [T, num_kv_heads, head_dim / 2] uint32
        mCos: cute.Tensor,  # [T, head_dim / 2] float32
        mSin: cute.Tensor,  # [T, head_dim / 2] float32
        mSlot: cute.Tensor,  # [T] int64
        mOffset: cute.Tensor,  # [num_kv_heads, head_dim / 2] uint32 where keys have an offset, else any
        mCentre: cute.Tensor,  # [num_kv_heads, head_dim] float32 where keys have a centre, mirrors behind it; else any
        mNorm: cute.Tensor,  # [2, head_dim / 2] uint32: weights of the norms of queries and keys, if there are any
        mKV: cute.Tensor,  # [num_blocks, num_kv_heads, tile_bytes] uint8
        mOut: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: turned queries
        mExact: cute.Tensor | None,  # [rows, 2, num_kv_heads, head_dim / 2] uint32 where has_recent: keys and values
        mExactSlot: cute.Tensor | None,  # [T] int64: their rows in it; negative: none
        largest_scale: Float32,  # rounding.largest_scale of the format
        eps: Float32,  # of the norms
        stream: cuda.CUstream,
    ):
        config = self.config
        self.kernel(
            mQ, mK, mV, mCos, mSin, mSlot, mOffset, mCentre, mNorm, mKV, mOut, mExact, mExactSlot, largest_scale, eps
        ).launch(
            grid=(config.ctas(mQ.shape[0], mQ.shape[1], mK.shape[1]), 1, 1),
            block=(32 * config.warps, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mCos: cute.Tensor, mSin: cute.Tensor,
        mSlot: cute.Tensor, mOffset: cute.Tensor, mCentre: cute.Tensor, mNorm: cute.Tensor, mKV: cute.Tensor,
        mOut: cute.Tensor, mExact: cute.Tensor | None, mExactSlot: cute.Tensor | None, largest_scale: Float32,
        eps: Float32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        lane = tid % 32
        heads = mQ.shape[1]
        kv_heads = mK.shape[1]
        tasks = config.tasks(heads, kv_heads)
        key_task = -(-heads // config.heads)
        value_task = key_task + -(-kv_heads // config.heads)
        parts = -(-tasks // config.parts)
        warp = cta * config.warps + cute.arch.make_warp_uniform(tid // 32)
        token = warp // parts
        task0 = (warp - token * parts) * config.parts
        share = lane % config.lanes  # which of the lanes of its head
        column = 8 * cutlass.min(share, self.half // 8 - 1)  # lanes past the end repeat the last
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # decode attention relies on all before this kernel
        if token < mQ.shape[0]:
            slot = mSlot[token]
            raw = cute.make_rmem_tensor((4, 2, config.parts), Uint32)
            for part in cutlass.range_constexpr(config.parts):
                task = cutlass.min(task0 + part, tasks - 1)
                head = (task * config.heads) + lane // config.lanes
                source = self.row(mQ, token, cutlass.min(head, heads - 1))
                if task >= key_task:
                    head = head - key_task * config.heads
                    source = self.row(mK, token, cutlass.min(head, kv_heads - 1))
                if task >= value_task:
                    head = head - (value_task - key_task) * config.heads
                    source = self.row(mV, token, cutlass.min(head, kv_heads - 1))
                for h in cutlass.range_constexpr(2):
                    found = load_streamed(source + 2 * (column + h * self.half))
                    for w in cutlass.range_constexpr(4):
                        raw[w, h, part] = found[w]
            cos = self.angles(mCos, token, column)
            sin = self.angles(mSin, token, column)
            for part in cutlass.range_constexpr(config.parts):
                task = task0 + part
                head = lane // config.lanes
                x = raw[None, None, part]
                if task < key_task:
                    head = head + task * config.heads
                    self.normalize(x, mNorm, 0, column, eps, share)
                    self.turn(x, cos, sin)
                    if cutlass.const_expr(config.rotates):
                        values = expand_pairs(x)
                        hadamard(config, values, lane)
                        if cutlass.const_expr(config.has_mirror):
                            kv_head = cutlass.min(head, heads - 1) // (heads // kv_heads)
                            reflect(config, values, self.mirror(mCentre, kv_heads + kv_head, column), share)
                        round_pairs(values, x)
                    if (head < heads) & (8 * share < self.half):
                        target = self.row(mOut, token, head)
                        for h in cutlass.range_constexpr(2):
                            store_words(target + 2 * (column + h * self.half), [x[w, h] for w in range(4)])
                elif task < tasks:
                    is_value = task >= value_task
                    if is_value:
                        head = head + (task - value_task) * config.heads
                    else:
                        head = head + (task - key_task) * config.heads
                        self.normalize(x, mNorm, 1, column, eps, share)
                        if cutlass.const_expr(config.has_offset):
                            self.take_off(x, mOffset, cutlass.min(head, kv_heads - 1), column)
                        self.turn(x, cos, sin)
                    is_there = (head < kv_heads) & (8 * share < self.half) & (slot >= 0)
                    if cutlass.const_expr(config.is_exact):
                        values = expand_pairs(x)
                        if task < value_task:
                            if cutlass.const_expr(config.has_centre):
                                self.centre(values, mCentre, cutlass.min(head, kv_heads - 1), column)
                            if cutlass.const_expr(config.rotates):
                                hadamard(config, values, lane)
                            if cutlass.const_expr(config.has_mirror):
                                row = kv_heads + cutlass.min(head, kv_heads - 1)
                                reflect(config, values, self.mirror(mCentre, row, column), share)
                        self.keep(values, mExact, mExactSlot, token, head, is_value, column, share)
                        self.store(values, mKV, slot, head, is_value, column, share, is_there, largest_scale)
                    else:
                        self.keep(x, mExact, mExactSlot, token, head, is_value, column, share)
                        self.store(x, mKV, slot, head, is_value, column, share, is_there, largest_scale)

    @cute.jit
    def row(self, mX, token, head):
        """The address of a head."""
        return mX[token, head, None].iterator.toint()

    @cute.jit
    def angles(self, mX, token, column):
        """Eight cosines or sines as four pairs of bfloat16."""
        address = mX[token, None].iterator.toint() + 4 * column
        pairs = []
        for part in cutlass.range_constexpr(2):
            found = load_floats(address + 16 * part)
            pairs.append(pack_bf16x2(found[0], found[1]))
            pairs.append(pack_bf16x2(found[2], found[3]))
        return pairs

    @cute.jit
    def normalize(self, x, mNorm, which: cutlass.Constexpr, column, eps, share):
        if cutlass.const_expr(self.config.norm != "none"):
            weights = cute.make_rmem_tensor((4, 2), Uint32)
            address = mNorm[which, None].iterator.toint() + 2 * column
            for h in cutlass.range_constexpr(2):
                word = load_words(address + 2 * h * self.half)
                for w in cutlass.range_constexpr(4):
                    weights[w, h] = word[w]
            normalize(self.config, x, weights, eps, share)

    @cute.jit
    def centre(self, values, mCentre, head, column):
        address = mCentre[head, None].iterator.toint() + 4 * column
        for h in cutlass.range_constexpr(2):
            for part in cutlass.range_constexpr(2):
                found = load_floats(address + 4 * h * self.half + 16 * part)
                for i in cutlass.range_constexpr(4):
                    values[4 * part + i, h] = values[4 * part + i, h] - found[i]

    @cute.jit
    def mirror(self, mCentre, row, column):
        """Where the mirror of a head has this lane's first octet."""
        return mCentre[row, None].iterator.toint() + 4 * column

    @cute.jit
    def turn(self, x, cos, sin):
        """RoPE, each operation rounded to bfloat16 as torch rounds it."""
        for w in cutlass.range_constexpr(4):
            low = subtract_pairs(multiply_pairs(x[w, 0], cos[w]), multiply_pairs(x[w, 1], sin[w]))
            x[w, 1] = add_pairs(multiply_pairs(x[w, 1], cos[w]), multiply_pairs(x[w, 0], sin[w]))
            x[w, 0] = low

    @cute.jit
    def take_off(self, x, mOffset, head, column):
        address = mOffset[head, None].iterator.toint() + 2 * column
        for h in cutlass.range_constexpr(2):
            word = load_words(address + 2 * h * self.half)
            for w in cutlass.range_constexpr(4):
                x[w, h] = subtract_pairs(x[w, h], word[w])

    @cute.jit
    def keep(self, x, mExact, mExactSlot, token, head, is_value, column, share):
        """A key or value in bfloat16, where the newest tokens' are kept."""
        if cutlass.const_expr(self.config.has_recent):
            row = mExactSlot[token]
            if (head < mExact.shape[2]) & (8 * share < self.half) & (row >= 0):
                at = (2 * row + Int64(is_value)) * mExact.shape[2] + head
                target = mExact.iterator.toint() + at * 2 * self.config.head_dim
                for h in cutlass.range_constexpr(2):
                    store_words(target + 2 * (column + h * self.half), self.pairs(x, h))

    @cute.jit
    def store(self, x, mKV, slot, head, is_value, column, share, is_there, largest_scale):
        """Round a key or value and write its codes, scale and zero point."""
        config = self.config
        cache = config.cache
        block = slot // config.block_size
        place = Int32(slot - block * config.block_size)
        codes = 2 * config.block_size * cache.word_bytes + place * cache.row_bytes
        word_at = 4 * place
        if is_value:
            codes += config.block_size * cache.row_bytes
            word_at += config.block_size * cache.word_bytes
        tile = mKV.iterator.toint() + (block * mKV.shape[1] + head) * cache.tile_bytes
        codes += column * cache.code_bits // 8
        half_bytes = self.half * cache.code_bits // 8
        if cutlass.const_expr(config.kv == "bf16"):
            if is_there:
                for h in cutlass.range_constexpr(2):
                    store_words(tile + (codes + h * half_bytes), self.pairs(x, h))
        else:
            if cutlass.const_expr(config.zero_bias):
                coded, scale, zero = self.keep_mean(x, share)
            else:
                scale, zero = self.choose(x, largest_scale)
                inverse = reciprocal(scale)
                coded = [self.encode(x, h, inverse, zero) for h in range(2)]
            if is_there:
                if share == 0:
                    store_words(tile + word_at, [pack_bf16x2(scale, zero)])
                for h in cutlass.range_constexpr(2):
                    store_words(tile + (codes + h * half_bytes), coded[h])


def compile_append(config: AppendConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in RopeAppend.__call__, on the current stream."""
    tokens, heads, kv_heads, half = cute.sym_int(), cute.sym_int(), cute.sym_int(), config.head_dim // 2

    def rows(shape):
        """Heads of a token lie side by side, tokens as far apart as the output of a fused q k v product is wide."""
        return make_fake_tensor(Uint32, shape, (cute.sym_int64(divisibility=4), half, 1), assumed_align=16)

    return cute.compile(
        RopeAppend(config),
        rows((tokens, heads, half)),
        rows((cute.sym_int(), kv_heads, half)),
        rows((cute.sym_int(), cute.sym_int(), half)),
        row_major(Float32, (cute.sym_int(), half), 16),
        row_major(Float32, (cute.sym_int(), half), 16),
        row_major(Int64, (cute.sym_int(),), 8),
        row_major(Uint32, (cute.sym_int(), half), 16),
        row_major(Float32, (cute.sym_int(), config.head_dim), 16),
        row_major(Uint32, (cute.sym_int(), half), 16),
        row_major(Uint8, (cute.sym_int(), cute.sym_int(), config.cache.tile_bytes), 128),
        row_major(Uint32, (cute.sym_int(), cute.sym_int(), half), 16),
        row_major(Uint32, (cute.sym_int(), 2, kv_heads, half), 16) if config.has_recent else None,
        row_major(Int64, (cute.sym_int(),), 8) if config.has_recent else None,
        Float32(1.0),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
