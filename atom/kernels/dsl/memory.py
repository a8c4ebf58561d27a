"""Memory instructions that CuTe DSL has no short form for, as inline PTX."""

from typing import Any

from cutlass import Float32, Int32, Uint32, cute


@cute.jit
def bulk_load(target: Any, source: Any, size: Any, barrier: Any):
    """Copy `size` bytes (a multiple of 16) from global to shared memory; `barrier` counts their arrival."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[target, source, size, barrier],
    )


@cute.jit
def load_u32x4(source: Any):
    """Four 32-bit words from 16-byte aligned shared memory."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[source],
    )


@cute.jit
def load_f32x4(source: Any):
    """Four floats from 16-byte aligned shared memory."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[source],
    )


@cute.jit
def load_f32x4_cluster(source: Any, rank: Any):
    """Four floats from the same place in the shared memory of CTA `rank` of the cluster."""
    address = cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Uint32],
        read_only_args=[source.toint(), Int32(rank)],
    )
    return cute.arch.inline_ptx(
        "ld.shared::cluster.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )
