"""Blocks of a paged cache to dense bfloat16 keys and values, for prefill, on Hopper (sm_90a), in CuTe DSL.

One launch reads the blocks of all sequences that prefill. A CTA reads one block of one KV head; a thread takes 8
channels of a token at a time and all its loads are under way before it converts the first. What comes out equals
KVLayout.read bit for bit: a code less its zero point is exact in bfloat16 (in float32 where zero points are not whole),
and the product with the scale is rounded once. Tokens outside the work's range are not looked at.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .attention_config import GatherConfig
from .codes_bf16_sm90 import BIAS, expand
from .dsl.arguments import row_major
from .dsl.memory import pack_bf16x2
from .dsl.packed_bf16 import high_float, low_float, multiply_pairs, subtract_pairs
from .dsl.rounded_float import multiply_add
from .dsl.tensor_core import pick_bytes
from .dsl.wide_access import load_some, store_words


class KVGather:
    """The compile-time choices of one kernel; see GatherConfig."""

    def __init__(self, config: GatherConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mKV: cute.Tensor,  # [num_blocks, num_kv_heads, tile_bytes] uint8
        mWork: cute.Tensor,  # [N, 4] int32: block (-1: zeros), dense row of its first token, first token, end token
        mK: cute.Tensor,  # [S, num_kv_heads, head_dim / 2] uint32: two bfloat16 each
        mV: cute.Tensor,  # [S, num_kv_heads, head_dim / 2] uint32
        stream: cuda.CUstream,
    ):
        self.kernel(mKV, mWork, mK, mV).launch(
            grid=(mWork.shape[0], mKV.shape[1], 1), block=(self.config.threads, 1, 1), stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, mKV: cute.Tensor, mWork: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor):
        config = self.config
        cache = config.cache
        tid, _, _ = cute.arch.thread_idx()
        item, head, _ = cute.arch.block_idx()
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        block = mWork[item, 0]
        row = mWork[item, 1]
        first = mWork[item, 2]
        end = mWork[item, 3]
        tile = mKV.iterator.toint() + (Int64(block) * mKV.shape[1] + head) * cache.tile_bytes
        code_words = config.code_words
        codes = cute.make_rmem_tensor((code_words, config.rounds), Uint32)
        scales = cute.make_rmem_tensor((config.rounds,), Uint32)
        codes.fill(0)
        scales.fill(0)
        for r in cutlass.range_constexpr(config.rounds):
            part, token, octet = self.place(tid + r * config.threads)
            if (token >= first) & (token < end) & (part < 2) & (block >= 0):
                line = part * config.block_size + token  # keys' rows are followed by values'
                start = 2 * config.block_size * cache.word_bytes + line * cache.row_bytes
                found = load_some(tile + start + 4 * code_words * octet, code_words)
                for w in cutlass.range_constexpr(code_words):
                    codes[w, r] = found[w]
                if cutlass.const_expr(cache.word_bytes):
                    scales[r] = load_some(tile + 4 * line, 1)[0]
        for r in cutlass.range_constexpr(config.rounds):
            part, token, octet = self.place(tid + r * config.threads)
            if (token >= first) & (token < end) & (part < 2):
                values = self.decode([codes[w, r] for w in range(code_words)], scales[r])
                target = mK[row + token - first, head, None].iterator.toint()
                if part == 1:
                    target = mV[row + token - first, head, None].iterator.toint()
                store_words(target + 16 * octet, values)

    @cute.jit
    def place(self, index):
        """Keys or values, which token, and which 8 channels a thread takes."""
        config = self.config
        line = index // config.octets
        part = line // config.block_size
        return part, line - part * config.block_size, index - line * config.octets

    @cute.jit
    def decode(self, words, scale):
        """Eight channels as four pairs of bfloat16."""
        config = self.config
        pairs = expand(config.cache, words)
        if cutlass.const_expr(config.kv == "bf16"):
            return pairs
        low = pick_bytes(scale, scale, Uint32(0x1010))
        if cutlass.const_expr(config.zero_bias):  # a zero point of any size: in float32
            zero = high_float(scale) + Float32(config.zero_bias)
            factor = low_float(scale)
            nothing = Float32(0.0)  # added: where a block is missing all is zero, not minus zero
            halves = []
            for pair in pairs:
                numbers = [half(pair) - Float32(BIAS[config.kv]) - zero for half in (low_float, high_float)]
                halves.append([multiply_add(number, factor, nothing) for number in numbers])
            pairs = [pack_bf16x2(*both) for both in halves]
        elif cutlass.const_expr(config.kv != "fp8_e4m3"):
            zero = high_float(scale) + BIAS[config.kv]
            both = pack_bf16x2(zero, zero)
            pairs = [subtract_pairs(pair, both) for pair in pairs]
        if cutlass.const_expr(not config.zero_bias):
            pairs = [multiply_pairs(pair, low) for pair in pairs]
        if cutlass.const_expr(config.kv == "int4"):  # (0, 4), (1, 5), (2, 6), (3, 7)
            near = [pick_bytes(pairs[i], pairs[i + 1], Uint32(0x5410)) for i in (0, 2)]
            pairs = near + [pick_bytes(pairs[i], pairs[i + 1], Uint32(0x7632)) for i in (0, 2)]
        return pairs


def compile_gather(config: GatherConfig, options: str = "") -> object:
    """Compile one kernel for sm_90a; needs no GPU. Arguments as in KVGather.__call__, on the current stream."""
    heads, half = cute.sym_int(), config.head_dim // 2

    return cute.compile(
        KVGather(config),
        row_major(Uint8, (cute.sym_int(), heads, config.cache.tile_bytes), 128),
        row_major(Int32, (cute.sym_int(), 4), 16),
        row_major(Uint32, (cute.sym_int(), cute.sym_int(), half), 16),
        row_major(Uint32, (cute.sym_int(), cute.sym_int(), half), 16),
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
