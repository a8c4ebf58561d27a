"""A stage of the decode kernel (sm_90a): scores, weights and outputs of a computing warp; see paged_decode_sm90.py."""

import cutlass
from cutlass import Boolean, Float32, Uint32, cute

from .attention_config import DecodeConfig
from .decode_codes_sm90 import expand, expand_pair, load_row
from .decode_offset_sm90 import KeyOffset
from .dsl.arithmetic import from_bits
from .dsl.memory import pack_bf16x2
from .dsl.tensor_core import exp2, load_word, log2, mma_bf16, mma_f16, pack_f16x2, reciprocal_approx, transpose_8x8

LOWEST = -1.0e30  # a maximum before the first score: finite, so that differences are numbers
LOG2_E = 1.4426950408889634
MOST_WEIGHT = 2.0**15  # a weight beyond it raises the reference; float16 ends at 2^16


class DecodeStage(KeyOffset):
    """What the kernel class mixes in."""

    has_zero: bool
    is_float: bool
    is_half: bool
    is_wide: bool
    steps: int
    key_codes: int
    value_codes: int

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self.has_zero = config.kv in ("int4", "int8")
        self.is_float = config.kv in ("fp8_e4m3", "bf16")  # codes that may be NaN
        self.is_half = config.kv != "bf16"  # products are of float16
        self.is_wide = config.channel_tiles * config.column_tiles > 16  # a lane holds more than 64 outputs
        self.steps = config.stage_tokens // (16 * config.groups)
        self.key_codes = 2 * config.block_size * config.word_bytes  # where they begin in a tile
        self.value_codes = self.key_codes + config.block_size * config.row_bytes

    @cute.jit
    def multiply(self, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        """One mma in the format of the expanded codes."""
        if cutlass.const_expr(self.is_half):
            found = mma_f16((a0, a1, a2, a3), b0, b1, (c0, c1, c2, c3))
        else:
            found = mma_bf16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        return found

    @cute.jit
    def place_of(self, tile: cutlass.Constexpr):
        """Where the `tile`-th 16 tokens of a stage are: bytes to their block's tile, and rows into it."""
        return 16 * tile // self.config.block_size * self.config.tile_bytes, 16 * tile % self.config.block_size

    @cute.jit
    def attend(
        self, is_edge: cutlass.Constexpr, mCos, mSin, full, empty, ring, rQ, rSum, rM, rL, rZ, rO, rU, rB, rN, turns,
        unit, cap, start, lowest, limit, j, is_first, slot, phase, lane,
    ):  # fmt: skip
        """One stage. is_edge: some of its tokens may not be seen."""
        config = self.config
        token0 = start + config.stage_tokens * j
        if cutlass.const_expr(config.has_offset):
            self.turn_back(mCos, mSin, rU, rB, token0, lane)
        cute.arch.mbarrier_wait(full + slot, phase)
        base = (ring + slot * config.stage_bytes).toint()
        may_be_hidden = is_edge and config.has_window and self.steps > 1  # a window may begin behind the first step
        is_still_first = is_first if cutlass.const_expr(may_be_hidden) else Boolean(False)
        for step in cutlass.range_constexpr(self.steps):
            row = lane // 4
            spot = row // 2 + 4 * (row % 2)  # attention_config.row_token
            words = base + 4 * spot
            token = token0 + spot
            if cutlass.const_expr(config.groups == 2):
                bytes_to, rows_to = self.place_of(1)
                is_right = lane % 4 >= 2  # this lane goes on with the second tile
                words = words + ((bytes_to + 4 * rows_to) if is_right else 0)
                token = token + (16 if is_right else 0)
            values = []  # loaded early, unless registers are short
            for h in cutlass.range_constexpr(0 if self.is_wide else config.groups):
                values.append(self.load_values(is_edge, base, config.groups * step + h, lane, token0, lowest, limit))
            scales = []  # of keys and of values, each for this lane's two tokens: (scale, zero point)
            seen = []
            block, first = self.place_of(config.groups * step)
            for r in cutlass.range_constexpr(2):
                position = token + 16 * config.groups * step + 8 * r
                is_seen = Boolean(True)
                if cutlass.const_expr(is_edge):
                    is_seen = position < limit
                    if cutlass.const_expr(config.has_window):
                        is_seen = is_seen and position >= lowest
                seen.append(is_seen)
                of_token = []
                for part in cutlass.range_constexpr(2):
                    if cutlass.const_expr(config.word_bytes):
                        word = load_word(words + block + 4 * (part * config.block_size + first + 8 * r))
                        if cutlass.const_expr(is_edge):
                            word = word if is_seen else Uint32(0)  # what was never written may be NaN
                        zero = from_bits(word & Uint32(0xFFFF0000))
                        if cutlass.const_expr(config.zero_bias):
                            zero = zero + Float32(config.zero_bias)
                        of_token.append((from_bits(word << 16), zero))
                scales.append(of_token)
            rE = cute.make_rmem_tensor((2, 2, config.column_tiles), Float32)  # row, head, column tile
            self.scores(base, step, rQ, rSum, rM, rE, rB, rN, scales, turns, unit, cap, lane)
            if cutlass.const_expr(is_edge):
                for r in cutlass.range_constexpr(2):
                    for c in cutlass.range_constexpr(2):
                        for n in cutlass.range_constexpr(config.column_tiles):
                            rE[r, c, n] = rE[r, c, n] if seen[r] else Float32(-cutlass.Float32.inf)
            rW = cute.make_rmem_tensor((2, 2, config.column_tiles), Float32)
            self.weigh(rE, rW, rM, rL, rZ, rO, scales, is_first if cutlass.const_expr(step == 0) else is_still_first)
            if cutlass.const_expr(may_be_hidden):
                is_still_first = is_still_first and not cute.arch.vote_any_sync(seen[0] or seen[1])
            for h in cutlass.range_constexpr(config.groups if self.is_wide else 0):
                values.append(self.load_values(is_edge, base, config.groups * step + h, lane, token0, lowest, limit))
            self.outputs(values, rW, rO, lane)

    @cute.jit
    def release(self, empty, slot):
        """This warp has read what is in a slot (none if negative)."""
        if slot >= 0:
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(empty + slot)

    @cute.jit
    def scores(self, base, step: cutlass.Constexpr, rQ, rSum, rM, rE, rB, rN, scales, turns, unit, cap, lane):
        """rE[row, head, column tile]: scores less the reference, in units of log2."""
        config = self.config
        row = lane // 4
        spot = row // 2 + 4 * (row % 2)
        is_right = lane % 4 >= 2
        sums = []  # of each tile: of each column tile
        for h in cutlass.range_constexpr(config.groups):
            block, first = self.place_of(config.groups * step + h)
            keys = []
            for r in cutlass.range_constexpr(2):
                address = base + block + self.key_codes + (first + 8 * r + spot) * config.row_bytes
                keys.append(expand(config, load_row(config, address, 4, config.key_words, lane % 4)))
            of_tile = []
            for n in cutlass.range_constexpr(config.column_tiles):
                found = (Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0))
                for k in cutlass.range_constexpr(len(keys[0]) // 2):
                    found = self.multiply(
                        keys[0][2 * k], keys[1][2 * k], keys[0][2 * k + 1], keys[1][2 * k + 1],
                        rQ[2 * k, n], rQ[2 * k + 1, n], *found,
                    )  # fmt: skip
                of_column = [found]  # and what the key offset adds
                if cutlass.const_expr(config.has_offset):
                    of_column.append(self.offset_scores(turns, rB, config.groups * step + h, n, lane))
                of_tile.append(of_column)
            sums.append(of_tile)
        for r in cutlass.range_constexpr(2):
            factor = unit
            shift = Float32(0.0)
            if cutlass.const_expr(config.word_bytes):
                factor = unit * scales[r][0][0]
                shift = factor * scales[r][0][1]
            for n in cutlass.range_constexpr(config.column_tiles):
                for c in cutlass.range_constexpr(2):
                    own = [x[2 * r + c] for x in sums[0][n]]
                    if cutlass.const_expr(config.groups == 2):
                        own = [y[2 * r + c] if is_right else x for x, y in zip(own, sums[1][n], strict=True)]
                    rest = -rM[c, n]
                    if cutlass.const_expr(config.has_cap):
                        rest = Float32(0.0)
                    if cutlass.const_expr(self.has_zero):
                        rest = rest - shift * rSum[c, n]
                    score = own[0] * factor + rest
                    if cutlass.const_expr(config.has_offset):
                        score = score + own[1] * rN[c, n]
                    if cutlass.const_expr(config.has_cap):
                        # tanh(x) = 1 - 2 / (exp(2 x) + 1): right at both ends
                        growth = exp2(score * Float32(2.0 * LOG2_E))
                        score = cap * (Float32(1.0) - Float32(2.0) * reciprocal_approx(growth + Float32(1.0)))
                        score = score * Float32(LOG2_E) - rM[c, n]
                    rE[r, c, n] = score

    @cute.jit
    def weigh(self, rE, rW, rM, rL, rZ, rO, scales, is_first):
        """rW: weights, scale_v included; a larger reference where one of them is too large, or there was none."""
        config = self.config
        columns = config.column_tiles
        rP = cute.make_rmem_tensor((2, 2, columns), Float32)
        top = Float32(0.0)
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    rP[r, c, n] = exp2(rE[r, c, n])
                    rW[r, c, n] = rP[r, c, n]
                    if cutlass.const_expr(config.word_bytes):
                        rW[r, c, n] = rP[r, c, n] * scales[r][1][0]
                    top = cute.arch.fmax(top, rW[r, c, n])
        if cute.arch.vote_any_sync(is_first or top > Float32(MOST_WEIGHT)):
            for n in cutlass.range_constexpr(columns):
                for c in cutlass.range_constexpr(2):
                    rise = Float32(LOWEST)
                    for r in cutlass.range_constexpr(2):
                        extra = Float32(0.0)
                        if cutlass.const_expr(config.word_bytes):
                            extra = log2(cute.arch.fmax(scales[r][1][0], Float32(2.0**-126)))
                        rise = cute.arch.fmax(rise, rE[r, c, n] + extra)
                    for offset in (2, 4, 8, 16) if config.groups == 2 else (4, 8, 16):
                        rise = cute.arch.fmax(rise, cute.arch.shuffle_sync_bfly(rise, offset=offset))
                    rise = rise if is_first else cute.arch.fmax(rise, Float32(0.0))
                    if cutlass.const_expr(config.has_window):  # a step of which nothing is seen sets no reference
                        rise = rise if rise > Float32(0.5 * LOWEST) else Float32(0.0)
                    shrink = exp2(-cute.arch.fmax(rise, Float32(0.0)))
                    rM[c, n] = rM[c, n] + rise
                    rL[c, n] = rL[c, n] * shrink
                    rZ[c, n] = rZ[c, n] * shrink
                    for j in cutlass.range_constexpr(config.channel_tiles):
                        rO[c, j, n] = rO[c, j, n] * shrink
                        rO[2 + c, j, n] = rO[2 + c, j, n] * shrink
                    for r in cutlass.range_constexpr(2):
                        rP[r, c, n] = exp2(rE[r, c, n] - rise)
                        rW[r, c, n] = rP[r, c, n]
                        if cutlass.const_expr(config.word_bytes):
                            rW[r, c, n] = rP[r, c, n] * scales[r][1][0]
        for n in cutlass.range_constexpr(columns):
            for c in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    rL[c, n] = rL[c, n] + rP[r, c, n]
                    if cutlass.const_expr(self.has_zero):
                        rZ[c, n] = rZ[c, n] + rW[r, c, n] * scales[r][1][1]

    @cute.jit
    def load_values(self, is_edge: cutlass.Constexpr, base, tile: cutlass.Constexpr, lane, token0, lowest, limit):
        """This lane's words of its four tokens of a tile, in the order of mma's columns."""
        config = self.config
        block, first = self.place_of(tile)
        rows = []
        for q in cutlass.range_constexpr(4):
            spot = lane % 4 + 4 * q
            address = base + block + self.value_codes + (first + spot) * config.row_bytes
            words = load_row(config, address, 8, config.value_words, lane // 4)
            if cutlass.const_expr(is_edge and self.is_float):  # zero weights do not silence NaN
                position = token0 + 16 * tile + spot
                is_seen = position < limit
                if cutlass.const_expr(config.has_window):
                    is_seen = is_seen and position >= lowest
                words = [word if is_seen else Uint32(0) for word in words]
            rows.append(words)
        return rows

    @cute.jit
    def outputs(self, values, rW, rO, lane):
        """rO += V^T p^T of one tile, or of two."""
        config = self.config
        weights = []  # of each column tile: two registers of mma's B
        for n in cutlass.range_constexpr(config.column_tiles):
            both = []
            for r in cutlass.range_constexpr(2):
                if cutlass.const_expr(self.is_half):
                    pair = pack_f16x2(rW[r, 0, n], rW[r, 1, n])
                else:
                    pair = pack_bf16x2(rW[r, 0, n], rW[r, 1, n])
                both.append(transpose_8x8(pair))
            weights.append(both)
        for h in cutlass.range_constexpr(config.groups):
            rows = values[h]
            own = weights
            if cutlass.const_expr(config.groups == 2):  # columns 0 to 3 belong to the first tile, 4 to 7 to the second
                is_left = lane < 16
                if cutlass.const_expr(h == 0):
                    own = [[x if is_left else Uint32(0) for x in both] for both in weights]
                else:
                    own = [[Uint32(0) if is_left else x for x in both] for both in weights]
            for i in cutlass.range_constexpr(config.value_words):
                near = expand_pair(config, rows[0][i], rows[1][i])
                far = expand_pair(config, rows[2][i], rows[3][i])
                for p in cutlass.range_constexpr(config.codes_per_word // 2):
                    j = config.codes_per_word // 2 * i + p
                    for n in cutlass.range_constexpr(config.column_tiles):
                        sums = self.multiply(
                            near[2 * p], near[2 * p + 1], far[2 * p], far[2 * p + 1], own[n][0], own[n][1],
                            rO[0, j, n], rO[1, j, n], rO[2, j, n], rO[3, j, n],
                        )  # fmt: skip
                        for e in cutlass.range_constexpr(4):
                            rO[e, j, n] = sums[e]
