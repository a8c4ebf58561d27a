"""What becomes of turned keys before a cache rounds them, and of the queries that meet them.

softmax does not see what all scores of a query have in common, so keys may lose a constant vector, their centre. And
q . k stays the same when the same orthogonal matrix turns both: a Hadamard matrix spreads loud channels over the head.
Source of the latter: QuaRot, arXiv:2404.00456.

The transform is done in the one order of sums that references and kernels share. For n, the largest power of two that
divides head_dim, every n adjacent channels take butterflies (a, b) -> (a + b, a - b) over strides 1, 2, 4, ..., n/2, in
float32, and are then multiplied by float32(n^-0.5): Sylvester's matrix, symmetric and orthogonal, its own inverse.
"""

import torch
from torch import Tensor


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


def prepare_keys(k: Tensor, centre: Tensor | None, rotates: bool) -> Tensor:
    """Keys [..., num_kv_heads, head_dim] after RoPE as they are rounded, float32: less their centre, heads turned.

    centre  float32 [num_kv_heads, head_dim] or None
    """
    k = k.float() if centre is None else k.float() - centre
    return rotate_head(k) if rotates else k
