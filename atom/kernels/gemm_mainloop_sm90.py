# ruff: noqa: SIM102  (an `if` of the compiler inside or around one of the GPU is not one condition)
"""The consumers of the sm_90a GEMM: packed codes to registers, wgmma, promotion to float32. See gemm_sm90.py."""

import math
from typing import Any

import cutlass
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float8E4M3FN, Float32, Int8, Int32, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from cutlass.cute.nvgpu import warpgroup as wg

from .dsl.memory import load_u32x4
from .gemm_config import GemmConfig
from .gemm_kinds import WeightKind

OPERANDS = {"int8": Int8, "e4m3": Float8E4M3FN, "bf16": BFloat16}


class GemmMainloop:
    """One warpgroup's loop over the units of its rows; the kernel class adds the rest."""

    config: GemmConfig
    kind: WeightKind
    codec: Any
    tile_m: int
    unit_words: int

    @property
    def operand(self):
        return OPERANDS[self.kind.operand]

    @property
    def sum_type(self):
        """In which wgmma adds up."""
        return Int32 if self.kind.operand == "int8" else Float32

    def tiled_mma(self) -> cute.TiledMma:
        """wgmma of 64 x tile_m, A from registers, or from shared memory where codes need no decoding.

        Built where it is used: its accumulate flag is traced state.
        """
        source = wg.OperandSource.SMEM if self.kind.is_verbatim else wg.OperandSource.RMEM
        shape, major = (64, self.tile_m), OperandMajorMode.K
        return sm90.make_trivial_tiled_mma(
            self.operand, self.operand, major, major, self.sum_type, (1, 1, 1), shape, source
        )

    @cute.jit
    def consume(
        self, sX, sW, sS, sT, acc, out, full, empty, thread, group, end, middle, stage, phase, row_values, token_values
    ):  # fmt: skip
        """One warpgroup: decode `end` units of its 64 rows, `middle` of them INT4, and multiply them with tokens."""
        config = self.config
        tiled_mma = self.tiled_mma()
        tCrB = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(sX))
        rA = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
        rA32 = cute.recast_tensor(rA, Uint32)
        raw = cute.make_rmem_tensor((8,), Uint32)
        codes = cute.make_rmem_tensor((8,), Uint32)
        loaded = cute.make_rmem_tensor((self.codec.scale_words,), self.codec.scale_type)
        scale = cute.make_rmem_tensor((self.codec.scale_words,), self.codec.scale_type)
        raw.fill(0)
        loaded.fill(0)
        start = Int32(0)
        if cutlass.const_expr(config.pairs):
            # few tokens: two units at a time, so that the latencies of one hide those of the other
            acc2 = cute.make_rmem_tensor(acc.shape, self.sum_type)
            rA2 = tiled_mma.make_fragment_A(tiled_mma.partition_shape_A((64, 128)))
            raw2 = cute.make_rmem_tensor((8,), Uint32)
            scale2 = cute.make_rmem_tensor(scale.shape, self.codec.scale_type)
            if cutlass.const_expr(not self.kind.promoted):
                acc2.fill(0)
            for _ in cutlass.range(middle // 2, unroll=1):
                first = stage
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, scale, thread, group, stage)
                stage, phase = self.advance(stage, phase)
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw2, scale2, thread, group, stage)
                self.codec.decode(raw, scale, rA32)
                self.codec.decode(raw2, scale2, cute.recast_tensor(rA2, Uint32))
                self.multiply_pair(rA, rA2, tCrB, acc, acc2, self.place_of(first, group), self.place_of(stage, group))
                self.promote(acc, out, sS, scale, thread, first)
                self.release(empty, first)
                self.promote(acc2, out, sS, scale2, thread, stage)
                self.release(empty, stage)
                stage, phase = self.advance(stage, phase)
            start = middle // 2 * 2
            if cutlass.const_expr(not self.kind.promoted):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    acc[i] = acc[i] + acc2[i]
        last = middle if cutlass.const_expr(config.scaled_early) else end
        if cutlass.const_expr(config.fetches_ahead):
            if start < last:  # a CTA of a split may have no unit
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, raw, loaded, thread, group, stage)
        # The next unit's codes are fetched before wgmma is issued and land while it runs. Not after: ptxas may give
        # them the registers of A, which wgmma still reads (seen: results that changed from run to run). And without
        # a branch on whether they have arrived: ptxas then serializes the four wgmmas of a unit.
        for unit in cutlass.range(start, middle, unroll=1):
            this = stage
            if cutlass.const_expr(config.fetches_ahead):
                scale.store(loaded.load())
                codes.store(raw.load())
                stage, phase = self.advance(stage, phase)
                if unit + 1 < last:
                    cute.arch.mbarrier_wait(full + stage, phase)
                    self.load_unit(sW, raw, loaded, thread, group, stage)
            else:
                cute.arch.mbarrier_wait(full + stage, phase)
                self.load_unit(sW, codes, scale, thread, group, stage)
                stage, phase = self.advance(stage, phase)
            self.codec.decode(codes, scale, rA32)
            self.multiply(rA, tCrB, acc, self.place_of(this, group), self.kind.steps)
            self.promote(acc, out, sS, scale, thread, this)
            self.release(empty, this)
        if cutlass.const_expr(config.scaled_early):
            self.share_scales(sT, token_values, thread, group)
            self.scale_sums(acc, out, sT, row_values, thread)
            sums = cute.make_rmem_tensor(self.outlier_mma().partition_shape_C((64, self.outlier_tokens)), Int32)
            for unit in cutlass.range(cutlass.max(start, middle), end, 2, unroll=1):
                one = stage
                cute.arch.mbarrier_wait(full + one, phase)
                self.load_unit(sW, codes, scale, thread, group, one)
                for j in cutlass.range_constexpr(8):
                    rA32[j] = codes[j]
                stage, phase = self.advance(stage, phase)
                two = one
                codes.fill(0)  # of a second unit that is not there
                if unit + 1 < end:
                    two = stage
                    cute.arch.mbarrier_wait(full + two, phase)
                    self.load_unit(sW, codes, scale, thread, group, two)
                    stage, phase = self.advance(stage, phase)
                for j in cutlass.range_constexpr(8):
                    rA32[8 + j] = codes[j]
                self.add_outliers(rA, sX, sW, sums, out, sT, thread, group, one, two)
                self.release(empty, one)
                if unit + 1 < end:
                    self.release(empty, two)
        elif cutlass.const_expr(config.int8_units):
            for unit in cutlass.range(cutlass.max(start, middle), end, unroll=1):
                scale.store(loaded.load())
                for j in cutlass.range_constexpr(8):
                    rA32[j] = raw[j]
                this = stage
                stage, phase = self.advance(stage, phase)
                self.multiply(rA, tCrB, acc, self.place_of(this, group), 2)
                self.promote(acc, out, sS, scale, thread, this)
                self.release(empty, this)
                if unit + 1 < end:
                    cute.arch.mbarrier_wait(full + stage, phase)
                    self.load_unit(sW, raw, loaded, thread, group, stage)
        return stage, phase

    @property
    def outlier_tokens(self) -> int:
        """Tokens whose outlier sums are added at a time: their INT32 sums stand beside those of the whole tile."""
        tight = self.tile_m == 256 or self.config.bounded or self.config.registers == 112
        return math.gcd(self.tile_m, 32 if tight else 64)

    def outlier_mma(self) -> cute.TiledMma:
        shape, major = (64, self.outlier_tokens), OperandMajorMode.K
        return sm90.make_trivial_tiled_mma(
            self.operand, self.operand, major, major, self.sum_type, (1, 1, 1), shape, wg.OperandSource.RMEM
        )

    @cute.jit
    def scale_sums(self, acc, out, sT, row_values, thread):
        """out = the whole sum of the INT4 columns x scale of the row x scale of the token."""
        for j in cutlass.range_constexpr(self.tile_m // 8):
            for c in cutlass.range_constexpr(2):
                factor = sT[8 * j + 2 * (thread % 4) + c, 0]
                for r in cutlass.range_constexpr(2):
                    i = 4 * j + 2 * r + c
                    out[i] = Float32(acc[i]) * (row_values[r] * factor)

    @cute.jit
    def add_outliers(self, rA, sX, sW, acc, out, sT, thread, group, one, two):
        """out += the sum of two units of INT8 outlier columns x scale of the row x scale of the token's outliers."""
        tokens = self.outlier_tokens
        unit = sW.iterator + (one * self.config.warpgroups + group) * self.unit_words
        scales = cute.make_tensor(
            cute.recast_ptr(unit + self.kind.code_bytes // 4, dtype=BFloat16), cute.make_layout(64)
        )
        row = (thread // 32) * 16 + (thread % 32) // 4
        row_scale = (Float32(scales[row]), Float32(scales[row + 8]))
        for part in cutlass.range_constexpr(self.tile_m // tokens):
            mma = self.outlier_mma()
            tile = cute.local_tile(sX, (tokens, 128, self.config.ways * self.config.stages), (part, 0, 0))
            tCrB = mma.make_fragment_B(mma.get_slice(thread).partition_B(tile))
            wg.fence()
            for k in cutlass.range_constexpr(4):
                mma.set(wg.Field.ACCUMULATE, k != 0)
                at = self.place_of(one if k < 2 else two, group)
                cute.gemm(mma, acc, rA[None, None, k], tCrB[None, None, k % 2, at], acc)
            wg.commit_group()
            wg.wait_group(0)
            for j in cutlass.range_constexpr(tokens // 8):
                for c in cutlass.range_constexpr(2):
                    factor = sT[part * tokens + 8 * j + 2 * (thread % 4) + c, 1]
                    for r in cutlass.range_constexpr(2):
                        i = 2 * r + c
                        at = part * (tokens // 2) + 4 * j + i
                        out[at] = out[at] + Float32(acc[4 * j + i]) * (row_scale[r] * factor)

    @cute.jit
    def multiply_pair(self, rA, rA2, tCrB, acc, acc2, stage, stage2):
        """Both units' products in one group of wgmma, alternating between two accumulators."""
        one = self.tiled_mma()
        two = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(4):
            one.set(wg.Field.ACCUMULATE, not self.kind.promoted or k != 0)
            two.set(wg.Field.ACCUMULATE, not self.kind.promoted or k != 0)
            cute.gemm(one, acc, rA[None, None, k], tCrB[None, None, k, stage], acc)
            cute.gemm(two, acc2, rA2[None, None, k], tCrB[None, None, k, stage2], acc2)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def place_of(self, stage, group):
        """Which unit of activations in the ring belongs to a warpgroup's unit of a stage."""
        return stage if cutlass.const_expr(self.config.ways == 1) else stage * self.config.ways + group

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
        self.codec.load_scales(base, scale, thread)

    @cute.jit
    def multiply(self, rA, tCrB, acc, stage, steps: cutlass.Constexpr):
        tiled_mma = self.tiled_mma()
        slabs = self.kind.operand_bytes  # 128 bytes of every token each
        wg.fence()
        for k in cutlass.range_constexpr(steps):
            tiled_mma.set(wg.Field.ACCUMULATE, not self.kind.promoted or k != 0)
            at = stage if cutlass.const_expr(slabs == 1) else slabs * stage + k // 4
            cute.gemm(tiled_mma, acc, rA[None, None, k], tCrB[None, None, k % 4, at], acc)
        wg.commit_group()
        wg.wait_group(0)

    @cute.jit
    def consume_verbatim(self, sX, sA, acc, out, full, empty, thread, group, count, stage, phase):
        """One warpgroup, codes that are the operand: both sides straight from shared memory."""
        tiled_mma = self.tiled_mma()
        mma = tiled_mma.get_slice(thread)
        tCrA = tiled_mma.make_fragment_A(mma.partition_A(sA))
        tCrB = tiled_mma.make_fragment_B(mma.partition_B(sX))
        before = stage
        for unit in cutlass.range(count, unroll=1):
            this = stage
            cute.arch.mbarrier_wait(full + this, phase)
            wg.fence()
            for k in cutlass.range_constexpr(self.kind.steps):
                tiled_mma.set(wg.Field.ACCUMULATE, not self.kind.promoted or k != 0)
                at = this * self.config.warpgroups + group
                x_at = self.place_of(this, group)
                cute.gemm(tiled_mma, acc, tCrA[None, None, k, at], tCrB[None, None, k, x_at], acc)
            wg.commit_group()
            if cutlass.const_expr(self.kind.promoted):
                wg.wait_group(0)
                self.release(empty, this)
                for i in cutlass.range_constexpr(cute.size(acc)):
                    out[i] = out[i] + acc[i]
            else:  # one unit's products run while the next unit is waited for
                wg.wait_group(1)
                if unit > 0:
                    self.release(empty, before)
            before = this
            stage, phase = self.advance(stage, phase)
        if cutlass.const_expr(not self.kind.promoted):
            wg.wait_group(0)
            if count > 0:
                self.release(empty, before)
        return stage, phase

    @cute.jit
    def consume_alternating(self, sX, sA, acc, out, full, empty, thread, group, count, stage, phase):
        """As consume_verbatim, two units at a time: one's sums are promoted while the other's products run.

        No products are under way from one round to the next: ptxas would then serialize all of them.
        """
        mma = self.tiled_mma().get_slice(thread)
        tCrA = self.tiled_mma().make_fragment_A(mma.partition_A(sA))
        tCrB = self.tiled_mma().make_fragment_B(mma.partition_B(sX))
        other = cute.make_rmem_tensor(acc.shape, self.sum_type)
        for _ in cutlass.range(count // 2, unroll=1):
            one = stage
            cute.arch.mbarrier_wait(full + one, phase)
            two, phase = self.advance(stage, phase)
            cute.arch.mbarrier_wait(full + two, phase)
            self.multiply_verbatim(tCrA, tCrB, acc, group, one)
            self.multiply_verbatim(tCrA, tCrB, other, group, two)
            wg.wait_group(1)
            self.release(empty, one)
            for i in cutlass.range_constexpr(cute.size(acc)):
                out[i] = out[i] + acc[i]
            wg.wait_group(0)
            self.release(empty, two)
            for i in cutlass.range_constexpr(cute.size(acc)):
                out[i] = out[i] + other[i]
            stage, phase = self.advance(two, phase)
        if count % 2 == 1:
            cute.arch.mbarrier_wait(full + stage, phase)
            self.multiply_verbatim(tCrA, tCrB, acc, group, stage)
            wg.wait_group(0)
            self.release(empty, stage)
            for i in cutlass.range_constexpr(cute.size(acc)):
                out[i] = out[i] + acc[i]
            stage, phase = self.advance(stage, phase)
        return stage, phase

    @cute.jit
    def multiply_verbatim(self, tCrA, tCrB, acc, group, stage):
        """The products of one unit, into sums of their own: issued, not waited for."""
        tiled_mma = self.tiled_mma()
        wg.fence()
        for k in cutlass.range_constexpr(self.kind.steps):
            tiled_mma.set(wg.Field.ACCUMULATE, k != 0)
            at = stage * self.config.warpgroups + group
            x_at = self.place_of(stage, group)
            cute.gemm(tiled_mma, acc, tCrA[None, None, k, at], tCrB[None, None, k, x_at], acc)
        wg.commit_group()

    @cute.jit
    def promote(self, acc, out, sS, scale, thread, stage):
        """out += sum of the unit x weight scale (of the row) x token scale (of the column)."""
        if cutlass.const_expr(self.kind.promoted):
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
