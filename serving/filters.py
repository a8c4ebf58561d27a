"""Top-k, top-p and min-p as one threshold per row: a token is kept if its logit reaches it.

A threshold makes ties exact: tokens of equal logits at the border are all kept or all dropped, whatever order a sort or
a top-k returned them in, so the same request keeps the same tokens in every batch. The order is min-p, top-k, top-p;
the mass that top-p speaks of is that of the tokens the first two keep.

Only top-p without a (small) top-k needs a sort of whole rows.
"""

import torch
from torch import Tensor

SORT_ROWS = 32  # rows of the vocabulary that are sorted at once: bounds the memory (12 bytes a logit and more)


def min_p_floor(largest: Tensor, log_min_p: Tensor) -> Tensor:
    """Threshold [S] of p >= min_p * max p, for the rows' largest logits and log(min_p), -inf where it is off."""
    return largest + log_min_p


def top_k_floor(sorted_logits: Tensor, top_k: Tensor) -> Tensor:
    """Threshold [S], the top_k-th largest logit: sorted_logits [S, K] falling, top_k int64 [S] within 1 ... K."""
    return sorted_logits.gather(1, top_k[:, None] - 1)[:, 0]


def ties_beyond(logits: Tensor, sorted_logits: Tensor, floor: Tensor) -> Tensor:
    """How many logits [S, V] equal the threshold and are not among sorted_logits [S, K]; float32 [S]."""
    inside = (sorted_logits == floor[:, None]).sum(-1)
    return ((logits == floor[:, None]).sum(-1) - inside).float()


def top_p_floor(sorted_logits: Tensor, floor: Tensor, top_p: Tensor, beyond: Tensor | None = None) -> Tensor:
    """Threshold [S] of the smallest set of most likely tokens that has at least top_p of the kept mass.

    sorted_logits  [S, K]   float32, falling, with all logits that reach `floor`, save ...
    floor          [S]      threshold of the other filters; -inf keeps all
    top_p          [S]      within (0, 1]
    beyond         [S]      ... so many further tokens whose logit is `floor` itself
    """
    largest = sorted_logits[:, :1]
    weights = (sorted_logits - largest).exp_().masked_fill_(sorted_logits < floor[:, None], 0.0)
    mass = weights.cumsum(-1)
    total = mass[:, -1]
    if beyond is not None:
        total = total + torch.where(beyond > 0, beyond * (floor - largest[:, 0]).exp(), 0.0)
    kept = ((mass - weights) < (top_p * total)[:, None]) & (weights > 0)
    count = kept.sum(-1).clamp_(min=1)  # a row of NaN keeps nothing; it is reported elsewhere
    return sorted_logits.gather(1, count[:, None] - 1)[:, 0]


def top_p_floor_by_sort(logits: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """`top_p_floor` of unsorted logits [S, V], a few rows at a time."""
    parts = [
        top_p_floor(rows.sort(-1, descending=True).values, floors, shares)
        for rows, floors, shares in zip(
            logits.split(SORT_ROWS), floor.split(SORT_ROWS), top_p.split(SORT_ROWS), strict=True
        )
    ]
    return torch.cat(parts)
