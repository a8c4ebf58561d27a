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
        ways = config.ways
        count = (end - begin + ways - 1) // ways
        early = cutlass.min(count, Int32(config.stages)) * first
        scale_bytes = Int32(0)
        if cutlass.const_expr(config.token_scales == "group"):
            scale_bytes = cutlass.min(Int32(self.tile_m), mS.shape[1] - token0) * 4
        rows = self.first_units(mW, row_tile, begin)
        tokens = (x_atom, mX, sX, mS, sS, full, rank, token0)
        # Weights never depend on the kernel before this one: fetch them before waiting for it (PDL). These loops are
        # unrolled: a round took a tenth of a microsecond otherwise.
        if first == 1:
            for s in cutlass.range_constexpr(config.stages):
                if s < early:
                    self.load_weights(rows, sW, full, ways * s, end - begin, Int32(s), scale_bytes)
            if cutlass.const_expr(config.pdl):
                cute.arch.griddepcontrol_wait()
            for s in cutlass.range_constexpr(config.stages):
                if s < early:
                    self.load_tokens(*tokens, begin + ways * s, end, Int32(s), int4_units, scale_bytes)
            stage += early
            if stage == config.stages:
                stage = Int32(0)
                phase ^= 1
        for i in cutlass.range(early, count, unroll=1):
            unit = begin + ways * i
            cute.arch.mbarrier_wait(empty + stage, phase)
            self.load_weights(rows, sW, full, ways * i, end - begin, stage, scale_bytes)
            self.load_tokens(*tokens, unit, end, stage, int4_units, scale_bytes)
            stage += 1
            if stage == config.stages:
                stage = Int32(0)
                phase ^= 1
        return stage, phase

    @cute.jit
    def load_tokens(
        self, x_atom, mX, sX, mS, sS, full, rank, token0, unit, end, stage, int4_units, scale_bytes
    ):  # fmt: skip
        """The activations of a stage and, where they have any by group, their scales."""
        config = self.config
        for way in cutlass.range_constexpr(config.ways):
            if way == 0 or unit + way < end:
                place = stage * config.ways + way
                self.load_unit_tokens(x_atom, mX, sX, full + stage, rank, token0, unit + way, place, int4_units)
        if cutlass.const_expr(config.token_scales == "group"):
            with cute.arch.elect_one():
                source = mS.iterator + (Int64(unit) * mS.shape[1] + token0)
                bulk_load(sS.iterator + stage * self.tile_m, source, scale_bytes, full + stage)

    @cute.jit
    def load_unit_tokens(self, x_atom, mX, sX, barrier, rank, token0, unit, place, int4_units):
        """The activations of one unit, into a place of the ring; for all CTAs of a cluster that share the tokens."""
        config = self.config
        width = 128 // self.slabs  # columns of a box
        column = unit * 128
        if cutlass.const_expr(config.int8_units):  # an INT8 unit has 64, an INT4 unit 128
            column = (unit + cutlass.min(unit, int4_units)) * 64
        ctas = cute.make_layout(config.multicast)
        for slab in cutlass.range_constexpr(self.slabs):
            corner = cute.domain_offset((token0, column + slab * width), mX)
            box = cute.group_modes(cute.local_tile(corner, (self.tile_m, width), (0, 0)), 0, 2)
            ring = cute.group_modes(sX, 0, 2)
            target, source = cpasync.tma_partition(x_atom, rank % config.multicast, ctas, ring, box)
            target = target[None, self.slabs * place + slab]
            if cutlass.const_expr(config.multicast > 1):
                mask = cutlass.Int16((1 << config.multicast) - 1)
                cute.copy(x_atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)
            else:
                cute.copy(x_atom, source, target, tma_bar_ptr=barrier)

    @cute.jit
    def first_units(self, mW, row_tile, begin):
        """Where unit `begin` of each warpgroup's rows stands; past N those of the last rows: loaded, never stored."""
        last_tile = mW.shape[0] - 1
        count = 1 if self.config.ways > 1 else self.config.warpgroups
        tiles = [cutlass.min(row_tile * count + g, last_tile) for g in range(count)]
        return [mW.iterator + (Int64(tile) * mW.shape[1] + begin) * self.unit_words for tile in tiles]

    @cute.jit
    def load_weights(self, rows, sW, full, offset, count, stage, scale_bytes):
        """The weights of a stage, `offset` units behind the first of `count`."""
        config = self.config
        with cute.arch.elect_one():
            if cutlass.const_expr(config.ways > 1):  # neighbours along K
                units = cutlass.min(Int32(config.ways), count - offset)
                expected = units * (self.kind.unit_bytes + self.x_bytes)
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, expected)
                target = sW.iterator + stage * config.warpgroups * self.unit_words
                bulk_load(target, rows[0] + offset * self.unit_words, units * self.kind.unit_bytes, full + stage)
            else:
                cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.w_bytes + self.x_bytes + scale_bytes)
                for g in cutlass.range_constexpr(config.warpgroups):
                    target = sW.iterator + (stage * config.warpgroups + g) * self.unit_words
                    source = rows[g] + offset * self.unit_words
                    bulk_load(target, source, Int32(self.kind.unit_bytes), full + stage)
