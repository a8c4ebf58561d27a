"""Prefixes that decoding sequences share are read once for all of them: which, by which CTA, and what comes of it.

Sequences whose tables begin with the same blocks form a group; of a group, up to `most_members` at a time are one
*shared row*, which a kernel of its own reads (prefix_decode_sm90.py): their query heads stand side by side as columns
of one product with the common keys. What each sequence has for itself is read as ever; the decode kernel merges both.
That is a cascade of one level (ChunkAttention, arXiv:2402.15220).
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .attention_plan import Int32, plan_balanced
from .paged_step import Ints

LEAST_MEMBERS = 4  # of a group: bounds the rows of a step, and with fewer nothing is won


@dataclass(frozen=True)
class Cascade:
    """The shared rows of a step of B sequences.

    members  int [R, most_members], sequences; a row with fewer repeats its first, whose table is read
    blocks   int [R], that its members have in common
    rows     int [B], whose row a sequence is in, and places int [B], which of its members it is
    skipped  int [B], blocks of each sequence that a shared row reads; 0 where it shares none
    saved    blocks of one sequence's own that would take as long as what is saved, for each KV head
    """

    members: Ints
    blocks: Ints
    rows: Ints
    places: Ints
    skipped: Ints
    saved: float


def most_rows(num_seqs: int, most_members: int) -> int:
    """Shared rows that a step can have at most; a group of one member more than a row holds makes two."""
    return max(1, num_seqs // min(LEAST_MEMBERS, (most_members + 1) // 2))


@dataclass(frozen=True)
class Costs:
    """What sharing takes, in blocks of one sequence's own, of one KV head, that could be read meanwhile.

    row     a block of a shared row, whatever its members
    member  a sequence's partial results, which are written and merged
    step    a launch more
    """

    row: float = 0.0
    member: float = 0.0
    step: float = 0.0


def plan_cascade(tables: Ints, stored: Ints, block_size: int, most_members: int, costs: Costs) -> Cascade | None:
    """The shared rows of decoding sequences; None where they would cost more than they save.

    tables   int [B, max blocks]
    stored   int [B], tokens of each sequence that earlier steps have stored, 0 or less where it does not decode
    """
    whole = np.minimum(np.maximum(stored.astype(np.int64), 0) // block_size, tables.shape[1])  # may be shared
    least = max(1, math.ceil(costs.step / max(1, int((whole > 0).sum())) + costs.member))  # sharing fewer cannot pay
    (candidates,) = (whole >= least).nonzero()
    if most_members < 2 or len(candidates) < LEAST_MEMBERS:
        return None
    probe = tables[candidates, least - 1]  # who shares this one shares all before, if anything
    order = probe.argsort(kind="stable")
    probe = probe[order]
    (edges,) = (probe[1:] != probe[:-1]).nonzero()
    starts = np.concatenate(([0], edges + 1, [len(order)]))
    if np.diff(starts).max() < LEAST_MEMBERS:
        return None
    members: list[Ints] = []
    blocks: list[int] = []
    rows, places, skipped = (np.zeros(len(stored), dtype=np.int64) for _ in range(3))
    saved = 0.0
    for start, stop in pairwise(starts.tolist()):
        group = candidates[order[start:stop]]
        count = -(-len(group) // most_members)
        if len(group) < LEAST_MEMBERS or len(group) <= count * costs.row:
            continue
        common = _common_blocks(tables, group, int(whole[group].min()))
        gain = common * (len(group) - count * costs.row) - costs.member * len(group)
        if common < least or gain <= 0:
            continue
        saved += gain
        per_row = -(-len(group) // count)  # rows of a group are alike
        for part in (group[k * per_row : (k + 1) * per_row] for k in range(count)):
            rows[part], places[part], skipped[part] = len(members), np.arange(len(part)), common
            members.append(np.concatenate((part, part[:1].repeat(most_members - len(part)))))
            blocks.append(common)
    if not members or saved <= costs.step:
        return None
    return Cascade(np.stack(members), np.array(blocks, dtype=np.int64), rows, places, skipped, saved)


def _common_blocks(tables: Ints, group: Ints, most: int) -> int:
    """First columns in which all rows of a group agree, `most` at most; looked at in steps that double."""
    start, step = 0, 64
    while start < most:
        stop = min(start + step, most)
        part = tables[group, start:stop]
        differs = np.flatnonzero((part != part[:1]).any(0))
        if len(differs):
            return start + int(differs[0])
        start, step = stop, 2 * step
    return most


@dataclass(frozen=True)
class PrefixPlan:
    """Work of the kernel that reads shared rows.

    work      int32 [CTAs + 1], as AttentionPlan.work
    segments  int32 [S, 8]: sequence whose table is read, KV head, first block, end block; slot of the first member's
              partial result, row; 0; parts of the row, by which the slots of its members are apart
    shared    int32 [B, heads, 2]: first slot and number of the partial results of a sequence's prefix, or zeros
    """

    work: Int32
    segments: Int32
    shared: Int32


def most_prefix_segments(num_seqs: int, most_members: int, num_kv_heads: int, ctas: int) -> int:
    """Segments that a prefix plan can have at most; each leaves a partial result of every member of its row."""
    return most_rows(num_seqs, most_members) * num_kv_heads + ctas - 1


def plan_prefix(
    cascade: Cascade, num_kv_heads: int, ctas: int, grain: int, overhead: int, least: int, first_slot: int
) -> PrefixPlan:
    """The shared rows' blocks in equal parts, their slots from `first_slot` on; the others: see plan_balanced."""
    plan = plan_balanced(cascade.blocks, 1, num_kv_heads, ctas, None, grain, overhead, least)
    segments, heads, members = plan.segments, num_kv_heads, cascade.members.shape[1]
    line = segments[:, 0] * heads + segments[:, 1]  # row and head
    parts = np.bincount(line, minlength=len(cascade.blocks) * heads)
    before = parts.cumsum() - parts
    segments[:, 4] = first_slot + members * before[line] + np.arange(len(line)) - before[line]
    segments[:, 5] = segments[:, 0]
    segments[:, 6] = 0
    segments[:, 7] = parts[line]
    segments[:, 0] = cascade.members[segments[:, 5], 0]
    shared = np.zeros((len(cascade.rows), heads, 2), dtype=np.int32)
    is_member = cascade.skipped > 0
    own = (cascade.rows[is_member, None] * heads + np.arange(heads)).astype(np.int64)
    shared[is_member, :, 0] = first_slot + members * before[own] + cascade.places[is_member, None] * parts[own]
    shared[is_member, :, 1] = parts[own]
    return PrefixPlan(plan.work, segments, shared)
