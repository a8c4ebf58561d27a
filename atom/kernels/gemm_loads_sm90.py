"""The producer warp of the sm_90a GEMM: weights, activations and their scales into the ring. See gemm_sm90.py."""

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync

from .dsl.memory import bulk_load
from .gemm_config import GemmConfig
from .gemm_kinds import WeightKind


class GemmLoads:
    """What one warp brings for the others; the kernel class adds the rest."""

    config: GemmConfig
    kind: WeightKind
    tile_m: int
    unit_words: int
    slabs: int
    x_bytes: int
    w_bytes: int

    @cute.jit
    def produce(
        self, x_atom, mX, sX, mW, sW, mS, sS, full, empty, rank, row_tile, token0, begin, end, int4_units,
        stage, phase, first,
    ):  # fmt: skip
        """One warp: weights, activation codes and token scales of units begin .. end into the ring of stages."""
        config = self.config
        last_tile = mW.shape[0] - 1
        scale_bytes = Int32(0)
        if cutlass.const_expr(config.token_scales == "group"):
            scale_bytes = cutlass.min(Int32(self.tile_m), mS.shape[1] - token0) * 4
        tXgX, tXgH, tXsX, mask = self.token_boxes(x_atom, mX, sX, token0, rank)
        ways = config.ways
        count = (end - begin + ways - 1) // ways
        early = cutlass.min(count, Int32(config.stages)) * first
        # weights never depend on the kernel before this one: fetch them before waiting for it (PDL)
        if first == 1:
            self.load_first_weights(mW, sW, full, row_tile, last_tile, begin, end, early, scale_bytes)
            if cutlass.const_expr(config.pdl):
                cute.arch.griddepcontrol_wait()
        for i in cutlass.range(count, unroll=1):
            unit = begin + ways * i
            if i >= early:
                cute.arch.mbarrier_wait(empty + stage, phase)
                self.load_weights(mW, sW, full, row_tile, last_tile, unit, end, stage, scale_bytes)
            for way in cutlass.range_constexpr(ways):
                if cutlass.const_expr(ways == 1):
                    self.load_unit_tokens(x_atom, tXgX, tXgH, tXsX, unit, stage, full + stage, int4_units, mask)
                elif unit + way < end:
                    at = stage * ways + way
                    self.load_unit_tokens(x_atom, tXgX, tXgH, tXsX, unit + way, at, full + stage, int4_units, mask)
            if cutlass.const_expr(config.token_scales == "group"):
                with cute.arch.elect_one():
                    source = mS.iterator + (Int64(unit) * mS.shape[1] + token0)
                    bulk_load(sS.iterator + stage * self.tile_m, source, scale_bytes, full + stage)
            stage += 1
            if stage == config.stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase

    @cute.jit
    def token_boxes(self, x_atom, mX, sX, token0, rank):
        """(boxes of activations by 128 columns, the same from column 64 on, places in the ring, CTAs to reach)."""
        config = self.config
        boxes = (self.tile_m, 128 // self.slabs)
        tokens = cute.domain_offset((token0, 0), mX)
        gX = cute.local_tile(tokens, boxes, (0, None))
        half = cute.local_tile(cute.domain_offset((0, 64), tokens), boxes, (0, None))  # from column 64 on
        x_cta = rank % config.multicast
        x_ctas = cute.make_layout(config.multicast)
        s_group = cute.group_modes(sX, 0, 2)
        tXsX, tXgX = cpasync.tma_partition(x_atom, x_cta, x_ctas, s_group, cute.group_modes(gX, 0, 2))
        _, tXgH = cpasync.tma_partition(x_atom, x_cta, x_ctas, s_group, cute.group_modes(half, 0, 2))
        return tXgX, tXgH, tXsX, cutlass.Int16((1 << config.multicast) - 1)

    @cute.jit
    def load_first_weights(self, mW, sW, full, row_tile, last_tile, begin, end, early, scale_bytes):
        """The weights of the first stages, a lane for each copy: one after the other they took a microsecond."""
        config = self.config
        ways, copies = config.ways, 1 if config.ways > 1 else config.warpgroups  # of a stage
        lane = cute.arch.lane_idx()
        if lane < early:
            expected = self.w_bytes + self.x_bytes + scale_bytes
            if cutlass.const_expr(ways > 1):
                expected = cutlass.min(Int32(ways), end - (begin + ways * lane)) * (self.kind.unit_bytes + self.x_bytes)
            cute.arch.mbarrier_arrive_and_expect_tx(full + lane, expected)
        cute.arch.sync_warp()
        for first in cutlass.range_constexpr(0, config.stages * copies, 32):
            stage = (first + lane) // copies
            if stage < early:
                place = first + lane - stage * copies
                unit = begin + ways * stage
                tile = cutlass.min(row_tile, last_tile)
                size = Int32(self.kind.unit_bytes)
                if cutlass.const_expr(ways > 1):
                    size = cutlass.min(Int32(ways), end - unit) * size
                else:
                    tile = cutlass.min(row_tile * copies + place, last_tile)
                source = mW.iterator + (Int64(tile) * mW.shape[1] + unit) * self.unit_words
                target = sW.iterator + (stage * config.warpgroups + place) * self.unit_words
                bulk_load(target, source, size, full + stage)

    @cute.jit
    def load_weights(self, mW, sW, full, row_tile, last_tile, unit, end, stage, scale_bytes):
        config = self.config
        if cutlass.const_expr(config.ways > 1):  # neighbours along K
            count = cutlass.min(Int32(config.ways), end - unit)
            with cute.arch.elect_one():
                expected = count * (self.kind.unit_bytes + self.x_bytes)
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, expected)
                source = mW.iterator + (Int64(cutlass.min(row_tile, last_tile)) * mW.shape[1] + unit) * self.unit_words
                target = sW.iterator + stage * config.warpgroups * self.unit_words
                bulk_load(target, source, count * self.kind.unit_bytes, full + stage)
        else:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.w_bytes + self.x_bytes + scale_bytes)
                for g in cutlass.range_constexpr(config.warpgroups):
                    tile = cutlass.min(row_tile * config.warpgroups + g, last_tile)  # past N: loaded, never stored
                    source = mW.iterator + (Int64(tile) * mW.shape[1] + unit) * self.unit_words
                    target = sW.iterator + (stage * config.warpgroups + g) * self.unit_words
                    bulk_load(target, source, Int32(self.kind.unit_bytes), full + stage)

    @cute.jit
    def load_unit_tokens(self, x_atom, tXgX, tXgH, tXsX, unit, at, barrier, int4_units, mask):
        """The activations of one unit, into place `at` of the ring."""
        if cutlass.const_expr(self.config.int8_units):
            # 64-column steps: an INT8 unit starts on any of them, an INT4 unit on every second
            step = 2 * unit if unit < int4_units else int4_units + unit
            if step % 2 == 0:
                self.load_tokens(x_atom, tXgX[None, step // 2], tXsX[None, at], barrier, mask)
            else:
                self.load_tokens(x_atom, tXgH[None, step // 2], tXsX[None, at], barrier, mask)
        else:
            for slab in cutlass.range_constexpr(self.slabs):
                target = tXsX[None, self.slabs * at + slab]
                self.load_tokens(x_atom, tXgX[None, self.slabs * unit + slab], target, barrier, mask)

    @cute.jit
    def load_tokens(self, x_atom, source, target, barrier, mask):
        if cutlass.const_expr(self.config.multicast > 1):
            cute.copy(x_atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)
        else:
            cute.copy(x_atom, source, target, tma_bar_ptr=barrier)
