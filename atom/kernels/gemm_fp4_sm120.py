"""NVFP4 and MXFP4 GEMM on Blackwell of compute capability 12.0 (sm_120a), in CuTe DSL: mma.sync with block scales.

Both operands stay E2M1; the tensor core multiplies by the scales. Weights stand on the 16-row side, packed in the order
of mma's registers: 16 bytes a lane are one step of 64 columns, straight from global memory. Tokens stand on the side of
8. A warp computes 32 features x 64 tokens, a CTA 128 x 64. Compiled and run in the PTX emulator, never yet on a GPU.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int64, Uint32, cute

from .dsl.arguments import row_major
from .dsl.block_scaled import mma_e2m1
from .dsl.wide_access import load_words
from .fp4_config import Fp4Config
from .fp4_kernel import Fp4Output, compile_fp4
from .fp4_layout import TILE_ROWS

WARPS = 4
ROW_TILES = 2  # of 16 features, each warp
TOKEN_TILES = 8  # of 8 tokens


class BlockScaledGemm(Fp4Output):
    """The compile-time choices of one kernel; see Fp4Config."""

    @cute.jit
    def __call__(
        self,
        mA: cute.Tensor,  # [row tiles, steps, 32, 4] uint32: weights, fp4_layout.fragment_order
        mSA: cute.Tensor,  # uint32, flat: their scales, fp4_layout.pack_scales
        mX: cute.Tensor,  # [T, padded K / 8] uint32: codes of the tokens
        mSX: cute.Tensor,  # uint32, flat: their scales
        mC: cute.Tensor,  # [1] or [N] float32 outer scale of the weights
        mS: cute.Tensor,  # [T] float32 outer scale of each token, else any
        mB: cute.Tensor,  # [N] bfloat16 bias, else any
        mY: cute.Tensor,  # [T, N] bfloat16
        stream: cuda.CUstream,
    ):
        features = 16 * ROW_TILES * WARPS
        tokens = 8 * TOKEN_TILES
        self.kernel(mA, mSA, mX, mSX, mC, mS, mB, mY).launch(
            grid=((mY.shape[1] + features - 1) // features, (mY.shape[0] + tokens - 1) // tokens, 1),
            block=(32 * WARPS, 1, 1),
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, mA: cute.Tensor, mSA: cute.Tensor, mX: cute.Tensor, mSX: cute.Tensor, mC: cute.Tensor,
               mS: cute.Tensor, mB: cute.Tensor, mY: cute.Tensor):  # fmt: skip
        tid, _, _ = cute.arch.thread_idx()
        band, token_tile, _ = cute.arch.block_idx()
        lane = tid & 31
        quad = lane >> 2
        tile0 = (band * WARPS + (tid >> 5)) * ROW_TILES
        token0 = token_tile * (8 * TOKEN_TILES)
        tiles, steps = mA.shape[0], mA.shape[1]
        tokens = mX.shape[0]
        sums = cute.make_rmem_tensor((4, TOKEN_TILES, ROW_TILES), Float32)
        sums.fill(0.0)
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        for step in cutlass.range(steps, unroll=1):
            a = []
            scale_a = []
            for r in cutlass.range_constexpr(ROW_TILES):
                tile = cutlass.min(tile0 + r, tiles - 1)  # a last warp may have none: it repeats, and stores nothing
                at = ((Int64(tile) * steps + step) * 32 + lane) * 16
                a.append(load_words(mA.iterator.toint() + at))
                scale_a.append(self.scales(mSA, 16 * tile + quad + 8 * (lane & 1), step, steps))
            for t in cutlass.range_constexpr(TOKEN_TILES):
                token = cutlass.min(token0 + 8 * t + quad, tokens - 1)
                word = 8 * step + (lane & 3)
                b = [mX[token, word], mX[token, word + 4]]
                scale_b = self.scales(mSX, token, step, steps)
                for r in cutlass.range_constexpr(ROW_TILES):
                    c = [sums[e, t, r] for e in range(4)]
                    found = mma_e2m1(a[r], b, c, scale_a[r], scale_b, self.config.group_size)
                    for e in cutlass.range_constexpr(4):
                        sums[e, t, r] = found[e]
        self.store(mC, mS, mB, mY, sums, tile0, token0, lane)

    @cute.jit
    def scales(self, mScales, row, step, steps):
        """The scales of a row in one step, in the low bytes of a word."""
        inner = row & (TILE_ROWS - 1)
        within = 4 * (inner & 31) + (inner >> 5)
        if cutlass.const_expr(self.config.group_size == 16):  # a tile is a step
            return mScales[((row >> 7) * steps + step) * 128 + within]
        both = mScales[((row >> 7) * (steps >> 1) + (step >> 1)) * 128 + within]
        return (both >> Uint32(16 * (step & 1))) & Uint32(0xFFFF)

    @cute.jit
    def store(self, mC, mS, mB, mY, sums, tile0, token0, lane):
        """Scale, add the bias; lane 4 g + q holds features g and g + 8 of tokens 2 q and 2 q + 1."""
        tokens, features = mY.shape
        for r in cutlass.range_constexpr(ROW_TILES):
            for e in cutlass.range_constexpr(4):
                feature = 16 * (tile0 + r) + (lane >> 2) + 8 * (e // 2)
                if feature < features:
                    factor, offset = self.feature_values(mC, mB, feature)
                    for t in cutlass.range_constexpr(TOKEN_TILES):
                        token = token0 + 8 * t + 2 * (lane & 3) + e % 2
                        if token < tokens:
                            self.put(mS, mY, sums[e, t, r], factor, offset, token, feature)


def compile_gemm(config: Fp4Config, options: str = "") -> object:
    """Compile one kernel for sm_120a; needs no GPU. Arguments as in BlockScaledGemm.__call__, on the current stream."""
    t, n, k, steps = (cute.sym_int() for _ in range(4))
    weight = row_major(Uint32, (cute.sym_int(), steps, 32, 4), 16), row_major(Uint32, (cute.sym_int(),), 4)
    x = row_major(Uint32, (t, k), 4), row_major(Uint32, (cute.sym_int(),), 4)
    return compile_fp4(BlockScaledGemm(config), weight, x, (t, n), f"--gpu-arch sm_120a {options}")
