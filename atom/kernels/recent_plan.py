"""Prefill chunks under a recent window: which keys are read exactly, which rounded, where they lie. No GPU, no torch.

Attention over both is two attentions that torch has kernels for, merged by their sums of exponentials. *Near*: the
exact keys of a chunk, and of the tokens before it that its queries still read exactly, in a sliding window of that many
tokens. *Far*: the attention of prefill_plan.py over the rounded keys less the last, as many as the window has: a
chunk's last query meets the last of the rest, each one before it one less, which is just what lies behind each query's
window. Queries at the beginning of a text have nothing there.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .paged_step import PagedStep, runs
from .prefill_plan import Chunks, PrefillPlan, RaggedPart, Takes, always, chunks_of, plan_chunks, ragged_part


@dataclass(frozen=True)
class RecentPlan:
    """The prefill chunks of a step, for layers of one window.

    tokens_exact  of the recent window
    near          the chunks over their exact keys; `tokens` are those of the step
    ring_rows     int64 [n], rows of the ring store that these keys begin with, chunk by chunk
    order         int64 [num exact keys], where each stands among ring_rows and the chunks' own tokens, one behind the
                  other; None: just so
    far           over rounded keys, its `tokens` counted among those of near; None: nobody reads any
    far_window    sliding window of that
    is_all        the step has no other tokens
    """

    tokens_exact: int
    near: RaggedPart
    ring_rows: NDArray[np.int64]
    order: NDArray[np.int64] | None
    far: PrefillPlan | None
    far_window: int | None
    is_all: bool


def plan_recent(
    step: PagedStep,
    window: int | None,
    block_size: int,
    flops: int = 0,
    allows_squares: bool = False,
    takes: Takes = always,
) -> RecentPlan | None:
    """The plan of a step with a recent window; None if no sequence prefills. Arguments as in plan_prefill."""
    chosen, chunks = np.flatnonzero(step.counts > 1), chunks_of(step)
    if chunks is None:
        return None
    recent = step.recent
    assert recent is not None and (window is None or window > recent.tokens)
    before = np.minimum(recent.tokens - 1, chunks.ends - chunks.counts)  # tokens of the ring that a chunk reads
    near = ragged_part(chunks.counts, before + chunks.counts, chunks.starts)
    positions = runs(chunks.ends - chunks.counts - before, before)
    ring_rows = np.repeat(recent.rings_host[chosen], before) + positions % recent.capacity
    order = None
    if len(chosen) > 1 and len(ring_rows):
        own = len(ring_rows) + np.arange(int(chunks.counts.sum()))
        order = np.empty(len(ring_rows) + len(own), dtype=np.int64)
        firsts = near.cu_seqlens_k[:-1].astype(np.int64)
        order[runs(firsts, before)] = np.arange(len(ring_rows))
        order[runs(firsts + before, chunks.counts)] = own
    far_window = None if window is None else window - recent.tokens
    far = _far(chunks, recent.tokens, far_window, block_size, flops, allows_squares, takes)
    is_all = int(chunks.counts.sum()) == step.num_tokens
    return RecentPlan(recent.tokens, near, ring_rows, order, far, far_window, is_all)


def _far(
    chunks: Chunks, recent: int, window: int | None, block_size: int, flops: int, allows_squares: bool, takes: Takes
) -> PrefillPlan | None:
    """The chunks' last queries, as many as read rounded keys, over these."""
    ends = chunks.ends - recent
    counts = np.minimum(chunks.counts, ends)
    has = counts > 0
    if not has.any():
        return None
    starts = np.cumsum(chunks.counts) - counts  # their tokens are the last of each chunk's
    part = Chunks(counts[has], ends[has], starts[has], chunks.tables[has])
    return plan_chunks(part, window, block_size, flops, allows_squares, int(chunks.counts.sum()), takes)
