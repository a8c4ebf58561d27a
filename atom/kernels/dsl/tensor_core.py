"""Warp-level matrix instructions and the bit work around them, as inline PTX, for CuTe DSL kernels."""

from typing import Any

from cutlass import Float32, Uint32, cute


@cute.jit
def mma_bf16(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any):
    """m16n8k16: 16 x 16 bfloat16 times 16 x 8, added to float32 c. Fragments as the PTX ISA lays them out."""
    return cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, "
        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
    )


@cute.jit
def mma_f16(a: Any, b0: Any, b1: Any, c: Any):
    """As mma_bf16, of float16; a is four registers, c four accumulators."""
    return cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, "
        "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[*a, b0, b1, *c],
    )


@cute.jit
def load_16x16(address: Any):
    """mma's A, 16-bit rows in shared memory; lane l addresses 16 bytes of row l % 16, from k = 8 * (l // 16) on."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


@cute.jit
def pack_f16x2(low: Any, high: Any):
    """Two floats rounded to float16 in one word."""
    return cute.arch.inline_ptx(
        "cvt.rn.f16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high]
    )


@cute.jit
def e4m3_to_f16x2(word: Any):
    """Four E4M3 numbers as two registers of two float16, exactly, in order."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 t, u; mov.b32 {t, u}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, t; cvt.rn.f16x2.e4m3x2 {$w1}, u; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[word],
    )


@cute.jit
def transpose_8x8(x: Any):
    """A warp's 8 x 8 matrix of 16-bit values, two of a row in each lane, transposed."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[x]
    )


@cute.jit
def pick_bytes(low: Any, high: Any, selector: Any):
    """Four of the eight bytes of two words: nibble i of the selector names the one that becomes byte i."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[low, high, selector]
    )


@cute.jit
def exp2(x: Any):
    """2^x to 2 ulp; 0 for minus infinity."""
    return cute.arch.inline_ptx("ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def log2(x: Any):
    return cute.arch.inline_ptx("lg2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def reciprocal_approx(x: Any):
    """1 / x to 1 ulp."""
    return cute.arch.inline_ptx("rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def load_word(address: Any):
    """32 bits from shared memory at a byte address (int32)."""
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address])
