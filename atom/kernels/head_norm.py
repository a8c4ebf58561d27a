"""The RMS norm of query and key heads (Qwen3, Gemma 3), in an order of additions that every device can keep.

torch.mean adds in an order that depends on the device; here halves are added to halves, so that a kernel computes the
same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadNorms:
    """The norms of a layer's queries and keys: weights [head_dim] each; `offset` is 1 for Gemma, else 0."""

    q: Tensor
    k: Tensor
    eps: float
    offset: float = 0.0


def normalize_heads(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis, in float32; the dtype stays x's.

    x       [..., head_dim], head_dim even
    weight  [head_dim]
    Rounding to a narrower dtype comes before the weight where offset is 0, after it where it is not, as the families'
    own code has it.
    """
    wide = x.float()
    mean = _sum(wide.square()) * (1.0 / x.shape[-1])
    root = (mean + eps).double().sqrt().float()  # torch's float32 root is not rounded correctly on a CPU
    normed = wide * root.reciprocal()
    if offset:
        return (normed * (weight.float() + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def _sum(x: Tensor) -> Tensor:
    """Over the last axis: the halves of a head, then within octets of neighbours, then octets; [..., 1]."""
    first, second = x.chunk(2, -1)
    x = first + second
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)).unflatten(-1, (-1, 8))
    for width in (4, 2, 1):
        x = x[..., :width] + x[..., width:]
    x = x[..., 0]
    full = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, full - x.shape[-1]))
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x
