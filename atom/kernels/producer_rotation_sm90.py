"""Block Hadamard rotations of values in registers: butterflies within a thread, then over lanes."""

from math import sqrt
from typing import Any

import cutlass
from cutlass import Float32, cute

from .producer_config import CHUNK, ProducerConfig


class ProducerRotation:
    """What turns a row between its norm and its rounding; the kernel class adds the rest."""

    config: ProducerConfig

    @cute.jit
    def rotate(self, value, slot):
        """Blocks of normal columns times Sylvester's Hadamard matrix; what is left of a last block stays.

        Where nothing is left, its factor is left to the rounding.
        """
        config = self.config
        block = config.rotation
        turned = [value[e] for e in range(CHUNK)]
        for step in (1, 2, 4)[: block.bit_length() - 1]:
            turned = butterflies(turned, step)
        for lanes in (1, 2, 4, 8, 16)[: (block // CHUNK).bit_length() - 1 if block > CHUNK else 0]:
            sign = Float32(1.0)
            if (slot & lanes) != 0:
                sign = Float32(-1.0)
            turned = [cute.arch.shuffle_sync_bfly(t, offset=lanes) + sign * t for t in turned]
        scale = Float32(1.0 / sqrt(block))
        if cutlass.const_expr(config.turns_all):
            for e in cutlass.range_constexpr(CHUNK):
                value[e] = turned[e]
        else:
            if slot * CHUNK < config.rotated:
                for e in cutlass.range_constexpr(CHUNK):
                    value[e] = turned[e] * scale

    @cute.jit
    def rotate_run(self, run, tid):
        """The same of a run of four chunks, but for signs and its factor: 32 columns within the thread.

        A chunk c was taken as c ^ k, so that sums over chunks lack the sign of the bits in c & k; see signs_of_run.
        """
        config = self.config
        turned = []
        for c in cutlass.range_constexpr(4):
            part = [run[c][e] for e in range(CHUNK)]
            for step in (1, 2, 4):
                part = butterflies(part, step)
            turned += part
        for step in (8, 16):
            turned = butterflies(turned, step)
        if cutlass.const_expr(config.rotation == 64):  # over two lanes, whose chunks lack the same signs
            sign = Float32(1.0)
            if (tid & 1) != 0:
                sign = Float32(-1.0)
            turned = [cute.arch.shuffle_sync_bfly(t, offset=1) + sign * t for t in turned]
        for i in cutlass.range_constexpr(4 * CHUNK):
            run[i // CHUNK][i % CHUNK] = turned[i]

    @cute.jit
    def signs_of_run(self, tid):
        """What a run's chunks lack after rotate_run."""
        first, second = Float32(1.0), Float32(1.0)
        if ((tid >> 1) & 1) != 0:
            first = Float32(-1.0)
        if ((tid >> 1) & 2) != 0:
            second = Float32(-1.0)
        return Float32(1.0), first, second, first * second


def butterflies(values: list[Any], step: int) -> list[Any]:
    """Sums and differences of values `step` apart."""
    return [values[e] + values[e + step] if e & step == 0 else values[e - step] - values[e] for e in range(len(values))]
