"""float32 operations that round by themselves, whatever stands around them: the compiler fuses none of them."""

from typing import Any

from cutlass import Float32, cute


@cute.jit
def add_exactly(a: Any, b: Any):
    return cute.arch.inline_ptx("add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def multiply_exactly(a: Any, b: Any):
    return cute.arch.inline_ptx("mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b])


@cute.jit
def multiply_add(a: Any, b: Any, c: Any):
    """a * b + c, rounded once."""
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )


@cute.jit
def multiply_add_saturated(a: Any, b: Any, c: Any):
    """a * b + c, rounded once and clamped to [0, 1]."""
    return cute.arch.inline_ptx(
        "fma.rn.sat.f32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Float32], read_only_args=[a, b, c]
    )


@cute.jit
def square_root(x: Any):
    return cute.arch.inline_ptx("sqrt.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
