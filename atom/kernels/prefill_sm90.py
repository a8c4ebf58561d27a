"""Attention of a step's prefill chunks on Hopper: blocks to dense keys and values, then torch's flash attention.

One launch of the gather kernel reads the blocks of all sequences with several queries, this step's tokens included,
since attention is over rounded keys; one launch of torch's ragged flash attention follows. Query heads share keys as
they lie, and a sliding window reads no block that its queries do not see.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention_config import GatherConfig
from .cache import load_kernel
from .dense_attention import AttentionSpec, attend_dense
from .kv_layout import KVLayout
from .paged_attention import RopeTable
from .paged_step import Ints, PagedStep
from .rotate import rotate

ARCH = "sm_90a"
HERE = Path(__file__).parent
SOURCES = tuple(
    HERE / file
    for file in (
        "kv_gather_sm90.py", "decode_codes_sm90.py", "attention_config.py", "dsl/arithmetic.py", "dsl/memory.py",
        "dsl/packed_bf16.py", "dsl/tensor_core.py", "dsl/wide_access.py",
    )
)  # fmt: skip


@dataclass(frozen=True)
class GatherWork:
    """What the gather kernel reads for a step's prefill chunks, in the order of sequences.

    tiles          int32 [N, 4]      block, dense row of its first token read, first token, end token
    sequences      int [C]           of the step, that prefill
    firsts         int [C]           the first key that the first query of each sees
    cu_seqlens_k   int32 [C + 1]     dense rows of each: from that key on
    """

    tiles: Ints
    sequences: Ints
    firsts: Ints
    cu_seqlens_k: Ints


def gather_work(step: PagedStep, window: int | None, block_size: int) -> GatherWork:
    """Blocks of the sequences with several queries."""
    sequences = np.flatnonzero(step.counts > 1)
    ends = step.seqlens_k[sequences].astype(np.int64)
    firsts = np.zeros_like(ends)
    if window is not None:
        firsts = np.maximum(0, ends - step.counts[sequences] - window + 1)
    starts = np.concatenate(([0], np.cumsum(ends - firsts)))  # dense rows
    opening = firsts // block_size
    blocks = -(-ends // block_size) - opening
    owner = np.repeat(np.arange(len(sequences)), blocks)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(blocks) - blocks, blocks) + opening[owner]  # of the block
    first = np.maximum(firsts[owner] - index * block_size, 0)
    tiles = np.empty((len(owner), 4), dtype=np.int32)
    tiles[:, 0] = step.tables[sequences[owner], index]
    tiles[:, 1] = starts[owner] + index * block_size + first - firsts[owner]
    tiles[:, 2] = first
    tiles[:, 3] = np.minimum(ends[owner] - index * block_size, block_size)
    return GatherWork(tiles, sequences, firsts, starts.astype(np.int32))


@dataclass(frozen=True)
class Chunks:
    """The prefill chunks of a step, for layers of one window.

    tokens         the step's tokens that are theirs: a range, or indices where others stand between them
    is_all         no other tokens are in the step
    tiles          int32 [N, 4] on the device: GatherWork.tiles
    cu_seqlens_q   int32 [C + 1], on the host and on the device; likewise cu_seqlens_k, dense rows
    firsts         int [C], positions of the first dense rows
    """

    tokens: slice | Tensor
    is_all: bool
    tiles: Tensor
    cu_seqlens_q: Ints
    cu_seqlens_k: Ints
    device_q: Tensor
    device_k: Tensor
    firsts: Ints

    @property
    def num_keys(self) -> int:
        return int(self.cu_seqlens_k[-1])

    def positions(self) -> Ints:
        """Of the dense rows."""
        starts = np.repeat(self.firsts - self.cu_seqlens_k[:-1], np.diff(self.cu_seqlens_k))
        found: Ints = starts + np.arange(self.num_keys)
        return found


class Prefill:
    """Prefill attention over caches of one layout."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        kv = "bf16" if layout.spec is None else layout.spec.format
        self.config = GatherConfig(kv, layout.head_dim, layout.block_size)
        self.kernel: Any = None

    def chunks(self, step: PagedStep, window: int | None) -> Chunks | None:
        """The step's chunks on the device, made once for each window; None if no sequence prefills."""
        return step.derive(("chunks", window), lambda: self._chunks(step, window))

    def _chunks(self, step: PagedStep, window: int | None) -> Chunks | None:
        work = gather_work(step, window, self.layout.block_size)
        if not len(work.sequences):
            return None
        device, counts = step.slots.device, step.counts[work.sequences]
        cu_seqlens_q = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        starts, ends = step.cu_seqlens_q[work.sequences], step.cu_seqlens_q[work.sequences + 1]
        tokens: slice | Tensor = slice(int(starts[0]), int(ends[-1]))
        if ends[-1] - starts[0] != cu_seqlens_q[-1]:
            index = np.repeat(starts - cu_seqlens_q[:-1], counts) + np.arange(cu_seqlens_q[-1])
            tokens = torch.from_numpy(index.astype(np.int64)).to(device)
        joined = np.concatenate((work.tiles.ravel(), cu_seqlens_q, work.cu_seqlens_k))
        parts = torch.from_numpy(joined).to(device).split([work.tiles.size, len(cu_seqlens_q), len(work.cu_seqlens_k)])
        return Chunks(
            tokens,
            int(cu_seqlens_q[-1]) == step.num_tokens,
            parts[0].view(-1, 4),
            cu_seqlens_q,
            work.cu_seqlens_k,
            parts[1].contiguous(),
            parts[2].contiguous(),
            work.firsts,
        )

    def __call__(
        self, q: Tensor, layer: Tensor, chunks: Chunks, spec: AttentionSpec, table: RopeTable | None = None
    ) -> Tensor:
        """Attention of the chunks' queries [num_heads, head_dim] each, in the order of `chunks.tokens`."""
        keys, values = self.gather(layer, chunks)
        if spec.key_offset is not None:
            assert table is not None, "offsets that are turned on reading need a table"
            positions = torch.from_numpy(chunks.positions()).to(q.device)
            offset = spec.key_offset.to(keys.dtype).expand(keys.shape)
            keys = keys + rotate(offset, table.cos[positions], table.sin[positions])
        return attend_ragged(q[chunks.tokens], keys, values, chunks, spec)

    def gather(self, layer: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunks, bfloat16 [num_keys, num_kv_heads, head_dim] each."""
        if self.kernel is None:
            self.kernel = gather_kernel(self.config)
        shape = (2, chunks.num_keys, self.layout.num_kv_heads, self.layout.head_dim)
        both = torch.empty(shape, dtype=torch.bfloat16, device=layer.device)
        words = both.view(torch.int32).view(torch.uint32)
        self.kernel(layer, chunks.tiles, words[0], words[1])
        return both[0], both[1]


def attend_ragged(q: Tensor, keys: Tensor, values: Tensor, chunks: Chunks, spec: AttentionSpec) -> Tensor:
    """Causal attention of each chunk over its own keys, whose last one belongs to its last query.

    q             bfloat16 [T, num_heads, head_dim]
    keys, values  bfloat16 [num_keys, num_kv_heads, head_dim]
    Capped scores, which torch's kernels do not know, are computed sequence by sequence; so is everything on a CPU.
    """
    if spec.soft_cap is not None or q.device.type != "cuda":
        out = torch.empty_like(q)
        for start, end, first, last in zip(
            chunks.cu_seqlens_q[:-1], chunks.cu_seqlens_q[1:], chunks.cu_seqlens_k[:-1], chunks.cu_seqlens_k[1:],
            strict=True,
        ):  # fmt: skip
            seen = slice(first, last)
            own, k, v = (x.transpose(0, 1)[None] for x in (q[start:end], keys[seen], values[seen]))
            out[start:end] = attend_dense(own, k, v, spec)[0].transpose(0, 1)
        return out
    window = {} if spec.window is None else {"window_size_left": spec.window - 1, "window_size_right": 0}
    found: Tensor = torch.ops.aten._flash_attention_forward(
        q, keys, values, chunks.device_q, chunks.device_k, int(np.diff(chunks.cu_seqlens_q).max()),
        int(np.diff(chunks.cu_seqlens_k).max()), 0.0, True, False, scale=spec.scale, **window,
    )[0]  # fmt: skip
    return found


def gather_kernel(config: GatherConfig) -> Any:
    """The compiled kernel of a config, from memory, disk or compiled now."""

    def compile() -> Any:
        from .kv_gather_sm90 import compile_gather

        return compile_gather(config)

    return load_kernel("kv_gather_sm90", config, SOURCES, compile, ARCH)
