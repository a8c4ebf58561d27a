"""RoPE, rounding and appending to a paged cache on Hopper (sm_90a), in CuTe DSL: one launch for a ragged step.

A warp takes `rows` rows of one token; a row is a query, key or value head. A lane holds pairs of channels i and
i + head_dim / 2, so that it turns them alone. Products and sums are rounded to bfloat16 one by one, as torch does, and
codes come from the arithmetic of atom/quant/rounding.py, instruction by instruction: what is written equals what the
reference writes, bit for bit. Tokens with a negative slot are turned and not stored.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from .attention_config import AppendConfig
from .dsl.arithmetic import from_bits, pack_e4m3x2, reciprocal, round_to_int
from .dsl.memory import pack_bf16x2

LARGEST_RANGE = 2.0**126
SMALLEST_SCALE = 2.0**-126


class RopeAppend:
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
        mKV: cute.Tensor,  # [num_blocks, num_kv_heads, tile_bytes] uint8
        mOut: cute.Tensor,  # [T, num_heads, head_dim / 2] uint32: turned queries
        largest_scale: Float32,  # rounding.largest_scale of the format
        stream: cuda.CUstream,
    ):
        config = self.config
        rows = mQ.shape[1] + 2 * mK.shape[1]
        per_cta = config.rows * config.warps
        self.kernel(mQ, mK, mV, mCos, mSin, mSlot, mOffset, mKV, mOut, largest_scale).launch(
            grid=(mQ.shape[0], (rows + per_cta - 1) // per_cta, 1),
            block=(32 * config.warps, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self, mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mCos: cute.Tensor, mSin: cute.Tensor,
        mSlot: cute.Tensor, mOffset: cute.Tensor, mKV: cute.Tensor, mOut: cute.Tensor, largest_scale: Float32,
    ):  # fmt: skip
        config = self.config
        tid, _, _ = cute.arch.thread_idx()
        token, part, _ = cute.arch.block_idx()
        lane = tid % 32
        words = config.pairs // 2  # of two channels, in each half of the head
        heads = mQ.shape[1]
        kv_heads = mK.shape[1]
        rows = heads + 2 * kv_heads
        row0 = (part * config.warps + cute.arch.make_warp_uniform(tid // 32)) * config.rows
        column = cutlass.min(words * lane, self.half // 2 - words)  # lanes past the end repeat the last
        is_there = words * lane < self.half // 2
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        slot = mSlot[token]
        raw = cute.make_rmem_tensor((words, 2, config.rows), Uint32)
        for r in cutlass.range_constexpr(config.rows):
            row = row0 + r
            for w in cutlass.range_constexpr(words):
                for h in cutlass.range_constexpr(2):
                    at = column + w + h * (self.half // 2)
                    raw[w, h, r] = Uint32(0)
                    if row < heads:
                        raw[w, h, r] = mQ[token, row, at]
                    elif row < heads + kv_heads:
                        raw[w, h, r] = mK[token, row - heads, at]
                    elif row < rows:
                        raw[w, h, r] = mV[token, row - heads - kv_heads, at]
        cos = cute.make_rmem_tensor((config.pairs,), Float32)
        sin = cute.make_rmem_tensor((config.pairs,), Float32)
        for p in cutlass.range_constexpr(config.pairs):
            cos[p], sin[p] = self.rounded(mCos[token, 2 * column + p], mSin[token, 2 * column + p])
        x = cute.make_rmem_tensor((config.pairs, 2), Float32)
        for r in cutlass.range_constexpr(config.rows):
            row = row0 + r
            if row < rows:
                for w in cutlass.range_constexpr(words):
                    for h in cutlass.range_constexpr(2):
                        x[2 * w, h] = from_bits(raw[w, h, r] << 16)
                        x[2 * w + 1, h] = from_bits(raw[w, h, r] & Uint32(0xFFFF0000))
                if row < heads:
                    self.turn(x, cos, sin)
                    if is_there:
                        for w in cutlass.range_constexpr(words):
                            for h in cutlass.range_constexpr(2):
                                at = column + w + h * (self.half // 2)
                                mOut[token, row, at] = pack_bf16x2(x[2 * w, h], x[2 * w + 1, h])
                else:
                    is_value = row >= heads + kv_heads
                    head = row - heads
                    if is_value:
                        head = head - kv_heads
                    else:
                        if cutlass.const_expr(config.has_offset):
                            self.take_off(x, mOffset, head, column)
                        self.turn(x, cos, sin)
                    if slot >= 0:
                        self.store(x, mKV, slot, head, is_value, column, lane, is_there, largest_scale)

    @cute.jit
    def rounded(self, x, y):
        """The nearest bfloat16s. Opaque to the compiler, which would make bfloat16 products and sums and fuse them."""
        both = pack_bf16x2(x, y)
        return from_bits(both << 16), from_bits(both & Uint32(0xFFFF0000))

    @cute.jit
    def turn(self, x, cos, sin):
        """RoPE, each operation rounded to bfloat16 as torch rounds it."""
        for p in cutlass.range_constexpr(self.config.pairs):
            a, b = self.rounded(x[p, 0] * cos[p], x[p, 1] * sin[p])
            c, d = self.rounded(x[p, 1] * cos[p], x[p, 0] * sin[p])
            x[p, 0], x[p, 1] = self.rounded(a - b, c + d)

    @cute.jit
    def take_off(self, x, mOffset, head, column):
        for w in cutlass.range_constexpr(self.config.pairs // 2):
            for h in cutlass.range_constexpr(2):
                word = mOffset[head, column + w + h * (self.half // 2)]
                x[2 * w, h], x[2 * w + 1, h] = self.rounded(
                    x[2 * w, h] - from_bits(word << 16), x[2 * w + 1, h] - from_bits(word & Uint32(0xFFFF0000))
                )

    @cute.jit
    def store(self, x, mKV, slot, head, is_value, column, lane, is_there, largest_scale):
        """Round a key or value and write its codes, scale and zero point."""
        config = self.config
        cache = config.cache
        block = slot // config.block_size
        place = Int32(slot - block * config.block_size)
        tile = (Int64(block) * mKV.shape[1] + head) * cache.tile_bytes
        codes = 2 * config.block_size * cache.word_bytes + place * cache.row_bytes
        word_at = 4 * place
        if is_value:
            codes += config.block_size * cache.row_bytes
            word_at += config.block_size * cache.word_bytes
        base = mKV.iterator + tile
        words = config.pairs // 2
        if cutlass.const_expr(config.kv == "bf16"):
            if is_there:
                target = cute.recast_ptr(base + codes, dtype=Uint32)
                for w in cutlass.range_constexpr(words):
                    for h in cutlass.range_constexpr(2):
                        row = cute.make_tensor(target + (column + w + h * (self.half // 2)), cute.make_layout(1))
                        row[0] = pack_bf16x2(x[2 * w, h], x[2 * w + 1, h])
        else:
            scale, zero = self.choose(x, largest_scale)
            inverse = reciprocal(scale)
            if lane == 0:
                word = cute.make_tensor(cute.recast_ptr(base + word_at, dtype=Uint32), cute.make_layout(1))
                word[0] = pack_bf16x2(scale, zero)
            if is_there:
                for w in cutlass.range_constexpr(words):
                    for h in cutlass.range_constexpr(2):
                        at = column + w + h * (self.half // 2)  # of pairs of neighbouring channels
                        low = x[2 * w, h] * inverse
                        high = x[2 * w + 1, h] * inverse
                        if cutlass.const_expr(config.kv == "int4"):
                            both = self.code(low, zero) | (self.code(high, zero) << 4)
                            cute.make_tensor(base + (codes + at), cute.make_layout(1))[0] = Uint8(both)
                        elif cutlass.const_expr(config.kv == "int8"):
                            row = cute.make_tensor(base + (codes + 2 * at), cute.make_layout(2))
                            row[0] = Uint8(self.code(low, zero))
                            row[1] = Uint8(self.code(high, zero))
                        else:
                            both = pack_e4m3x2(low, high)
                            row = cute.make_tensor(base + (codes + 2 * at), cute.make_layout(2))
                            row[0] = Uint8(both & Uint32(255))
                            row[1] = Uint8(both >> 8)

    @cute.jit
    def choose(self, x, largest_scale):
        """Scale and zero point of a row, as rounding.py chooses them; both bfloat16 values. Every lane has them."""
        config = self.config
        low = x[0, 0]
        high = x[0, 0]
        for p in cutlass.range_constexpr(config.pairs):
            for h in cutlass.range_constexpr(2):
                low = cute.arch.fmin(low, x[p, h])
                high = cute.arch.fmax(high, x[p, h])
        for offset in (16, 8, 4, 2, 1):
            low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, offset=offset))
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, offset=offset))
        zero = Float32(0.0)
        if cutlass.const_expr(self.qmax):
            low = cute.arch.fmin(cute.arch.fmax(low, Float32(-LARGEST_RANGE)), Float32(0.0))
            high = cute.arch.fmin(cute.arch.fmax(high, Float32(0.0)), Float32(LARGEST_RANGE))
            raw = (high - low) * Float32(config.clip / self.qmax)
        else:
            largest = cute.arch.fmax(high, -low)
            raw = cute.arch.fmin(largest * Float32(config.clip / 448.0), largest_scale)
        if raw <= Float32(0.0):
            raw = Float32(1.0)
        scale, _ = self.rounded(cute.arch.fmax(raw, Float32(SMALLEST_SCALE)), raw)
        if cutlass.const_expr(self.qmax):
            shifted = low * Float32(-config.clip) * reciprocal(scale)
            shifted = cute.arch.fmin(cute.arch.fmax(shifted, Float32(0.0)), Float32(self.qmax))
            zero = Float32(Int32(round_to_int(shifted)))
        return scale, zero

    @cute.jit
    def code(self, scaled, zero):
        """round(scaled) + zero within [0, qmax]; what is clamped first cannot overflow an int32."""
        limit = Float32(2.0 * self.qmax)
        scaled = cute.arch.fmin(cute.arch.fmax(scaled, -limit), limit)
        whole = Int32(round_to_int(scaled)) + Int32(zero)
        return Uint32(cutlass.min(cutlass.max(whole, Int32(0)), Int32(self.qmax)))


def compile_append(config: AppendConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in RopeAppend.__call__, on the current stream."""
    tokens, heads, kv_heads, half = cute.sym_int(), cute.sym_int(), cute.sym_int(), config.head_dim // 2

    def compact(dtype, shape, align):
        order = tuple(range(len(shape) - 1, -1, -1))
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)

    def rows(shape):
        """Heads of a token lie side by side, tokens as far apart as the output of a fused q k v product is wide."""
        return make_fake_tensor(Uint32, shape, (cute.sym_int64(divisibility=4), half, 1), assumed_align=16)

    return cute.compile(
        RopeAppend(config),
        rows((tokens, heads, half)),
        rows((cute.sym_int(), kv_heads, half)),
        rows((cute.sym_int(), cute.sym_int(), half)),
        compact(Float32, (cute.sym_int(), half), 16),
        compact(Float32, (cute.sym_int(), half), 16),
        compact(Int64, (cute.sym_int(),), 8),
        compact(Uint32, (cute.sym_int(), half), 4),
        compact(Uint8, (cute.sym_int(), cute.sym_int(), config.cache.tile_bytes), 128),
        compact(Uint32, (cute.sym_int(), cute.sym_int(), half), 16),
        Float32(1.0),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
