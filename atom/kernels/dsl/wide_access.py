"""Accesses of up to 16 bytes to global memory, as inline PTX, for CuTe DSL kernels. Addresses are int64."""

from typing import Any

import cutlass
from cutlass import Float32, Uint32, cute


@cute.jit
def load_streamed(address: Any):
    """Four 32-bit words, 16-byte aligned, that this SM reads once."""
    return cute.arch.inline_ptx(
        "ld.global.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


@cute.jit
def load_words(address: Any):
    """Four 32-bit words, 16-byte aligned, that this SM reads again."""
    return cute.arch.inline_ptx(
        "ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


@cute.jit
def load_floats(address: Any):
    """Four floats, 16-byte aligned, that this SM reads again."""
    return cute.arch.inline_ptx(
        "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )


@cute.jit
def prefetch_line(address: Any):
    """Ask for the line of 128 bytes at an address to be in L2; nothing waits for it."""
    cute.arch.inline_ptx("prefetch.global.L2 [{$r0}];", read_only_args=[address])


@cute.jit
def load_some(address: Any, count: cutlass.Constexpr):
    """One, two or four 32-bit words, aligned to their size together, that are read once."""
    vector = "" if count == 1 else f".v{count}"
    names = "{$w0}" if count == 1 else "{" + ", ".join(f"{{$w{i}}}" for i in range(count)) + "}"
    found = cute.arch.inline_ptx(
        f"ld.global.L1::no_allocate{vector}.b32 {names}, [{{$r0}}];",
        write_only_types=[Uint32] * count,
        read_only_args=[address],
    )
    return [found] if count == 1 else list(found)


@cute.jit
def store_words(address: Any, words: Any):
    """One, two or four 32-bit words, aligned to their size together."""
    if cutlass.const_expr(len(words) == 1):
        cute.arch.inline_ptx("st.global.b32 [{$r0}], {$r1};", read_only_args=[address, *words])
    elif cutlass.const_expr(len(words) == 2):
        cute.arch.inline_ptx("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, *words])
    else:
        cute.arch.inline_ptx(
            "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words]
        )


@cute.jit
def store_words_if(address: Any, words: Any, condition: Any):
    """Four 32-bit words, 16-byte aligned, where `condition` holds: without a branch."""
    cute.arch.inline_ptx(
        "st.global.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, *words],
        predicate=condition,
    )
