"""The exact keys and values of each sequence's newest tokens: memory, and what moves in it from step to step.

A scheme with `kv_recent` has queries read the newest tokens as they were before rounding. Every lane has a ring of rows
in every layer (atom/kernels/paged_step.py, RecentStep). Decodes write into their rings. What a step with prompts
computes goes to a scratch that all layers share, since a chunk's queries still read the ring; afterwards the ring takes
the chunk's last tokens. A sequence that begins behind cached blocks finds in its ring what the blocks say, rounded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_step import PagedStep, RecentLayer, RecentStep
from atom.models.config import ModelConfig

from .batch import Batch, Inherited

ROWS = 16  # of a ring: a multiple
READ_ELEMENTS = 1 << 23  # of blocks that are read at a time: 32 MB in float32


@dataclass(frozen=True)
class RecentRoom:
    """How much the exact tokens of an engine need.

    lanes        sequences at once
    step_tokens  of a step
    drafts       of a sequence in a step, at most: what was computed for wrong ones must not push out what is still read
    """

    lanes: int
    step_tokens: int
    drafts: int = 0

    def capacity(self, recent: int) -> int:
        """Rows of a ring for a window of `recent` tokens."""
        return -(-(recent + self.drafts) // ROWS) * ROWS

    def num_bytes(self, config: ModelConfig, recent: int, dtype: torch.dtype) -> int:
        """What RecentTokens takes."""
        row = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
        return row * (config.num_layers * (self.lanes + 1) * self.capacity(recent) + self.step_tokens)


@dataclass(frozen=True)
class Moves:
    """Rows that are copied from the scratch to the rings, int64 [n] each."""

    scratch: Tensor
    rings: Tensor


@dataclass(frozen=True)
class LayerRun:
    """Neighbouring layers of one layout, whose blocks lie one behind the other in one memory.

    memory  uint8, layout.shape(count * num_blocks)
    """

    layout: KVLayout
    first: int
    count: int
    num_blocks: int
    memory: Tensor


class RingPlaces:
    """Where a decode step's exact tokens go, in buffers that keep their place: see RecentStep's rings and slots."""

    def __init__(self, most: int, capacity: int, device: torch.device) -> None:
        self._capacity = capacity
        self._rings = torch.zeros(most, dtype=torch.int32, device=device)
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)

    def fill(self, lanes: Tensor, positions: Tensor) -> None:
        """Of tokens at `positions` int64 [B] of sequences with these lanes int64 [B]."""
        first = lanes * self._capacity
        self._rings[: len(lanes)] = first
        torch.add(first, positions % self._capacity, out=self._rows[: len(lanes)])

    def __call__(self, size: int) -> tuple[Tensor, Tensor]:
        """The rings int32 [size] and the rows int64 [size]."""
        return self._rings[:size], self._rows[:size]


class RecentTokens:
    """Rings of all lanes and layers, and one scratch. A lane beyond the last is there for rows that pad."""

    def __init__(
        self, config: ModelConfig, recent: int, room: RecentRoom, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.tokens, self.capacity, self.spare_lane = recent, room.capacity(recent), room.lanes
        shape = (2, config.num_kv_heads, config.head_dim)
        rows = (room.lanes + 1) * self.capacity
        # zeros: a row that pads reads what was never written, and must not find NaN
        self.rings = torch.zeros(config.num_layers, rows, *shape, dtype=dtype, device=device)
        self.scratch = torch.zeros(room.step_tokens, *shape, dtype=dtype, device=device)
        self.scratch_rows = torch.arange(room.step_tokens, device=device)

    @property
    def num_bytes(self) -> int:
        return self.rings.nbytes + self.scratch.nbytes

    def layer(self, index: int) -> RecentLayer:
        return RecentLayer(self.rings[index], self.scratch)

    def holds(self, batch: Batch) -> bool:
        """Whether the rings can take all tokens of a step before any of them attends, and still have what they read."""
        counts = np.diff(batch.cu_seqlens_q)
        oldest = np.maximum(0, batch.seqlens_k - counts - self.tokens + 1)
        return bool((batch.seqlens_k - oldest <= self.capacity).all())

    def step(self, batch: Batch, rings: Tensor | None, rows: Tensor | None, is_direct: bool) -> RecentStep:
        """What attention must know of a step.

        rings, rows  RecentStep.rings and its slots where they lie on the device already; None: they are copied
        is_direct    see RecentStep
        """
        device = self.scratch.device
        rings_host = batch.lanes.astype(np.int64) * self.capacity
        if not is_direct:
            rows = self.scratch_rows[: batch.num_tokens]
        elif rows is None:
            owner = rings_host.repeat(np.diff(batch.cu_seqlens_q))
            rows = torch.from_numpy(owner + batch.positions % self.capacity).to(device, non_blocking=True)
        if rings is None:
            rings = torch.from_numpy(rings_host.astype(np.int32)).to(device, non_blocking=True)
        return RecentStep(self.tokens, self.capacity, rings, rings_host, rows, is_direct)

    def place(self, layer: int, step: RecentStep, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Where keys and values of a step's tokens, those that fill it up included, go: a store, and rows of it."""
        if step.is_direct:
            return self.rings[layer], step.slots
        return self.scratch, self.scratch_rows[:num_tokens]

    def move(self, layer: int, step: PagedStep, is_chunk: bool) -> None:
        """Copy from the scratch to the rings: of sequences with one query, or of chunks their last tokens."""
        moves = step.derive(("recent", is_chunk), lambda: self._moves(step, is_chunk))
        if moves is not None:
            self.rings[layer, moves.rings] = self.scratch[moves.scratch]

    def _moves(self, step: PagedStep, is_chunk: bool) -> Moves | None:
        chosen = np.flatnonzero(step.counts > 1 if is_chunk else step.counts == 1)
        if not len(chosen):
            return None
        assert step.recent is not None
        counts = np.minimum(step.counts[chosen], self.capacity).astype(np.int64)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)  # from the first kept on
        back = np.repeat(counts, counts) - within  # from a sequence's end
        scratch = np.repeat(step.cu_seqlens_q[1:][chosen].astype(np.int64), counts) - back
        positions = np.repeat(step.seqlens_k[chosen].astype(np.int64), counts) - back
        rings = np.repeat(step.recent.rings_host[chosen], counts) + positions % self.capacity
        device = self.scratch.device
        return Moves(*(torch.from_numpy(x).to(device, non_blocking=True) for x in (scratch, rings)))

    def inherit(self, inherited: Inherited, runs: list[LayerRun]) -> None:
        """Fill rings of sequences that begin behind blocks which others computed, with what the blocks say."""
        size = runs[0].layout.block_size
        blocks, places, rows = (list[np.ndarray]() for _ in range(3))
        for lane, start, table in zip(inherited.lanes, inherited.starts, inherited.block_tables, strict=True):
            positions = np.arange(max(0, int(start) - self.tokens + 1), int(start))
            first = int(positions[0]) // size
            places.append(positions + (sum(len(each) for each in blocks) - first) * size)
            blocks.append(table[first : (int(start) - 1) // size + 1].astype(np.int64))
            rows.append(int(lane) * self.capacity + positions % self.capacity)
        where, place, row = (
            torch.from_numpy(np.concatenate(x)).to(self.scratch.device) for x in (blocks, places, rows)
        )
        for run in runs:
            layout = run.layout
            most = max(1, READ_ELEMENTS // (len(where) * size * layout.num_kv_heads * layout.head_dim))
            for start in range(0, run.count, most):
                layers = torch.arange(start, min(run.count, start + most), device=where.device)
                tiles = layout.gather(run.memory, layout.tile_rows(layers[:, None] * run.num_blocks + where))
                for part in (0, 1):  # of [num_kv_heads, layers, blocks, tile_bytes]
                    read = layout.read(tiles, part).flatten(2, 3)[:, :, place].permute(1, 2, 0, 3)
                    self.rings[run.first + layers[:, None], row, part] = read
