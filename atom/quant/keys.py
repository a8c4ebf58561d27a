"""What becomes of turned keys before a cache rounds them, and of the queries that meet them.

Centre, Hadamard matrix, mirror, in this order.

softmax does not see what all scores of a query have in common, so keys may lose a constant vector, their centre. And
q . k stays the same when the same orthogonal matrix turns both: a Hadamard matrix spreads loud channels over the head.
Source of the latter: QuaRot, arXiv:2404.00456.

The transform is done in the one order of sums that references and kernels share. For n, the largest power of two that
divides head_dim, every n adjacent channels take butterflies (a, b) -> (a + b, a - b) over strides 1, 2, 4, ..., n/2, in
float32, and are then multiplied by float32(n^-0.5): Sylvester's matrix, symmetric and orthogonal, its own inverse.

The mirror is a reflection x -> x - (w . x) w with |w|^2 = 2, of keys and queries alike. It takes one direction of a
head to that of equal channels, which zero points that keep the mean store best (mean_zero.py). Where a cache has a
mirror, it stands behind the centre: the two are one tensor [2, num_kv_heads, head_dim].
"""

import torch
from torch import Tensor

from .ordered_sum import sum_in_order


def rotate_head(x: Tensor) -> Tensor:
    """x [..., head_dim] in any float dtype, turned: float32 [..., head_dim]."""
    dim = x.shape[-1]
    n = dim & -dim
    x = x.float()
    stride = 1
    while stride < n:
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return x * torch.full((), n**-0.5, device=x.device)  # filled there: a copy would make the host wait


def reflect_head(x: Tensor, mirror: Tensor) -> Tensor:
    """float32 x [..., heads, head_dim], each head reflected in its mirror [heads, head_dim], in one order of sums."""
    return x - sum_in_order(x * mirror) * mirror


def split_centre(centre: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(centre, mirror), each [num_kv_heads, head_dim] or None, of what a cache takes as its centre."""
    if centre is None or centre.ndim == 2:
        return centre, None
    return centre[0], centre[1]


def prepare_keys(k: Tensor, centre: Tensor | None, rotates: bool) -> Tensor:
    """Keys [..., num_kv_heads, head_dim] after RoPE as they are rounded, float32: less their centre, turned, reflected.

    centre  float32 [num_kv_heads, head_dim], [2, num_kv_heads, head_dim] with a mirror, or None
    """
    centre, mirror = split_centre(centre)
    k = k.float() if centre is None else k.float() - centre
    k = rotate_head(k) if rotates else k
    return k if mirror is None else reflect_head(k, mirror)


def restore_keys(k: Tensor, centre: Tensor | None, rotates: bool) -> Tensor:
    """What `prepare_keys` made `k` of, less the centre still."""
    _, mirror = split_centre(centre)
    k = k if mirror is None else reflect_head(k, mirror)
    return rotate_head(k) if rotates else k


def prepare_queries(q: Tensor, centre: Tensor | None, rotates: bool) -> Tensor:
    """Queries [..., num_heads, head_dim] after RoPE as they meet such keys, in their own dtype."""
    _, mirror = split_centre(centre)
    if not rotates and mirror is None:
        return q
    turned = rotate_head(q) if rotates else q.float()
    if mirror is not None:
        turned = reflect_head(turned, mirror.repeat_interleave(q.shape[-2] // mirror.shape[0], 0))
    return turned.to(q.dtype)
