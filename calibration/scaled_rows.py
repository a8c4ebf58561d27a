"""Columns of a weight whose codes stay while one scale a row learns: what distillation trains by default.

The scale stands outside of the product, y = (x Z^T) * s, with Z the codes, times the whole factors of their groups
where there are some. Z fits a byte, no weight is made anew in a step, and the gradient of s needs no product of its
own: ds = sum over tokens of dy * x Z^T.
"""

from typing import Any

import torch
from torch import Tensor, nn

from atom.quant.formats import get_format
from atom.quant.rounding import Quantized, Scale, code_values, expand_scale
from atom.quant.scales import round_scale
from atom.quant.schemes import TensorSpec

MOST = 127  # in a byte
WHOLE_FACTORS = 15


def has_scaled_rows(columns: Quantized, spec: TensorSpec) -> bool:
    """One scale a row learns: the only one, or the one above whole factors of groups."""
    fmt, scale = get_format(spec.format), columns.scale
    if not fmt.is_integer or not spec.symmetric:
        return False
    if spec.scale_format == "uint4":
        largest = max(abs(end) for end in fmt.code_range(True))
        return scale.outer is not None and scale.outer.shape[1] == 1 and largest * WHOLE_FACTORS <= MOST
    return scale.outer is None and scale.scale.shape[1] == 1


class ScaledRows(nn.Module):
    """See the module; stands in for TrainableColumns (trainable.py).

    whole       int8 [N, k], Z
    log_factor  [N, 1]; the scale is what was stored times its exponential, rounded to its storage format
    """

    codes: Tensor
    whole: Tensor
    scale: Tensor
    outer: Tensor | None

    def __init__(self, columns: Quantized, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        whole = code_values(columns.codes, get_format(spec.format))
        if columns.scale.outer is not None:
            whole = whole * expand_scale(columns.scale.scale.float(), whole.shape[1], spec)
        self.register_buffer("codes", columns.codes)
        self.register_buffer("whole", whole.to(torch.int8))
        self.register_buffer("scale", columns.scale.scale.clone())
        self.register_buffer("outer", columns.scale.outer)
        rows = self.scale if self.outer is None else self.outer
        self.log_factor = nn.Parameter(torch.zeros_like(rows))

    def product(self, x: Tensor) -> Tensor:
        """x [T, k] times the weight [N, k]."""
        factor, stored = self.log_factor.exp(), self._stored()
        rows = stored.scale if stored.outer is None else stored.outer
        learned = rows * (factor / factor.detach())  # the stored scale, and the gradient of the factor
        y: Tensor = _Product.apply(x, self.whole, learned.flatten())  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Codes and scales whose product is `product`'s."""
        return Quantized(self.codes, self._stored())

    @torch.no_grad()
    def _stored(self) -> Scale:
        factor = self.log_factor.exp()
        if self.outer is not None:
            return Scale(self.scale, None, self.outer * factor)
        return Scale(round_scale(self.scale * factor, self.spec.scale_format), None, None)


class _Product(torch.autograd.Function):
    """(x whole^T) * scale of x [T, k], int8 whole [N, k], scale [N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, scale: Tensor) -> Tensor:
        plain = x @ whole.to(x.dtype).T
        ctx.save_for_backward(plain, whole, scale)
        return plain * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor]:
        (dy,) = gradients
        plain, whole, scale = ctx.saved_tensors
        dx = (dy * scale) @ whole.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, (dy * plain).sum(0)
