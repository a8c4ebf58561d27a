"""Arithmetic on two bfloat16 in a word, each result rounded by itself: what torch computes, half the instructions.

A product of two bfloat16 is exact in float32, and 24 bits are enough that a sum rounded to float32 and then to bfloat16
equals the sum rounded once. `.rn` stands in every instruction, so that the compiler fuses no product with a sum.
"""

from typing import Any

from cutlass import Float32, Uint32, cute


@cute.jit
def add_pairs(a: Any, b: Any):
    return cute.arch.inline_ptx("add.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def subtract_pairs(a: Any, b: Any):
    return cute.arch.inline_ptx("sub.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def multiply_pairs(a: Any, b: Any):
    return cute.arch.inline_ptx("mul.rn.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def larger_pairs(a: Any, b: Any):
    return cute.arch.inline_ptx("max.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def smaller_pairs(a: Any, b: Any):
    return cute.arch.inline_ptx("min.bf16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[a, b])


@cute.jit
def low_float(word: Any):
    """The first of a word's two bfloat16, as float32."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; shl.b32 t, {$r0}, 16; mov.b32 {$w0}, t; }", write_only_types=[Float32], read_only_args=[word]
    )


@cute.jit
def high_float(word: Any):
    """The second of a word's two bfloat16, as float32."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; and.b32 t, {$r0}, 0xffff0000; mov.b32 {$w0}, t; }",
        write_only_types=[Float32],
        read_only_args=[word],
    )
