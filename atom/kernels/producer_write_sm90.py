# ruff: noqa: SIM102  (an `if` of the compiler around one of the GPU is not one condition)
"""From the values of a run of chunks to codes and scales in memory: what shares a scale, and where it is written.

The rounding itself stands in producer_encode_sm90.py, the layout of the output in producers.py.
"""

from typing import Any

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute

from .dsl.arithmetic import max_over_lanes, reciprocal_of_normal
from .dsl.tensor_core import pick_bytes
from .dsl.wide_access import store_words
from .producer_config import CHUNK, UNIT_CHUNKS, ProducerConfig
from .producer_encode_sm90 import ProducerEncode


class ProducerWrite(ProducerEncode):
    """What happens to values once the scales over them can be known; the kernel class adds the rest."""

    config: ProducerConfig
    fills: bool

    @cute.jit
    def write(self, mQ, mS, run, back, signs, raw, of_row, factor, token, slot):
        """Round a run of chunks and store it, and its scale where it is the first under it; `slot` is its first.

        back         what puts the codes of a chunk back in order, where it was taken in another
        signs        of the chunks, which the values lack, or None
        factor       which the values lack: of the norm, of the rotation
        raw, of_row  the scale before it is rounded and the row's maximum, as they are with it
        """
        config = self.config
        each = 4 if config.writes_bf16 else 2
        words = cute.make_rmem_tensor((each, config.run), Int32)
        if cutlass.const_expr(config.rounding == "group"):
            self.round_group(mS, run, signs, raw, factor, words, token, slot)
        elif cutlass.const_expr(config.rounding == "factor"):
            self.round_factored(mS, run, signs, raw, of_row, factor, words, token, slot)
        elif cutlass.const_expr(config.rounding == "token"):
            scale = self.scale(self.raw(of_row, config.ratio), config.scale_format == "bf16")
            inverse = self.with_factor(self.inverse(scale), factor)
            for c in cutlass.range_constexpr(config.run):
                if cutlass.const_expr(config.format == "fp8_e4m3"):
                    self.encode_e4m3(run[c], inverse, words[None, c])
                else:
                    self.encode(run[c], inverse, *self.code_range(), words[None, c])
            if slot == 0:
                mS[0, token] = scale
        elif cutlass.const_expr(config.rounding == "small"):
            outer = Float32(1.0)
            if cutlass.const_expr(config.scale_format == "e4m3"):
                outer = self.outer_scale(of_row)
                if slot == 0:
                    mS[0, token] = outer
            scale = self.small_scale(raw, reciprocal_of_normal(outer))
            self.round_small(run[0], scale, self.with_factor(self.inverse(scale * outer), factor))
            self.encode_bf16(run[0], words[None, 0])
        else:
            for e in cutlass.range_constexpr(CHUNK if config.lacks_factor else 0):
                run[0][e] = run[0][e] * factor
            self.encode_bf16(run[0], words[None, 0])
        if cutlass.const_expr(config.reorders):
            for c in cutlass.range_constexpr(config.run):
                low, high = Uint32(words[0, c]), Uint32(words[1, c])
                words[0, c] = Int32(pick_bytes(low, high, back[c]))
                words[1, c] = Int32(pick_bytes(low, high, back[c] >> 16))
        chunk = slot
        there = slot < config.slots
        if cutlass.const_expr(config.outlier_slot > config.filled_chunks):
            there = there and (slot < config.filled_chunks or slot >= config.outlier_slot)
            if slot >= config.outlier_slot:
                chunk = slot - (config.outlier_slot - config.filled_chunks)
        if cutlass.const_expr(config.ctas_per_sm > 0):  # so that chunks of a thread share one address
            at = mQ.iterator.toint() + (Int64(token) * (config.width // CHUNK) + chunk) * (4 * each)
        else:
            at = mQ.iterator.toint() + Int64(token * (config.width // CHUNK) + chunk) * (4 * each)
        if cutlass.const_expr(self.fills):
            self.store_run(at, words)
        else:
            if there:
                self.store_run(at, words)

    @cute.jit
    def store_run(self, at, words):
        each = cute.size(words, mode=[0])
        found = [words[w, c] for c in range(self.config.run) for w in range(each)]
        for first in cutlass.range_constexpr(0, len(found), 4):
            store_words(at + 4 * first, found[first : first + 4])

    @cute.jit
    def round_group(self, mS, run, signs, raw, factor, words, token, slot):
        """Chunks under the scale of their group of 128, or of the outliers."""
        config = self.config
        qmin, qmax = self.unit_range(slot)
        unit = slot >> 4  # sixteen chunks a group
        begins = (slot & 15) == 0 and slot < config.filled_chunks
        if cutlass.const_expr(config.outliers > 0):
            if slot >= config.outlier_slot:
                unit = config.units + ((slot - config.outlier_slot) >> 3)
                begins = (slot & 7) == 0 and slot < config.slots
        scale = self.scale(raw, config.scale_format == "bf16")
        inverse = self.with_factor(self.inverse(scale), factor)
        for c in cutlass.range_constexpr(config.run):
            self.encode(run[c], signed(inverse, signs, c), qmin, qmax, words[None, c])
        if begins:
            mS[unit, token] = scale

    @cute.jit
    def round_factored(self, mS, run, signs, raw, of_row, lacking, words, token, slot):
        """Chunks under their group's factor and the token's scale, or under the scale of the outliers."""
        config = self.config
        outer = self.outer_scale(of_row)
        qmin, qmax = self.unit_range(slot)
        factor = self.factor_scale(raw, reciprocal_of_normal(outer))
        effective = factor * outer
        if slot == 0:
            mS[0, token] = outer
        if cutlass.const_expr(config.outliers > 0):
            if slot >= config.outlier_slot:
                factor = Float32(1.0)
                effective = self.scale(raw, True)
                if slot == config.outlier_slot:
                    mS[1, token] = effective
        inverse = self.with_factor(self.inverse(effective), lacking)
        for c in cutlass.range_constexpr(config.run):
            self.encode_factored(run[c], factor, signed(inverse, signs, c), qmin, qmax, words[None, c])

    @cute.jit
    def unit_raw(self, largest, slot):
        """The scale of a unit before it is rounded, from the largest magnitude of this thread's run of it."""
        config = self.config
        ratio = Float32(config.ratio)
        if cutlass.const_expr(config.rounding in ("small", "group", "factor")):
            lanes = config.group_chunks // config.run
            largest = max_over_lanes(largest, 1, lanes)
            if cutlass.const_expr(config.outliers > 0):
                wider = (32 if config.outliers > 128 else UNIT_CHUNKS) // config.run
                of_outliers = max_over_lanes(largest, lanes, wider)
                if slot >= config.outlier_slot:
                    largest = of_outliers
                    ratio = Float32(1.0 / 127.0)
        return self.raw(largest, ratio)

    @cute.jit
    def unit_range(self, slot):
        """(smallest code, largest code) of a slot's group, or of the outliers."""
        config = self.config
        qmin, qmax = self.code_range()
        if cutlass.const_expr(config.outliers > 0):
            if slot >= config.outlier_slot:
                qmin = Float32(-128.0)
                qmax = Float32(127.0)
        return qmin, qmax


def signed(inverse: Any, signs: Any, c: int) -> Any:
    """The reciprocal of a scale for the c-th chunk of a run."""
    return inverse if signs is None or c == 0 else inverse * signs[c]
