"""Attention over rounded keys and values whose newest are read exactly: the definition, over dense memory.

A query at position p reads the keys and values of p - recent + 1 ... p as they were before rounding, and all before
them rounded (`Scheme.kv_recent`). Queries are taken some at a time, each time over one list of keys: the rounded ones
first, the exact ones behind them, and a mask says who sees which. So nothing grows with the square of the length, and
it is torch's fused attention that computes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .dense_attention import AttentionSpec

QUERIES = 256  # taken at a time: their mask over 4096 keys has 1 MB


def attend_recent(
    q: Tensor, k: Tensor, v: Tensor, exact_k: Tensor, exact_v: Tensor, spec: AttentionSpec, recent: int
) -> Tensor:
    """Causal attention of the last `seq` of `length` tokens over all of them, the newest exactly.

    q                 [batch, num_heads, seq, head_dim]
    k, v              [batch, num_kv_heads, length, head_dim]   rounded
    exact_k, exact_v  [batch, num_kv_heads, n, head_dim]        of the last n tokens: `seq`, and recent - 1 before them
                                                                as far as there are so many
    returns like q
    """
    seq, length = q.shape[2], k.shape[2]
    first = length - exact_k.shape[2]  # position of the first exact key
    assert first <= max(0, length - seq - recent + 1), "the exact keys of a query's window are missing"
    assert spec.soft_cap is None, "caps are refused with a recent window"
    out = torch.empty_like(q)
    for start in range(0, seq, QUERIES):
        stop = min(seq, start + QUERIES)
        begin, end = length - seq + start, length - seq + stop  # positions of these queries
        oldest = 0 if spec.window is None else max(0, begin - spec.window + 1)
        near = max(oldest, begin - recent + 1)
        far = slice(oldest, max(oldest, end - recent))
        keys, values = (
            torch.cat([_heads(x, q.shape[1]) for x in (rounded[:, :, far], exact[:, :, near - first : end - first])], 2)
            for rounded, exact in ((k, exact_k), (v, exact_v))
        )
        mask = None
        if stop - start > 1:
            places = torch.arange(begin, end, device=q.device)[:, None]
            distant = places - torch.arange(far.start, far.stop, device=q.device)
            close = places - torch.arange(near, end, device=q.device)
            seen = (distant >= recent, (close >= 0) & (close < recent))
            if spec.window is not None:
                seen = (seen[0] & (distant < spec.window), seen[1] & (close < spec.window))
            mask = torch.cat(seen, 1)
        out[:, :, start:stop] = functional.scaled_dot_product_attention(
            q[:, :, start:stop], keys, values, attn_mask=mask, scale=spec.scale
        )
    return out


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values [batch, heads, n, head_dim] for each query head: with a mask torch's fused kernels share none."""
    return x.repeat_interleave(num_heads // x.shape[1], 1)
