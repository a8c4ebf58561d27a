"""The RMS norm of query and key heads (Qwen3, Gemma 3), in an order of additions that every device can keep."""

from dataclasses import dataclass

from torch import Tensor

from ..quant.ordered_sum import sum_in_order


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
    mean = sum_in_order(wide.square()) * (1.0 / x.shape[-1])
    root = (mean + eps).double().sqrt().float()  # torch's float32 root is not rounded correctly on a CPU
    normed = wide * root.reciprocal()
    if offset:
        return (normed * (weight.float() + offset)).to(x.dtype)
    return weight * normed.to(x.dtype)
