"""Which CTA reads which part of which sequence: the plan of a decode step's attention, made on the host.

A *row* is one sequence and KV head, a *segment* the part of a row that one CTA reads, in blocks. A row of one segment
is finished where it is computed; the segments of others leave partial results that a second kernel merges, in order.

balanced  the blocks of all rows in a line, cut into as many equal parts as there are CTAs: every SM works to the end
          whatever the lengths are. A sequence's cuts, and with them its last bits, depend on the batch.
fixed     every row is cut every `split_blocks` blocks, so a sequence's result depends on nothing but itself; whole
          segments are then dealt to the CTAs in a line.

The arrays have sizes that follow from the batch's size alone, so that a CUDA graph can be replayed with new contents.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .paged_step import Ints

Int32 = NDArray[np.int32]
SEGMENT_OVERHEAD = 3  # blocks that could be read while a CTA begins and ends a segment; a guess until it is profiled
SEGMENT_FIELDS = 8  # a segment's row: sequence, KV head, first block, end block, slot (or -1), and filling to 32 bytes


@dataclass(frozen=True)
class AttentionPlan:
    """Work of one launch.

    work      int32 [CTAs + 1]      segments of CTA i are work[i] ... work[i + 1] - 1
    segments  int32 [S, 8]          sequence, KV head, first block, end block, slot of the partial result or -1, 0, 0, 0
    merges    int32 [M, 4]          sequence, KV head, first slot and number of partial results of rows in several parts
    """

    work: Int32
    segments: Int32
    merges: Int32

    @property
    def num_slots(self) -> int:
        """Partial results."""
        return int(self.merges[:, 3].sum())


def most_segments(num_seqs: int, num_kv_heads: int, ctas: int) -> int:
    """Segments, and partial results, that a balanced plan can have at most."""
    return num_seqs * num_kv_heads + ctas - 1


def most_merges(num_seqs: int, num_kv_heads: int, ctas: int) -> int:
    """Rows that a balanced plan can have in several parts at most: each has a cut of its own."""
    return min(num_seqs * num_kv_heads, ctas - 1)


def block_ranges(seqlens_k: Ints, block_size: int, window: int | None) -> tuple[Ints, Ints]:
    """First block that the last token of each sequence sees, and the end; both 0 where the length is 0."""
    lengths = seqlens_k.astype(np.int64)
    ends = -(-lengths // block_size)
    firsts = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0) // block_size
    return np.minimum(firsts, ends), ends


def plan_balanced(
    seqlens_k: Ints, block_size: int, num_kv_heads: int, ctas: int, window: int | None = None, grain: int = 1
) -> AttentionPlan:
    """The plan of least time for these lengths.

    seqlens_k  [B] tokens to attend over; 0 for a lane that is not used
    ctas       that the GPU holds at once
    grain      blocks that a CTA takes at a time: cuts are multiples of it
    """
    firsts, ends = block_ranges(seqlens_k, block_size, window)
    counts = np.repeat(ends - firsts, num_kv_heads)  # [rows]
    active = counts > 0
    ticks = np.zeros(len(counts) + 1, dtype=np.int64)  # of rows in the line of all costs
    np.cumsum(counts + SEGMENT_OVERHEAD * active, out=ticks[1:])
    blocks = int(ticks[-1]) - SEGMENT_OVERHEAD * int(active.sum())
    used = max(1, min(ctas, blocks // (2 * grain)))  # a CTA is not worth starting for less
    targets = np.arange(1, used) * ticks[-1] // used
    rows = np.searchsorted(ticks, targets, side="right") - 1  # of each cut
    cuts = np.maximum(targets - ticks[rows] - SEGMENT_OVERHEAD + grain // 2, 0) // grain * grain  # within its row
    cuts = np.minimum(cuts, counts[rows])
    inner = (cuts > 0) & (cuts < counts[rows])
    inner[1:] &= (rows[1:] != rows[:-1]) | (cuts[1:] != cuts[:-1])  # two targets may round to one cut
    parts = np.bincount(rows[inner], minlength=len(counts)) + active
    ends_at = np.cumsum(parts)
    begins = np.zeros(int(ends_at[-1]), dtype=np.int32)
    at = (np.cumsum(active) - 1)[rows[inner]] + 1 + np.arange(int(inner.sum()))
    begins[at] = cuts[inner]
    stops = np.empty_like(begins)
    stops[:-1] = begins[1:]
    stops[ends_at[active] - 1] = counts[active]
    work = np.zeros(ctas + 1, dtype=np.int64)
    opens = (ends_at - parts)[rows]  # the row's first segment
    work[1:used] = np.where(cuts == 0, opens, np.where(cuts == counts[rows], ends_at[rows], 0))
    work[1:used][inner] = at
    work[used:] = len(begins)
    np.maximum.accumulate(work, out=work)  # a CTA whose cut was another's has no segment
    return _assemble(work, parts, begins, stops, firsts, num_kv_heads)


def plan_fixed(
    seqlens_k: Ints, block_size: int, num_kv_heads: int, ctas: int, split_blocks: int, window: int | None = None
) -> AttentionPlan:
    """The plan whose cuts follow from each sequence's own length: results that do not depend on the batch."""
    firsts, ends = block_ranges(seqlens_k, block_size, window)
    counts = np.repeat(ends - firsts, num_kv_heads)
    parts = -(-counts // split_blocks)
    last = np.cumsum(parts)
    begins = ((np.arange(int(last[-1])) - np.repeat(last - parts, parts)) * split_blocks).astype(np.int32)
    stops = np.minimum(begins + split_blocks, np.repeat(counts, parts)).astype(np.int32)
    costs = stops - begins + SEGMENT_OVERHEAD
    ticks = np.cumsum(costs)
    owner = (ticks - costs // 2) * ctas // (int(ticks[-1]) if len(ticks) else 1)
    work = np.searchsorted(owner, np.arange(ctas + 1), side="left")
    return _assemble(work, parts, begins, stops, firsts, num_kv_heads)


def _assemble(
    work: NDArray[Any], parts: NDArray[Any], begins: NDArray[Any], stops: NDArray[Any], firsts: Ints, heads: int
) -> AttentionPlan:
    """Segments in the order of rows, `parts` of each; those of a row with several get neighbouring slots."""
    blank = _rows(len(firsts), heads).copy()
    blank[:, 2] = np.repeat(firsts, heads)
    blank[:, 3] = blank[:, 2]
    segments = np.repeat(blank, parts, axis=0)
    segments[:, 2] += begins
    segments[:, 3] += stops
    is_split = parts > 1
    several = np.flatnonzero(np.repeat(is_split, parts))
    segments[several, 4] = np.arange(len(several))
    split = np.flatnonzero(is_split)
    merges = np.zeros((len(split), 4), dtype=np.int32)
    merges[:, :2] = blank[split, :2]
    merges[:, 3] = parts[split]
    np.cumsum(merges[:-1, 3], out=merges[1:, 2])
    return AttentionPlan(work.astype(np.int32), segments, merges)


@lru_cache
def _rows(seqs: int, heads: int) -> Int32:
    """Segments [seqs * heads, 8] of no blocks and no slot, one a row."""
    rows = np.zeros((seqs * heads, SEGMENT_FIELDS), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(seqs), heads)
    rows[:, 1] = np.tile(np.arange(heads), seqs)
    rows[:, 4] = -1
    return rows
