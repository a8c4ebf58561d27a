"""What the kernels of decodes and of shared prefixes have alike (sm_90a): launch, shared memory, how warps begin."""

from typing import Any

from cutlass import Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute.runtime import make_fake_stream

from .attention_config import DecodeConfig
from .decode_stage_sm90 import LOG2_E
from .dsl.arguments import row_major


class DecodeFrame:
    """What a kernel class mixes in."""

    config: DecodeConfig

    def launch_options(self, mWork, stream) -> dict[str, Any]:
        """A CTA for each entry of the plan's work but the last, which is the end of the one before."""
        return {
            "grid": (mWork.shape[0] - 1, 1, 1),
            "block": (self.config.threads, 1, 1),
            "stream": stream,
            "min_blocks_per_mp": self.config.ctas_per_sm,
            "preferred_smem_carveout": 100,  # given, so that compiling asks no driver for the device
            "use_pdl": True,
        }

    def allocate_ring(self, smem):
        """(full, empty, ready, taken, ring, queries): barriers and place of stages and of two segments' queries."""
        config = self.config
        full = smem.allocate_array(Int64, config.stages)
        empty = smem.allocate_array(Int64, config.stages)
        ready = smem.allocate_array(Int64, 2)  # of a segment's queries
        taken = smem.allocate_array(Int64, 2)
        ring = smem.allocate(config.stages * config.stage_bytes, 128)
        queries = smem.allocate(2 * config.query_bytes, 128)
        return full, empty, ready, taken, ring, queries

    @cute.jit
    def work_to_fetch(self, mWork, cta, is_early, warp):
        """For the fetching warp: its CTA's first segment and the end; all warps leave together."""
        first = Int32(0)
        last = Int32(0)
        if warp == self.config.warps:
            if is_early == 0:
                cute.arch.griddepcontrol_wait()
            first = mWork[cta]
            last = mWork[cta + 1]
        cute.arch.sync_threads()
        return first, last

    @cute.jit
    def work_to_compute(self, mWork, cta, is_early):
        """For the other warps: the same, and all kernels before have ended."""
        if is_early == 0:
            cute.arch.griddepcontrol_wait()
        first = mWork[cta]
        last = mWork[cta + 1]
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()  # after the wait: the next kernel may rely on it, as this one
        return first, last

    def registers(self):
        """(rQ, rSum, rM, rL, rZ, rO) of a segment: its queries, and what a computing warp finds of their outputs."""
        config = self.config
        columns = config.column_tiles
        pairs = config.key_words * config.codes_per_word // 2
        rQ = cute.make_rmem_tensor((pairs, columns), Uint32)
        rSum = cute.make_rmem_tensor((2, columns), Float32)  # of the channels of this lane's two query heads
        rM = cute.make_rmem_tensor((2, columns), Float32)
        rL = cute.make_rmem_tensor((2, columns), Float32)
        rZ = cute.make_rmem_tensor((2, columns), Float32)  # what zero points add to the outputs
        rO = cute.make_rmem_tensor((4, config.channel_tiles, columns), Float32)
        return rQ, rSum, rM, rL, rZ, rO

    def score_unit(self, unit, scale):
        """What one unit of a product is worth in scores, which are in units of log2 where no cap follows."""
        unit = unit * scale
        if not self.config.has_cap:
            unit = unit * Float32(LOG2_E)
        return unit

    @cute.jit
    def advance(self, slot, phase):
        """The ring's next stage, and the phase of its barriers."""
        slot += 1
        if slot == self.config.stages:
            slot = Int32(0)
            phase = phase ^ 1
        return slot, phase

    @cute.jit
    def advance_own(self, slot, phase):
        """The same for a warp that takes every `warps`-th stage."""
        slot += self.config.warps
        if slot >= self.config.stages:
            slot -= self.config.stages
            phase = phase ^ 1
        return slot, phase


def ring_arguments(config: DecodeConfig) -> tuple[Any, Any, Any]:
    """While a kernel is compiled: its queries, the cache and the tables."""
    tokens, heads, blocks, kv_heads, seqs, widest = (cute.sym_int() for _ in range(6))
    return (
        row_major(Uint32, (tokens, heads, config.head_dim // 2), 16),
        row_major(Uint8, (blocks, kv_heads, config.tile_bytes), 128),
        row_major(Int32, (seqs, widest), 4),
    )


def part_arguments(config: DecodeConfig) -> tuple[Any, Any]:
    """Partial results and their logarithms."""
    queries = config.own_queries
    return (
        row_major(Float32, (cute.sym_int(), queries, config.head_dim), 16),
        row_major(Float32, (cute.sym_int(), queries), 4),
    )


def compile_frame(kernel: Any, arguments: tuple[Any, ...], options: str) -> object:
    """Compile a kernel for sm_90a, on the current stream; needs no GPU."""
    return cute.compile(
        kernel,
        *arguments,
        make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch sm_90a {options}",
    )
