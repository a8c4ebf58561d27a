"""Memory instructions that CuTe DSL has no short form for, as inline PTX."""

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32, cute

EVICT_FIRST = 0x12F0000000000000  # the L2 policy that createpolicy.fractional.L2::evict_first makes for all of a copy


@cute.jit
def bulk_load(target: Any, source: Any, size: Any, barrier: Any):
    """Copy `size` bytes (a multiple of 16) from global to shared memory; `barrier` counts their arrival."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
        read_only_args=[target, source, size, barrier],
    )


@cute.jit
def bulk_stream(target: Any, source: Any, size: Any, barrier: Any):
    """bulk_load of what is read once: it leaves L2 before what other kernels or CTAs read again."""
    cute.arch.inline_ptx(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[{$r0}], [{$r1}], {$r2}, [{$r3}], {$r4};",
        read_only_args=[target, source, size, barrier, Int64(EVICT_FIRST)],
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
def load_u32x2(source: Any):
    """Two 32-bit words from 8-byte aligned shared memory."""
    return cute.arch.inline_ptx(
        "ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[source]
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
def store_f32x4(target: Any, a: Any, b: Any, c: Any, d: Any):
    """Four floats to 16-byte aligned shared memory."""
    cute.arch.inline_ptx("st.shared.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[target, a, b, c, d])


@cute.jit
def store_f32x2(target: Any, a: Any, b: Any):
    """Two floats to 8-byte aligned shared memory."""
    cute.arch.inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[target, a, b])


@cute.jit
def load_global_f32(source: Any):
    """A float from global memory, past L1: what another SM has just written."""
    return cute.arch.inline_ptx("ld.global.cg.f32 {$w0}, [{$r0}];", write_only_types=[Float32], read_only_args=[source])


@cute.jit
def load_global_f32x4(source: Any):
    """Four floats from 16-byte aligned global memory, past L1: what another SM has just written."""
    return cute.arch.inline_ptx(
        "ld.global.cg.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[source],
    )


@cute.jit
def atomic_increment(counter: Any):
    """Add 1 to an int32 in global memory, ordered for the GPU; returns what stood there."""
    return cute.arch.inline_ptx(
        "atom.add.acq_rel.gpu.global.s32 {$w0}, [{$r0}], 1;", write_only_types=[Int32], read_only_args=[counter]
    )


@cute.jit
def increment_release(counter: Any):
    """Add 1 to an int32 in global memory, after all that this thread knows to be written, for the whole GPU."""
    cute.arch.inline_ptx("red.release.gpu.global.add.s32 [{$r0}], 1;", read_only_args=[counter])


@cute.jit
def load_acquire(counter: Any):
    """An int32 in global memory that other SMs change; what they wrote before is seen after it."""
    return cute.arch.inline_ptx(
        "ld.acquire.gpu.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[counter]
    )


@cute.jit
def load_relaxed(counter: Any):
    """An int32 in global memory that other SMs change."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[counter]
    )


@cute.jit
def pack_bf16x2(low: Any, high: Any):
    """Two floats rounded to bfloat16 in one word."""
    return cute.arch.inline_ptx(
        "cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};", write_only_types=[Uint32], read_only_args=[low, high]
    )


@cute.jit
def store_matrix_transposed(target: Any, a: Any, b: Any, c: Any, d: Any):
    """stmatrix.x4.trans: four 8 x 8 tiles of 16-bit values; lane l addresses row l % 8 of tile l // 8."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[target.toint(), a, b, c, d],
    )


@cute.jit
def count_in_shared(counter: Any):
    """Add 1 to an int32 in shared memory."""
    cute.arch.inline_ptx("red.shared.add.s32 [{$r0}], 1;", read_only_args=[counter])


@cute.jit
def load_shared_16(address: Any, offset: Any, dtype: Any):
    """A bfloat16 or float16 from shared memory, `offset` bytes (a constant) behind an address, as float32."""
    widen = "mov.b32 {$w0}, {z, h};" if dtype == "bfloat16" else "cvt.f32.f16 {$w0}, h;"
    return cute.arch.inline_ptx(
        "{ .reg .b16 h, z; mov.b16 z, 0; ld.shared.b16 h, [{$r0}+" + str(offset) + "]; " + widen + " }",
        write_only_types=[Float32],
        read_only_args=[address],
    )


@cute.jit
def load_shared_f32(address: Any, offset: Any):
    """A float32 from shared memory, `offset` bytes (a constant) behind an address."""
    return cute.arch.inline_ptx(
        "ld.shared.f32 {$w0}, [{$r0}+" + str(offset) + "];", write_only_types=[Float32], read_only_args=[address]
    )


@cute.jit
def load_shared_f32x2(address: Any, offset: Any):
    """Two floats at an 8-byte aligned shared address and a constant offset in bytes, which costs no instruction."""
    return cute.arch.inline_ptx(
        "ld.shared.v2.f32 {{$w0}, {$w1}}, [{$r0}+" + str(offset) + "];",
        write_only_types=[Float32] * 2,
        read_only_args=[address],
    )


@cute.jit
def store_shared_u32x4(address: Any, words: Any):
    """Four 32-bit words into 16-byte aligned shared memory."""
    cute.arch.inline_ptx("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])


@cute.jit
def peer_address(address: Any, rank: Any):
    """Where this CTA's shared memory address lies in CTA `rank` of the cluster."""
    return cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[address, rank]
    )


@cute.jit
def raise_at_peer(address: Any, barrier: Any, value: Any):
    """A float32 that is not negative to a peer's address, where the largest of all stays; counted as send_to_peer's."""
    cute.arch.inline_ptx(
        "{ .reg .b32 t; mov.b32 t, {$r2};"
        " red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.max.u32 [{$r0}], t, [{$r1}]; }",
        read_only_args=[address, barrier, value],
    )


@cute.jit
def send_to_peer(address: Any, barrier: Any, value: Any):
    """A float32 to a peer's address; the barrier at the other, of the same peer, counts it."""
    cute.arch.inline_ptx(
        "{ .reg .b32 t; mov.b32 t, {$r2};"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [{$r0}], t, [{$r1}]; }",
        read_only_args=[address, barrier, value],
    )
