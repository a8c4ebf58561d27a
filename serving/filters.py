"""Top-k, top-p and min-p as one threshold per row: a token is kept if its logit reaches it.

A threshold makes ties exact: tokens of equal logits at the border are all kept or all dropped, whatever order a sort or
a top-k returned them in, so the same request keeps the same tokens in every batch. The order is min-p, top-k, top-p;
the mass that top-p speaks of is that of the tokens the first two keep.

Only top-p without a small top-k, or a large top-k, needs a sort of whole rows.
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


def floor_by_sort(logits: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Threshold [S] of top-k, then top-p, of unsorted logits [S, V] at or above `floor`, a few rows at a time.

    top_k int64 [S], V for none; top_p [S], 1 for none
    """
    parts = []
    split = zip(*(x.split(SORT_ROWS) for x in (logits, floor, top_k, top_p)), strict=True)
    for rows, floors, numbers, shares in split:
        by_size = rows.sort(-1, descending=True).values
        floors = torch.maximum(floors, top_k_floor(by_size, numbers))
        nucleus = torch.maximum(floors, top_p_floor(by_size, floors, shares))
        parts.append(torch.where(shares < 1, nucleus, floors))  # rounding must not drop a token
    return torch.cat(parts)
