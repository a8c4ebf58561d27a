"""Exactly rounded arithmetic and warp reductions for CuTe DSL kernels."""

from typing import Any

from cutlass import Float32, Uint32, cute


@cute.jit
def reciprocal(x: Any):
    """1 / x, correctly rounded, as torch.reciprocal."""
    return cute.arch.inline_ptx("rcp.rn.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])


@cute.jit
def round_to_int(x: Any):
    """The nearest integer, ties to even, as the bits of an int32."""
    return cute.arch.inline_ptx("cvt.rni.s32.f32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[x])


@cute.jit
def warp_max(x: Any):
    """The largest value of a warp, in every lane."""
    for offset in (16, 8, 4, 2, 1):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
    return x


@cute.jit
def warp_sum(x: Any):
    """The sum over a warp in a fixed order, in every lane."""
    for offset in (16, 8, 4, 2, 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=offset)
    return x
