"""The exact keys and values of each sequence's newest tokens: memory, and what moves in it from step to step.

A scheme with `kv_recent` has queries read the newest tokens as they were before rounding. Every lane has a ring of rows
in every layer (atom/kernels/paged_step.py, RecentStep). Decodes write into their rings. What a step with prompts
computes goes to a scratch that all layers share, since a chunk's queries still read the ring; afterwards the ring takes
the chunk's last tokens. A sequence that begins behind cached blocks finds in its ring what the blocks say, rounded.

Where the tokens of a prompt are rows of a decode step (rows.py), a ring has no room for all that they read. They have
an area behind the rings, where each text lies in a line: what its ring has of it, then its new tokens. The former are
copied there before the step, the last of the latter to the ring behind it, in all layers at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atom.kernels.kv_layout import KVLayout
from atom.kernels.paged_step import Ints, PagedStep, RecentLayer, RecentStep, runs
from atom.models.config import ModelConfig

from .batch import Batch, Inherited, Int64

ROWS = 16  # of a ring: a multiple
READ_ELEMENTS = 1 << 23  # of blocks that are read at a time: 32 MB in float32


@dataclass(frozen=True)
class RecentRoom:
    """How much the exact tokens of an engine need.

    lanes        sequences at once
    step_tokens  of a step
    drafts       of a sequence in a step, at most: what was computed for wrong ones must not push out what is still read
    row_tokens   of prompts whose tokens are rows of a decode step
    """

    lanes: int
    step_tokens: int
    drafts: int = 0
    row_tokens: int = 0

    def capacity(self, recent: int) -> int:
        """Rows of a ring for a window of `recent` tokens."""
        return -(-(recent + self.drafts) // ROWS) * ROWS

    @property
    def area(self) -> int:
        """Rows for those tokens, and as many for what lies before them."""
        return 2 * self.row_tokens

    def num_bytes(self, config: ModelConfig, recent: int, dtype: torch.dtype) -> int:
        """What RecentTokens takes."""
        row = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize
        rows = (self.lanes + 1) * self.capacity(recent) + self.area
        return row * (config.num_layers * rows + self.step_tokens)


@dataclass(frozen=True)
class Moves:
    """Rows that are copied, int64 [n] each."""

    source: Tensor
    target: Tensor


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


class RecentTokens:
    """Rings of all lanes and layers, and one scratch. A lane beyond the last is there for rows that pad."""

    def __init__(
        self, config: ModelConfig, recent: int, room: RecentRoom, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.tokens, self.capacity, self.spare_lane = recent, room.capacity(recent), room.lanes
        shape = (2, config.num_kv_heads, config.head_dim)
        self.area, self.area_rows = (room.lanes + 1) * self.capacity, room.area
        rows = self.area + self.area_rows
        # zeros: a row that pads reads what was never written, and must not find NaN
        self.rings = torch.zeros(config.num_layers, rows, *shape, dtype=dtype, device=device)
        self.scratch = torch.zeros(room.step_tokens, *shape, dtype=dtype, device=device)
        self.scratch_rows = torch.arange(room.step_tokens, device=device)
        self._behind: Moves | None = None  # to be copied when the step under way has run

    @property
    def num_bytes(self) -> int:
        return self.rings.nbytes + self.scratch.nbytes

    def layer(self, index: int) -> RecentLayer:
        return RecentLayer(self.rings[index], self.scratch)

    def holds(self, batch: Batch) -> bool:
        """Whether the area has room for a step's texts, should their tokens be rows."""
        counts = np.diff(batch.cu_seqlens_q)
        before = np.minimum(self.tokens - 1, batch.seqlens_k - counts)
        return int((counts + before)[counts > 1].sum()) <= self.area_rows

    def step(self, batch: Batch, rings: Tensor | None, rows: Tensor | None, is_direct: bool) -> RecentStep:
        """What attention must know of a step.

        rings, rows  where RecentStep.rings and slots will lie on the device when the step runs; None: they are copied
        is_direct    see RecentStep
        """
        self._behind = None  # should the step before have failed
        rings_host = batch.lanes.astype(np.int64) * self.capacity
        if batch.ahead is not None:
            self._lay_lines(batch, rings_host)
        if not is_direct:
            rows = self.scratch_rows[: batch.num_tokens]
        elif rows is None:
            rows = self._bring(self.exact_slots(rings_host.repeat(np.diff(batch.cu_seqlens_q)), batch.positions))
        if rings is None:
            rings = self._bring(rings_host.astype(np.int32))
        return RecentStep(self.tokens, self.capacity, rings, rings_host, rows, is_direct)

    def exact_slots(self, rings: Ints, positions: Ints) -> Int64:
        """RecentStep.slots of tokens at `positions`, of which `rings` are RecentStep.rings."""
        in_line = ~rings + np.minimum(positions, self.tokens - 1)
        return np.where(rings >= 0, rings + positions % self.capacity, in_line)

    def _lay_lines(self, batch: Batch, rings: Int64) -> None:
        """Have `rings` of rows point into lines, where a text has several; copies there what these begin with."""
        assert batch.ahead is not None
        lanes, positions = batch.lanes, batch.positions.astype(np.int64)
        counts = np.bincount(lanes, minlength=self.spare_lane + 1)
        counts[self.spare_lane] = 0
        texts = np.flatnonzero(counts > 1)
        if not len(texts):
            return
        starts = np.zeros_like(counts)
        starts[lanes] = positions - batch.ahead
        starts, counts = starts[texts], counts[texts]
        before = np.minimum(self.tokens - 1, starts)
        first = self.area + np.cumsum(before + counts) - (before + counts)  # of each text's line
        assert first[-1] + before[-1] + counts[-1] <= self.area + self.area_rows, "the area has no room for a step"
        lines = np.zeros(self.spare_lane + 1, dtype=np.int64)  # of each lane, the row of position 0, were it there
        lines[texts] = first - (starts - before)
        rows = np.flatnonzero(np.isin(lanes, texts))
        rings[rows] = ~(lines[lanes[rows]] + np.maximum(0, positions[rows] - self.tokens + 1))
        self._copy(self._between(texts, starts - before, before, lines, is_back=False))
        kept = np.minimum(counts, self.capacity)
        self._behind = self._between(texts, starts + counts - kept, kept, lines, is_back=True)

    def _between(self, lanes: Int64, firsts: Int64, counts: Int64, lines: Int64, is_back: bool) -> Moves:
        """Of each lane the tokens firsts ... firsts + counts - 1 from its ring to its line, or back."""
        owners = np.repeat(lanes, counts)
        positions = runs(firsts, counts)
        ring, line = owners * self.capacity + positions % self.capacity, lines[owners] + positions
        source, target = (line, ring) if is_back else (ring, line)
        return Moves(self._bring(source), self._bring(target))

    def _bring(self, array: Ints) -> Tensor:
        """An array on the device; does not wait."""
        host = torch.from_numpy(array)
        host = host.pin_memory() if self.scratch.is_cuda and len(host) else host
        return host.to(self.scratch.device, non_blocking=True)

    def _copy(self, moves: Moves) -> None:
        """Among the rows of all layers."""
        if len(moves.source):
            self.rings[:, moves.target] = self.rings[:, moves.source]

    def finish(self) -> None:
        """Behind a step of rows: rings take the last tokens of the lines."""
        if self._behind is not None:
            self._copy(self._behind)
            self._behind = None

    def place(self, layer: int, step: RecentStep, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Where keys and values of a step's tokens, those that fill it up included, go: a store, and rows of it."""
        if step.is_direct:
            return self.rings[layer], step.slots
        return self.scratch, self.scratch_rows[:num_tokens]

    def move(self, layer: int, step: PagedStep, is_late: bool) -> None:
        """Copy the last tokens of sequences from the scratch to their rings.

        is_late  of chunks that go on with a text, whose queries read the ring as it was; else of all others
        """
        moves = step.derive(("recent", is_late), lambda: self._moves(step, is_late))
        if moves is not None:
            self.rings[layer].index_copy_(0, moves.target, self.scratch.index_select(0, moves.source))

    def _moves(self, step: PagedStep, is_late: bool) -> Moves | None:
        goes_on = (step.counts > 1) & (step.seqlens_k > step.counts)
        chosen = np.flatnonzero(goes_on if is_late else (step.counts > 0) & ~goes_on)
        if not len(chosen):
            return None
        assert step.recent is not None
        counts = np.minimum(step.counts[chosen], self.capacity).astype(np.int64)
        scratch = runs(step.cu_seqlens_q[1:][chosen] - counts, counts)
        positions = runs(step.seqlens_k[chosen] - counts, counts)
        rings = np.repeat(step.recent.rings_host[chosen], counts) + positions % self.capacity
        return Moves(self._bring(scratch), self._bring(rings))

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
        where, place, row = (self._bring(np.concatenate(x)) for x in (blocks, places, rows))
        for run in runs:
            layout = run.layout
            most = max(1, READ_ELEMENTS // (len(where) * size * layout.num_kv_heads * layout.head_dim))
            for start in range(0, run.count, most):
                layers = torch.arange(start, min(run.count, start + most), device=where.device)
                tiles = layout.gather(run.memory, layout.tile_rows(layers[:, None] * run.num_blocks + where))
                for part in (0, 1):  # of [num_kv_heads, layers, blocks, tile_bytes]
                    read = layout.read(tiles, part).flatten(2, 3)[:, :, place].permute(1, 2, 0, 3)
                    self.rings[run.first + layers[:, None], row, part] = read
