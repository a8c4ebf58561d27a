"""A step with short prompts as rows of a decode step: each token a sequence of one token that ends with it.

A token attends over what stands before it in its text, wherever in the batch that is computed: keys and values of all
tokens are stored before any attends. So a prompt's 25 tokens are 25 rows of lengths 1 to 25 over the same blocks, and
a mixed step is one launch of a decode bucket (decode_buckets.py) that reads every weight once. Each row reads its keys
on its own, which is why long chunks are left to prefill's attention, which reads them once.
"""

from dataclasses import replace

import numpy as np

from .batch import Batch

MOST_TOKENS = 256  # that a step may have beside a decode of each lane
MOST_BYTES = 64 * 2**20  # of a layer's keys and values that prompts' rows may read: some 20 us on an H200


def fits_rows(batch: Batch, most_rows: int, most_samples: int, token_bytes: float) -> bool:
    """Whether a step is cheap as rows of a bucket.

    most_rows     of the largest bucket
    most_samples  rows whose logits it computes
    token_bytes   of one token's keys and values in one layer
    """
    if batch.num_tokens > most_rows or len(batch.sample_rows) > most_samples:
        return False
    seen = int(batch.positions[batch.num_decodes :].sum()) + batch.num_tokens - batch.num_decodes
    return seen * token_bytes <= MOST_BYTES


def as_rows(batch: Batch) -> Batch:
    """The same step as a decode batch of T sequences; those that are sampled from come first, in their order."""
    counts = np.diff(batch.cu_seqlens_q)
    starts = batch.cu_seqlens_q[:-1].repeat(counts)  # of each token's entry
    is_sampled = np.zeros(batch.num_tokens, dtype=np.bool_)
    is_sampled[batch.sample_rows] = True
    order = np.concatenate((batch.sample_rows, np.flatnonzero(~is_sampled).astype(np.int32)))
    places = np.empty_like(order)
    rows = places[order] = np.arange(batch.num_tokens, dtype=np.int32)
    owners = np.arange(batch.num_seqs, dtype=np.int32).repeat(counts)[order]
    return replace(
        batch,
        token_ids=batch.token_ids[order],
        pending=places[batch.pending],
        positions=batch.positions[order],
        slots=batch.slots[order],
        cu_seqlens_q=np.arange(batch.num_tokens + 1, dtype=np.int32),
        seqlens_k=batch.positions[order] + np.int32(1),
        block_tables=batch.block_tables[owners],
        lanes=batch.lanes[owners],
        sample_rows=rows[: len(batch.sample_rows)],
        num_decodes=batch.num_tokens,
        ahead=(order - starts[order]).astype(np.int32, copy=False),
    )
