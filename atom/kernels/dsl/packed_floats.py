"""Values of a model's dtype in 32-bit words (two of 16 bits, one of 32), to float32 and added, for CuTe DSL kernels."""

from typing import Any

from cutlass import Float32, cute

from .arithmetic import as_bits, from_bits
from .packed_bf16 import add_pairs, high_float, low_float
from .tensor_core import pack_f16x2


def unpack(words: Any, dtype: str) -> list[Any]:
    """Words -> the float32 values in them, in order."""
    found: list[Any] = []
    for i in range(len(words)):
        if dtype == "bfloat16":
            found += [low_float(words[i]), high_float(words[i])]
        elif dtype == "float16":
            found += list(widen_f16(words[i]))
        else:
            found.append(from_bits(words[i]))
    return found


def add(a: Any, b: Any, dtype: str) -> Any:
    """The sums of the values in two words, rounded to the dtype, as a word."""
    if dtype == "bfloat16":
        return add_pairs(a, b)
    if dtype == "float16":
        (a0, a1), (b0, b1) = widen_f16(a), widen_f16(b)
        return pack_f16x2(a0 + b0, a1 + b1)
    return as_bits(from_bits(a) + from_bits(b))


@cute.jit
def widen_f16(word: Any):
    """The two float16 of a word as float32."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }",
        write_only_types=[Float32, Float32],
        read_only_args=[word],
    )
