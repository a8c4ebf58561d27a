"""A step with prompts in two parts: what decodes, which has a CUDA graph, and the rest, which has none.

A graph's launch is one call, the rest is launched kernel by kernel. While the GPU replays the graph, the host launches
the rest; as one forward pass over both the GPU would wait for the host at every kernel. The price is that weights are
read twice, so it is worth it only while the rest is small.
"""

from dataclasses import replace

import numpy as np

from .batch import Batch

MOST_TOKENS = 1024  # of the rest; beyond, the GPU takes longer than the host anyway


def is_split(batch: Batch) -> bool:
    """Whether a step's decodes should run apart."""
    return 0 < batch.num_decodes < batch.num_seqs and batch.num_tokens - batch.num_decodes <= MOST_TOKENS


def split_decodes(batch: Batch) -> tuple[Batch, Batch]:
    """The decodes of a batch, and what follows them, each a batch of its own; sample rows keep their order."""
    n = batch.num_decodes
    is_first = batch.pending < n
    decodes = replace(
        batch,
        token_ids=batch.token_ids[:n],
        pending=batch.pending[is_first],
        pending_lanes=batch.pending_lanes[is_first],
        positions=batch.positions[:n],
        slots=batch.slots[:n],
        cu_seqlens_q=batch.cu_seqlens_q[: n + 1],
        seqlens_k=batch.seqlens_k[:n],
        block_tables=batch.block_tables[:n],
        lanes=batch.lanes[:n],
        sample_rows=batch.sample_rows[:n],
        sample_lanes=batch.sample_lanes[:n],
        masks_stop=batch.masks_stop[:n],
        inherited=None,
    )
    rest = replace(
        batch,
        token_ids=batch.token_ids[n:],
        pending=batch.pending[~is_first] - np.int32(n),
        pending_lanes=batch.pending_lanes[~is_first],
        positions=batch.positions[n:],
        slots=batch.slots[n:],
        cu_seqlens_q=batch.cu_seqlens_q[n:] - np.int32(n),
        seqlens_k=batch.seqlens_k[n:],
        block_tables=batch.block_tables[n:],
        lanes=batch.lanes[n:],
        sample_rows=batch.sample_rows[n:] - np.int32(n),
        sample_lanes=batch.sample_lanes[n:],
        masks_stop=batch.masks_stop[n:],
        num_decodes=0,
    )
    return decodes, rest
