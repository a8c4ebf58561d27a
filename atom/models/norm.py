"""Root-mean-square norm (arXiv:1910.07467), computed in float32 whatever the model's dtype."""

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.head_norm import normalize_heads
from ..kernels.norm import normalize, rms_norm


class Norm(nn.Module):
    """A norm before half a layer, which may take the residual add along."""

    def after(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Any]:
        """(hidden + update, its norm); `update` is None where nothing is to be added yet."""
        if update is not None:
            hidden = hidden + update
        return hidden, self(hidden)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * (weight + offset); offset 0 for most families, 1 for Gemma.

    Rounding to a narrower dtype follows the families' own code: before the weight where offset is 0, after it
    where it is 1.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        if self.offset:
            return rms_norm(x, self.gain(), self.eps).to(x.dtype)
        return self.weight * normalize(x, self.eps).to(x.dtype)

    def gain(self) -> Tensor:
        """What the normalised input is multiplied by: [size], float32."""
        return self.weight.float() + self.offset

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, offset={self.offset}"


class HeadNorm(RMSNorm):
    """The norm of every query or key head: as RMSNorm, its sums in an order that the append kernel keeps too."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., head_dim] -> the same shape and dtype."""
        return normalize_heads(x, self.weight, self.eps, self.offset)
