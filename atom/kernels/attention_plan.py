"""Which CTA reads which part of which sequence: the plan of a decode step's attention, made on the host.

A *row* is one sequence and KV head, a *segment* the part of a row that one CTA reads, in blocks. A row of one segment
is finished where it is computed; the segments of others leave partial results, which the last of their CTAs merges.

balanced  the blocks of all rows in a line, cut into as many equal parts as there are CTAs: every SM works to the end
          whatever the lengths are. A sequence's cuts, and with them its last bits, depend on the batch. Rows of one
          length are not cut where dealing them whole leaves few CTAs without work: nothing is left to merge then.
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
WHOLE_CTAS = 0.95  # of all must have work where rows are dealt whole (H200: with two thirds, SMs hold unequally many)
WHOLE_SPREAD = 32  # rows are of one length where it varies by less than this part of it
SEGMENT_FIELDS = 8  # of a segment, 32 bytes: see AttentionPlan


@dataclass(frozen=True)
class AttentionPlan:
    """Work of one launch.

    work      int32 [CTAs + 1]   segments of CTA i are work[i] ... work[i + 1] - 1
    segments  int32 [S, 8]       row by row: sequence, KV head, first block, end block; the row's first segment; in the
                                 low half how many it has (the last is read to the sequence's end, though it has grown
                                 since), in the high half how many partial results of a shared prefix there are
                                 (cascade_plan.py); the first slot of those; PagedStep.ahead of the sequence

    Segment i leaves its partial result, if its row has others, in slot i.
    """

    work: Int32
    segments: Int32


def most_segments(num_seqs: int, num_kv_heads: int, ctas: int) -> int:
    """Segments that a balanced plan can have at most."""
    return num_seqs * num_kv_heads + ctas - 1


def block_ranges(seqlens_k: Ints, block_size: int, window: int | None) -> tuple[Ints, Ints]:
    """First block that the last token of each sequence sees, and the end; both 0 where the length is 0."""
    lengths = seqlens_k.astype(np.int64)
    ends = (lengths + (block_size - 1)) // block_size
    if window is None:
        return _zeros(len(ends)), ends
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
    skipped: Ints | None = None,
    shared: Int32 | None = None,
) -> AttentionPlan:
    """The plan of least time for these lengths.

    seqlens_k  [B] tokens to attend over; 0 for a lane that is not used
    ctas       that the GPU holds at once
    grain      blocks that a CTA takes at a time, a power of two: cuts are multiples of it
    overhead   blocks that could be read while a CTA begins and ends a segment
    least      blocks that a CTA is worth being started for, where rows are few; MOST_PARTS of a row always are
    skipped    [B] first blocks of each sequence that are read together with others'
    shared     [B, heads, 2] first slot and number of the partial results of that
    """
    firsts, ends = block_ranges(seqlens_k, block_size, window)
    if skipped is not None:
        firsts = np.maximum(firsts, skipped)
    from_start = window is None and skipped is None
    counts = ends if from_start else ends - firsts  # [B], of each of a sequence's rows
    num_seqs, num_active = len(counts), int(np.count_nonzero(counts))
    active = None if num_active == num_seqs else counts > 0
    whole = _whole_rows(counts, active, num_active * num_kv_heads, ctas)
    if whole:
        parts = (np.ones(num_seqs, dtype=np.int64) if active is None else active).repeat(num_kv_heads)
        segments = _split_rows(firsts, ends, parts, num_kv_heads, shared)
        return AttentionPlan(np.minimum(whole * _from_zero(ctas + 1), len(segments)).astype(np.int32), segments)
    costs = counts + (overhead if active is None else overhead * active)
    done = costs.cumsum() * num_kv_heads  # where each sequence ends in the line of all rows' costs
    total = int(done[-1]) if num_seqs else 0
    blocks = total - num_kv_heads * overhead * num_active
    few = min(blocks // (2 * grain), MOST_PARTS * num_kv_heads * num_active)
    used = max(1, min(ctas, max(few, blocks // least)))
    targets = _numbers(used) * total // used
    seqs = done.searchsorted(targets, side="right")  # of each cut
    cost, most = costs.take(seqs), counts.take(seqs)
    into = targets - done.take(seqs) + num_kv_heads * cost
    heads = into // cost
    cuts = (into - heads * cost - (overhead - grain // 2)) & -grain  # within its row; may be before it or behind
    rows = num_kv_heads * seqs + heads
    inner = (cuts > 0) & (cuts < most)
    if total <= used * (grain + 1):  # two targets may round to one cut
        inner[1:] &= (rows[1:] != rows[:-1]) | (cuts[1:] != cuts[:-1])
    before = rows if active is None else num_kv_heads * (active.cumsum() - active)[seqs] + heads  # that are read
    # the segment that a cut opens: inner cuts one of their own, others their row's first or the next row's
    opened = before + inner.cumsum() + (cuts >= most)
    kept = inner.nonzero()[0]
    parts = np.bincount(rows.take(kept), minlength=num_seqs * num_kv_heads)
    parts += 1 if active is None else active.repeat(num_kv_heads)
    segments = _split_rows(firsts, ends, parts, num_kv_heads, shared)
    work = np.empty(ctas + 1, dtype=np.int32)
    work[0] = 0
    work[1:used] = opened  # a CTA whose cut was another's has no segment
    work[used:] = len(segments)
    begins = cuts.take(kept)
    if not from_start:
        begins += firsts.take(seqs.take(kept))
    flat, where = segments.reshape(-1), SEGMENT_FIELDS * opened.take(kept)
    flat.put(where + 2, begins)
    flat.put(where + (3 - SEGMENT_FIELDS), begins)
    return AttentionPlan(work, segments)


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
    segments = _split_rows(firsts, ends, parts, num_kv_heads, None)
    segments[:, 2] += (np.arange(len(segments)) - segments[:, 4]).astype(np.int32) * split_blocks
    segments[:, 3] = np.minimum(segments[:, 2] + split_blocks, segments[:, 3])
    costs = segments[:, 3] - segments[:, 2] + overhead
    ticks = np.cumsum(costs, dtype=np.int64)
    owner = (ticks - costs // 2) * ctas // (int(ticks[-1]) if len(ticks) else 1)
    work = np.searchsorted(owner, np.arange(ctas + 1), side="left").astype(np.int32)
    return AttentionPlan(work, segments)


def _whole_rows(counts: Ints, active: NDArray[Any] | None, rows: int, ctas: int) -> int:
    """Rows that each CTA takes whole; 0 where they should be cut. counts [B]: blocks of each sequence's rows."""
    each = -(-rows // ctas)
    if not each or -(-rows // each) < WHOLE_CTAS * ctas:
        return 0
    lengths = counts if active is None else counts[active]
    if abs(int(lengths[0]) - int(lengths[-1])) * WHOLE_SPREAD > lengths[0] + lengths[-1]:
        return 0  # the quick way
    longest, shortest = int(lengths.max()), int(lengths.min())
    return each if (longest - shortest) * WHOLE_SPREAD < longest else 0


def _split_rows(firsts: Ints, ends: Ints, parts: NDArray[Any], heads: int, shared: Int32 | None) -> Int32:
    """Segments of rows in parts [B * heads], each with all of its row's blocks."""
    pairs = _rows(len(firsts), heads).copy()  # (sequence, head), blocks, (first, parts), (shared slot, ahead)
    pairs.reshape(-1, heads, 4)[..., 1] = (firsts + (ends << 32))[:, None]
    starts = parts.cumsum()
    starts += parts * ((1 << 32) - 1)
    pairs[:, 2] = starts
    if shared is not None:
        rows = pairs.view(np.int32)
        rows[:, 5] += shared[..., 1].reshape(-1) << 16
        rows[:, 6] = shared[..., 0].reshape(-1)
    found: Int32 = pairs.repeat(parts, axis=0).view(np.int32)
    return found


@lru_cache
def _zeros(count: int) -> NDArray[np.int64]:
    zeros = np.zeros(count, dtype=np.int64)
    zeros.setflags(write=False)
    return zeros


@lru_cache
def _from_zero(count: int) -> NDArray[np.int64]:
    numbers = np.arange(count)
    numbers.setflags(write=False)
    return numbers


@lru_cache
def _numbers(count: int) -> NDArray[np.int64]:
    """1 ... count - 1."""
    return np.arange(1, count)


@lru_cache
def _rows(seqs: int, heads: int) -> NDArray[np.int64]:
    """Sequence and KV head of each row in the halves of the first column, int64 [seqs * heads, 4]; zeros otherwise."""
    rows = np.zeros((seqs * heads, SEGMENT_FIELDS), dtype=np.int32)
    rows[:, 0] = np.repeat(np.arange(seqs), heads)
    rows[:, 1] = np.tile(np.arange(heads), seqs)
    return rows.view(np.int64)
