"""Exactly rounded arithmetic and warp reductions for CuTe DSL kernels."""

from typing import Any

from cutlass import Float32, Uint32, cute


@cute.jit
def reciprocal(x: Any):
    """1 / x, correctly rounded, as torch.reciprocal."""
    return cute.arch.inline_ptx("rcp.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def reciprocal_of_normal(x: Any):
    """1 / x, correctly rounded, for x from 2^-126 to 2^126: what rcp.rn does where it need not look for the rest."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 r, e, n; rcp.approx.ftz.f32 r, {$r0}; neg.f32 n, {$r0}; fma.rn.f32 e, n, r, 0f3F800000;"
        " fma.rn.f32 {$w0}, r, e, r; }",
        write_only_types=[Float32],
        read_only_args=[x],
    )


@cute.jit
def reciprocal_root(x: Any):
    """1 / sqrt(x) to 2 ulp, for a normal x."""
    return cute.arch.inline_ptx("rsqrt.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def clamp_s16x2(pair: Any, high: Any):
    """Two int16 in a word, each between 0 and that of another word: one instruction."""
    return cute.arch.inline_ptx(
        "min.relu.s16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[pair, high]
    )


@cute.jit
def add_max(a: Any, b: Any, c: Any):
    """max(a + b, c) of unsigned words."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t, u, v; mov.b32 u, {$r1}; mov.b32 v, {$r2}; add.u32 t, {$r0}, u; max.u32 {$w0}, t, v; }",
        write_only_types=[Uint32],
        read_only_args=[a, b, c],
    )


@cute.jit
def round_to_int(x: Any):
    """The nearest integer, ties to even, as the bits of an int32."""
    return cute.arch.inline_ptx("cvt.rni.s32.f32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[x])


@cute.jit
def pack_e4m3x2(low: Any, high: Any):
    """Two floats as E4M3 in the low half of a word: ties to even, saturating."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, {$r1}, {$r0}; cvt.u32.u16 {$w0}, t; }",
        write_only_types=[Uint32],
        read_only_args=[low, high],
    )


@cute.jit
def round_to_e4m3(x: Any):
    """The nearest E4M3 value, as float32."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 t, u, v; .reg .b32 w; .reg .f32 z; mov.f32 z, 0f00000000;"
        " cvt.rn.satfinite.e4m3x2.f32 t, z, {$r0}; cvt.rn.f16x2.e4m3x2 w, t;"
        " mov.b32 {u, v}, w; cvt.f32.f16 {$w0}, u; }",
        write_only_types=[Float32],
        read_only_args=[x],
    )


@cute.jit
def as_bits(x: Any):
    """The bits of a float32."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[x])


@cute.jit
def from_bits(x: Any):
    """The float32 of such bits."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def warp_max_magnitude(x: Any):
    """The largest of a warp's values, none of them negative, in every lane: their bits are ordered as they are."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; mov.b32 t, {$r0}; redux.sync.max.u32 t, t, 0xffffffff; mov.b32 {$w0}, t; }",
        write_only_types=[Float32],
        read_only_args=[x],
    )


@cute.jit
def warp_sum(x: Any):
    """The sum over a warp in a fixed order, in every lane."""
    for offset in (16, 8, 4, 2, 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=offset)
    return x


@cute.jit
def multiply_bf16x2(a: Any, b: Any):
    """Two products of bfloat16, subnormal numbers included. (The mov: mul takes no immediate operand, b may be one.)"""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; mov.b32 t, {$r1}; mul.rn.bf16x2 {$w0}, {$r0}, t; }",
        write_only_types=[Uint32],
        read_only_args=[a, b],
    )


@cute.jit
def multiply_add_bf16x2(a: Any, b: Any, c: Any):
    """Two of a * b + c in bfloat16, rounded once; b and c may be constants."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t, u; mov.b32 t, {$r1}; mov.b32 u, {$r2}; fma.rn.bf16x2 {$w0}, {$r0}, t, u; }",
        write_only_types=[Uint32],
        read_only_args=[a, b, c],
    )


@cute.jit
def select_bytes(word: Any, selector: Any):
    """prmt: each nibble of `selector`, the lowest first, names a byte of `word`, or 4 for a zero byte."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Uint32],
        read_only_args=[word, Uint32(0), selector],
    )


@cute.jit
def max_or_nan(a: Any, b: Any):
    """The larger of two floats; NaN if one is."""
    return cute.arch.inline_ptx("max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def max_of_magnitudes(x: Any, y: Any):
    """The larger of |x| and |y|."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 t, u; abs.f32 t, {$r0}; abs.f32 u, {$r1}; max.f32 {$w0}, t, u; }",
        write_only_types=[Float32],
        read_only_args=[x, y],
    )


@cute.jit
def max_over_lanes(x: Any, known: Any, lanes: Any):
    """The largest value of `lanes` neighbouring lanes in each of them, from that of `known` of them (powers of two)."""
    for offset in (1, 2, 4, 8, 16)[known.bit_length() - 1 : lanes.bit_length() - 1]:
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
    return x
