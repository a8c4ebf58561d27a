"""The consumers of the sm_90a GEMM: packed codes to registers, wgmma, promotion to float32. See gemm_sm90.py."""

import cutlass
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int8, Int32, Uint8, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.nvgpu import warpgroup as wg

from .dsl.memory import load_u32x4
from .gemm_config import GemmConfig
from .gemm_pack import CODE_BYTES


class GemmMainloop:
    """One warpgroup's loop over the units of its rows; the kernel class adds the rest."""

    config: GemmConfig
    integer: bool
    tile_m: int
    unit_words: int

    def tiled_mma(self) -> cute.TiledMma:
        """INT8 wgmma, 64 x tile_m, A from registers. Built where it is used: its accumulate flag is traced state."""
        major = OperandMajorMode.K
        shape = (64, self.tile_m)
        return sm90.make_trivial_tiled_mma(Int8, Int8, major, major, Int32, (1, 1, 1), shape, wg.OperandSource.RMEM)

    @cute.jit
    def consume(self, sX, sW, sS, acc, out, full, empty, thread, group, begin, end, int4_units, stage, phase):
        """One warpgroup: decode the units of its 64 rows and multiply them with the tokens."""
        config = self.config
        tiled_mma = self.tiled_mma()
        tCrB = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(sX))
        rA = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
        rA32 = cute.recast_tensor(rA, Uint32)
        raw = cute.make_rmem_tensor((8,), Uint32)
        codes = cute.make_rmem_tensor((8,), Uint32)
        loaded = cute.make_rmem_tensor((2,), Float32)
        scale = cute.make_rmem_tensor((2,), Float32)
        raw.fill(0)
        loaded.fill(0.0)
        middle = cutlass.min(cutlass.max(int4_units, begin), end)
        start = begin
        if cutlass.const_expr(config.pairs):
            # few tokens: two units at a time, so that the latencies of one hide those of the other
            acc2 = cute.make_rmem_tensor(acc.shape, Int32)
            rA2 = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
            raw2 = cute.make_rmem_tensor((8,), Uint32)
            scale2 = cute.make_rmem_tensor((2,), Float32)
            if cutlass.const_expr(self.integer):
                acc2.fill(0)
            for _ in cutlass.range((middle - begin) // 2, unroll=1):
                first = stage
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, scale, thread, group, stage)
                stage, phase = self.advance(stage, phase)
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw2, scale2, thread, group, stage)
                self.decode_int4(raw, scale, rA32)
                self.decode_int4(raw2, scale2, cute.recast_tensor(rA2, Uint32))
                self.multiply_pair(rA, rA2, tCrB, acc, acc2, first, stage)
                self.promote(acc, out, sS, scale, thread, first)
                self.release(empty, first)
                self.promote(acc2, out, sS, scale2, thread, stage)
                self.release(empty, stage)
                stage, phase = self.advance(stage, phase)
            start = begin + (middle - begin) // 2 * 2
            if cutlass.const_expr(self.integer):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    acc[i] = acc[i] + acc2[i]
        if start < end:  # a CTA of a split may have no unit
            cute.arch.mbarrier_wait(full + stage, phase)
            self.load_unit(sW, raw, loaded, thread, group, stage)
        # The next unit's codes are fetched before wgmma is issued and land while it runs. Not after: ptxas may give
        # them the registers of A, which wgmma still reads (seen: results that changed from run to run). And without
        # a branch on whether they have arrived: ptxas then serializes the four wgmmas of a unit.
        for unit in cutlass.range(start, middle, unroll=1):
            scale.store(loaded.load())
            codes.store(raw.load())
            this = stage
            stage, phase = self.advance(stage, phase)
            if unit + 1 < end:
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, loaded, thread, group, stage)
            self.decode_int4(codes, scale, rA32)
            self.multiply(rA, tCrB, acc, this, 4)
            self.promote(acc, out, sS, scale, thread, this)
            self.release(empty, this)
        if cutlass.const_expr(config.int8_units):
            for unit in cutlass.range(cutlass.max(start, middle), end, unroll=1):
                scale.store(loaded.load())
                codes.store(raw.load())
                this = stage
                stage, phase = self.advance(stage, phase)
                if unit + 1 < end:
                    cute.arch.mbarrier_wait(full + stage, phase)
                    self.load_unit(sW, raw, loaded, thread, group, stage)
                for j in cutlass.range_constexpr(8):
                    rA32[j] = codes[j]
                self.multiply(rA, tCrB, acc, this, 2)
                self.promote(acc, out, sS, scale, thread, this)
                self.release(empty, this)
        return stage, phase

    @cute.jit
    def multiply_pair(self, rA, rA2, tCrB, acc, acc2, stage, stage2):
        """Both units' products in one group of wgmma, alternating between two accumulators."""
        one = self.tiled_mma()
        two = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(4):
            one.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            two.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            cute.gemm(one, acc, rA[None, None, k], tCrB[None, None, k, stage], acc)
            cute.gemm(two, acc2, rA2[None, None, k], tCrB[None, None, k, stage2], acc2)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def advance(self, stage, phase):
        stage += 1
        if stage == self.config.stages:
            stage = Int32(0)
            phase ^= 1
        return stage, phase

    @cute.jit
    def load_unit(self, sW, raw, scale, thread, group, stage):
        """This thread's 32 bytes of codes and the scales of its two rows."""
        base = sW.iterator + (stage * self.config.warpgroups + group) * self.unit_words
        for h in cutlass.range_constexpr(2):
            words = load_u32x4(base + (h * 512 + thread * 4))
            for j in cutlass.range_constexpr(4):
                raw[4 * h + j] = words[j]
        row = (thread // 32) * 16 + (thread % 32) // 4
        for r in cutlass.range_constexpr(2):
            if cutlass.const_expr(self.integer):
                factors = cute.make_tensor(cute.recast_ptr(base + CODE_BYTES // 4, dtype=Uint8), cute.make_layout(64))
                scale[r] = cute.arch.inline_ptx(
                    "mov.b32 {$w0}, {$r0};",
                    write_only_types=[Float32],
                    read_only_args=[Uint32(factors[row + 8 * r])],
                )
            else:
                scales = cute.make_tensor(cute.recast_ptr(base + CODE_BYTES // 4, dtype=BFloat16), cute.make_layout(64))
                scale[r] = Float32(scales[row + 8 * r])

    @cute.jit
    def decode_int4(self, raw, scale, rA32):
        """8 packed words to the 16 register words of wgmma's A: low nibbles are row r, high nibbles row r + 8."""
        if cutlass.const_expr(self.integer):
            # code + 8 times an unsigned factor fits a byte; 128 - 8 * factor re-centres it: two instructions for
            # four weights (the trick of LiquidGEMM, arXiv:2509.01229)
            factor = cute.recast_tensor(scale, Uint32)
            centre0 = Uint32(0x80808080) - factor[0] * Uint32(0x08080808)
            centre1 = Uint32(0x80808080) - factor[1] * Uint32(0x08080808)
            for j in cutlass.range_constexpr(8):
                low = raw[j] & Uint32(0x0F0F0F0F)
                high = (raw[j] >> 4) & Uint32(0x0F0F0F0F)
                rA32[2 * j] = (low * factor[0] + centre0) ^ Uint32(0x80808080)
                rA32[2 * j + 1] = (high * factor[1] + centre1) ^ Uint32(0x80808080)
        else:  # the code stays in the byte's high half: 16 * code, the packed scale holds the 1/16
            for j in cutlass.range_constexpr(8):
                rA32[2 * j] = (raw[j] << 4) & Uint32(0xF0F0F0F0)
                rA32[2 * j + 1] = raw[j] & Uint32(0xF0F0F0F0)

    @cute.jit
    def multiply(self, rA, tCrB, acc, stage, steps: cutlass.Constexpr):
        tiled_mma = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(steps):
            tiled_mma.set(wg.Field.ACCUMULATE, self.integer or k != 0)
            cute.gemm(tiled_mma, acc, rA[None, None, k], tCrB[None, None, k, stage], acc)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def promote(self, acc, out, sS, scale, thread, stage):
        """out += sum of the unit x weight scale (of the row) x token scale (of the column)."""
        if cutlass.const_expr(not self.integer):
            column = 2 * (thread % 4)
            for j in cutlass.range_constexpr(self.tile_m // 8):
                for c in cutlass.range_constexpr(2):
                    if cutlass.const_expr(self.config.token_scales == "group"):
                        token = sS[8 * j + column + c, stage]
                        for r in cutlass.range_constexpr(2):
                            i = 4 * j + 2 * r + c
                            out[i] = out[i] + Float32(acc[i]) * (scale[r] * token)
                    else:
                        for r in cutlass.range_constexpr(2):
                            i = 4 * j + 2 * r + c
                            out[i] = out[i] + Float32(acc[i]) * scale[r]

    @cute.jit
    def release(self, empty, stage):
        """This warp has read the stage: tell the producer (of every CTA that shares it)."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if cutlass.const_expr(self.config.multicast > 1):
                for peer in cutlass.range_constexpr(self.config.multicast):
                    cute.arch.mbarrier_arrive(empty + stage, peer)
            else:
                cute.arch.mbarrier_arrive(empty + stage)
