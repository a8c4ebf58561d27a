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
MOST_PARTS = (
    8  # of a short row: more CTAs read it sooner, until merging costs more (H200, decode steps of 1 to 4 x 512)
)
SEGMENT_FIELDS = 8  # of a segment, 32 bytes: see AttentionPlan


@dataclass(frozen=True)
class AttentionPlan:
    """Work of one launch.

    work      int32 [CTAs + 1]      segments of CTA i are work[i] ... work[i + 1] - 1
    segments  int32 [S, 8]          sequence, KV head, first block, end block; slot of the partial result or -1, and
                                    place of its row in `merges`; 1 for a row's last segment, which kernels read to
                                    the sequence's end though it has grown since; PagedStep.ahead of the sequence
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
    """Segments that a balanced plan can have at most."""
    return num_seqs * num_kv_heads + ctas - 1


def most_slots(ctas: int) -> int:
    """Partial results that a balanced plan can have at most: each cut of a row adds one, a row's first another."""
    return max(1, 2 * (ctas - 1))


def most_merges(num_seqs: int, num_kv_heads: int, ctas: int) -> int:
    """Rows that a balanced plan can have in several parts at most: each has a cut of its own."""
    return min(num_seqs * num_kv_heads, ctas - 1)


def block_ranges(seqlens_k: Ints, block_size: int, window: int | None) -> tuple[Ints, Ints]:
    """First block that the last token of each sequence sees, and the end; both 0 where the length is 0."""
    lengths = seqlens_k.astype(np.int64)
    ends = (lengths + (block_size - 1)) // block_size
    if window is None:
        return np.zeros_like(ends), ends
    return np.minimum(np.maximum(lengths - window, 0) // block_size, ends), ends


def plan_balanced(
    seqlens_k: Ints,
    block_size: int,
    num_kv_heads: int,
    ctas: int,
    window: int | None = None,
    grain: int = 1,
    overhead: int = 12,
    least: int = 24,
) -> AttentionPlan:
    """The plan of least time for these lengths.

    seqlens_k  [B] tokens to attend over; 0 for a lane that is not used
    ctas       that the GPU holds at once
    grain      blocks that a CTA takes at a time: cuts are multiples of it
    overhead   blocks that could be read while a CTA begins and ends a segment
    least      blocks that a CTA is worth being started for, where rows are few; MOST_PARTS of a row always are
    """
    firsts, ends = block_ranges(seqlens_k, block_size, window)
    counts = ends - firsts  # [B], of each of a sequence's rows
    active = counts > 0
    costs = counts + overhead * active
    ticks = np.zeros(len(counts) + 1, dtype=np.int64)  # of sequences in the line of all rows' costs
    (num_kv_heads * costs).cumsum(out=ticks[1:])
    blocks = num_kv_heads * int(counts.sum())
    few = min(blocks // (2 * grain), MOST_PARTS * num_kv_heads * int(np.count_nonzero(active)))
    used = max(1, min(ctas, max(few, blocks // least)))
    targets = np.arange(1, used) * ticks[-1] // used
    seqs = ticks.searchsorted(targets, side="right") - 1  # of each cut
    heads, cuts = np.divmod(targets - ticks[seqs], costs[seqs])
    most = counts[seqs]
    cuts = np.minimum(np.maximum(cuts - (overhead - grain // 2), 0) // grain * grain, most)  # within its row
    rows = num_kv_heads * seqs + heads
    inner = (cuts > 0) & (cuts < most)
    inner[1:] &= (rows[1:] != rows[:-1]) | (cuts[1:] != cuts[:-1])  # two targets may round to one cut
    before = num_kv_heads * (active.cumsum() - active)[seqs] + heads  # rows that are read before the cut's
    added = inner.cumsum()
    # the segment that a cut opens: inner cuts one of their own, others their row's first or the next row's
    opened = before + added + (cuts == most)
    at = opened[inner]
    cut_rows = rows[inner]
    parts = active.astype(np.int64).repeat(num_kv_heads)
    np.add.at(parts, cut_rows, 1)
    segments = _whole_rows(firsts, ends, num_kv_heads).repeat(parts, axis=0)
    work = np.empty(ctas + 1, dtype=np.int32)
    work[0] = 0
    work[1:used] = opened
    work[used:] = len(segments)
    np.maximum.accumulate(work, out=work)  # a CTA whose cut was another's has no segment
    begins = firsts[seqs[inner]] + cuts[inner]
    flat, where = segments.reshape(-1), SEGMENT_FIELDS * at
    flat[where + 2] = begins
    flat[where + 3 - SEGMENT_FIELDS] = begins
    flat[where + 6 - SEGMENT_FIELDS] = 0
    return AttentionPlan(work, segments, _number_parts(segments, at, cut_rows))


def plan_fixed(
    seqlens_k: Ints,
    block_size: int,
    num_kv_heads: int,
    ctas: int,
    split_blocks: int,
    window: int | None = None,
    overhead: int = 12,
) -> AttentionPlan:
    """The plan whose cuts follow from each sequence's own length: results that do not depend on the batch."""
    firsts, ends = block_ranges(seqlens_k, block_size, window)
    counts = np.repeat(ends - firsts, num_kv_heads)
    parts = -(-counts // split_blocks)
    last = np.cumsum(parts)
    segments = np.repeat(_whole_rows(firsts, ends, num_kv_heads), parts, axis=0)
    begins = (np.arange(len(segments)) - np.repeat(last - parts, parts)) * split_blocks
    segments[:, 2] += begins.astype(np.int32)
    cuts = segments[:, 2] + split_blocks
    segments[:, 6] = cuts >= segments[:, 3]
    segments[:, 3] = np.minimum(cuts, segments[:, 3])
    costs = segments[:, 3] - segments[:, 2] + overhead
    ticks = np.cumsum(costs, dtype=np.int64)
    owner = (ticks - costs // 2) * ctas // (int(ticks[-1]) if len(ticks) else 1)
    work = np.searchsorted(owner, np.arange(ctas + 1), side="left").astype(np.int32)
    later = np.flatnonzero(begins)
    rows = np.repeat(np.arange(len(parts)), parts)[later]
    return AttentionPlan(work, segments, _number_parts(segments, later, rows))


def _number_parts(segments: Int32, later: NDArray[Any], rows: NDArray[Any]) -> Int32:
    """Slots for the segments of rows in several parts, neighbours for those of a row; returns AttentionPlan.merges.

    later  segments that are not their row's first, in order, and `rows`, whose they are
    """
    is_second = np.ones(len(later), dtype=bool)
    np.not_equal(rows[1:], rows[:-1], out=is_second[1:])
    places = is_second.cumsum() - 1  # in merges
    slots = np.arange(1, len(later) + 1) + places
    (seconds,) = is_second.nonzero()
    firsts = later[seconds] - 1
    pairs = segments.view(np.int64).reshape(-1)  # four a segment: (sequence, head), blocks, (slot, place), filling
    merges = np.empty((len(firsts), 4), dtype=np.int32)
    merges.view(np.int64)[:, 0] = pairs[SEGMENT_FIELDS // 2 * firsts]
    merges[:, 2] = slots[seconds] - 1
    merges[:-1, 3] = merges[1:, 2]
    merges[-1:, 3] = len(later) + len(firsts)
    merges[:, 3] -= merges[:, 2]
    pairs[SEGMENT_FIELDS // 2 * later + 2] = slots + (places << 32)
    pairs[SEGMENT_FIELDS // 2 * firsts + 2] = merges[:, 2] + (np.arange(len(firsts)) << 32)
    return merges


def _whole_rows(firsts: Ints, ends: Ints, heads: int) -> Int32:
    """Segments [B * heads, 8] of whole rows, without slots."""
    rows = _rows(len(firsts), heads).copy()
    rows.view(np.int64).reshape(len(firsts), heads, -1)[:, :, 1] = (firsts + (ends << 32))[:, None]
    return rows


@lru_cache
def _rows(seqs: int, heads: int) -> Int32:
    """Segments [seqs * heads, 8] of no blocks and no slot, one a row."""
    rows = np.zeros((seqs * heads, SEGMENT_FIELDS), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(seqs), heads)
    rows[:, 1] = np.tile(np.arange(heads), seqs)
    rows[:, 4] = -1
    rows[:, 6] = 1
    return rows
