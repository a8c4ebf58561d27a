"""Warp-level block-scaled products of Blackwell (sm_120a), as inline PTX, for CuTe DSL kernels."""

from typing import Any

from cutlass import Float32, Uint32, cute

SCALES = {16: ("4X", "ue4m3"), 32: ("2X", "ue8m0")}  # columns under one scale -> scales of a row in one mma, format


@cute.jit
def mma_e2m1(a: Any, b: Any, c: Any, scale_a: Any, scale_b: Any, group_size: Any):
    """m16n8k64 of E2M1 codes under scales of 16 (E4M3) or 32 columns (E8M0), added to float32 c.

    a, b      4 and 2 registers of eight codes; lane 4 g + q: rows g, g + 8 of A, g of B; columns from 8 q, 8 q + 32 on
    scale_a   the scales of row g + 8 * (lane % 2), in the low bytes; only lanes with q < 2 are asked
    scale_b   the scales of row g; only lanes with q = 0 are asked
    """
    count, kind = SCALES[group_size]
    return cute.arch.inline_ptx(
        "{ .reg .b16 zero; mov.b16 zero, 0;"
        f" mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::{count}.m16n8k64.row.col.f32.e2m1.e2m1.f32.{kind}"
        " {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}},"
        " {{$r10}}, {zero, zero}, {{$r11}}, {zero, zero}; }",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, *b, *c, Uint32(scale_a), Uint32(scale_b)],
    )
